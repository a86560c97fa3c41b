"""Peak memory of a training of evictors, computed before it starts.

Held throughout: the weights, which are the teacher's too; of each trained number its value in
float32, a gradient and AdamW's two moments; and the random numbers of a step. Beside them what
layers keep for the backward pass, all that they compute or, where they are computed again
(checkpointing), what goes into each; and the larger of the scores of some rows of attention and
some rows of logits. Fitted to what torch allocates, see tests/dms/test_memory.py.
"""

import torch
from transformers import PretrainedConfig

from kit.dms.distillation import ROWS
from kit.dms.evictor import EvictorRecipe
from kit.inference.kv_cache import free_bytes
from kit.inference.prefill_attention import CHUNK
from kit.models.load import Model

LOGITS = 24  # bytes of the logits of both models, their gradient and what stands between


def peak(
    config: PretrainedConfig,
    recipe: EvictorRecipe,
    dtype: torch.dtype,
    micro_batch: int,
    checkpointing: bool,
) -> float:
    """Bytes of training evictors of a model of shape `config` in `dtype`, with `micro_batch`
    sequences at once."""
    config = config.get_text_config()
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, groups = config.num_key_value_heads, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // groups
    query, keys, size = groups * head, heads * head, dtype.itemsize
    linear = layers * hidden * (2 * query + 2 * keys + 3 * inner)
    embedding = config.vocab_size * hidden
    weights = linear + embedding * (1 if config.tie_word_embeddings else 2)
    everything = recipe.trains == "all"
    trained = weights if everything else layers * (hidden * heads + hidden + heads)
    noise = 4 * layers * recipe.batch * heads * recipe.context
    held = size * weights + 16 * trained + noise

    stream = 4 if everything else size  # bytes of a number between two layers
    layer = (24 - 2 * size) * hidden + 3 * size * inner + 4 * query + 2 * size * keys + 37 * heads
    if everything:  # a layer keeps the inputs of its weights as well
        layer += size * (2 * hidden + inner + query)
    rows = min(CHUNK, recipe.context)
    scores = rows * (10 * groups + 4 * heads + 10)  # of rows of queries, and their masks
    kept = stream * hidden + 20 * heads if checkpointing else layer
    tokens = micro_batch * recipe.context
    # Without checkpointing the last layer is through with its feed-forward part by then.
    at_once = max(scores, layer) if checkpointing else scores - 3 * size * inner
    attention = tokens * ((12 + 2 * size) * hidden + at_once)
    return held + tokens * layers * kept + max(attention, ROWS * config.vocab_size * LOGITS)


def choose(model: Model, recipe: EvictorRecipe, micro_batch: int | None = None) -> tuple[int, bool]:
    """How many sequences of a batch to compute at once, and whether layers are computed again in
    the backward pass: the first of these that fits. MemoryError, with the bytes, if none does."""
    sizes = [micro_batch] if micro_batch else [recipe.batch >> n for n in range(20)]
    config = model.weights.config
    weights = sum(p.nbytes for p in model.weights.parameters())
    free = free_bytes(model.device) + weights
    for checkpointing in (False, True):
        for size in filter(None, sizes):
            need = peak(config, recipe, model.dtype, size, checkpointing)
            if need <= free:
                return size, checkpointing
    raise MemoryError(
        f"Training evictors takes {need / 1e9:.1f} GB at least, of {free / 1e9:.1f}; take a "
        f"context shorter than {recipe.context} tokens, or a smaller model."
    )
