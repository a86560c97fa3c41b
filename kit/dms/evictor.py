"""The evictor of DMS: predicts which tokens each head may evict from the KV cache.

An Evictor turns a layer's hidden states into one logit per token and KV head. `attached` hooks it
to the model's layers, where it passes its logits to the object that computes attention (`slots=`:
the slot cache in decoding, soft gates in training). The logit at token t+1 decides about token t,
and the decision takes effect after `window` further tokens (delayed eviction).

Sources: Dynamic Memory Sparsification, https://arxiv.org/abs/2506.05345 ("paper");
https://github.com/NVIDIA/Model-Optimizer, experimental/dms at a2fbac7 ("official").
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from kit.inference.kv_cache import layer_windows
from kit.paths import atomic


@dataclass(frozen=True)
class EvictorRecipe:
    """Everything that determines a training of evictors, apart from model, data and seed."""

    name: str
    source: str  # "adapter": RMSNorm and Linear per layer; "neuron": one borrowed query neuron
    trains: str  # "evictor": the base stays frozen; "all": every weight is trained
    window: int  # tokens that see a key before its eviction takes effect
    compression_x: float  # where the schedule ends
    ramp_steps: float  # steps in which the target compression grows by 1, or doubles
    divergence: str  # "student||teacher" or "teacher||student"
    logit_scale: float = 100.0
    logit_offset: float = -5.0  # negative: training starts with "keep everything"
    temperature: float = 0.1  # of the relaxed gate
    doubling: bool = False  # the ramp doubles every `ramp_steps` instead of adding 1
    fade_steps: int = 0  # steps in which the borrowed neuron is faded out of attention
    hold_steps: int = 0  # steps after the ramp has ended
    hinge_weight: float = 1.0
    learning_rate: float = 3e-5
    batch: int = 8  # sequences in a step
    context: int = 32768  # tokens in a sequence

    def compression(self, step: int) -> float:
        """Target compression after `step` steps: 1 while fading, then the ramp."""
        ramp = max(0, step - self.fade_steps) / self.ramp_steps
        return min(self.compression_x, 2**ramp if self.doubling else 1 + ramp)

    def steps_to(self, compression_x: float) -> int:
        """Steps of the ramp (fading not counted) until the target is `compression_x`."""
        units = math.log2(compression_x) if self.doubling else compression_x - 1
        return round(units * self.ramp_steps)

    @property
    def steps(self) -> int:
        return self.fade_steps + self.steps_to(self.compression_x) + self.hold_steps


# As published. Two values of the paper's recipe are assumptions: the learning rate, and the steps
# of fading, 300 of "about 1K steps" for 8x in all.
OFFICIAL = EvictorRecipe("official", "adapter", "evictor", 512, 16, 34, "student||teacher")
PAPER = EvictorRecipe(
    *("paper", "neuron", "all", 256, 8, 100, "teacher||student"),
    logit_scale=1.0,
    fade_steps=300,
    learning_rate=1e-5,
    batch=256,
)
# For contexts of hundreds of tokens and minutes of a CPU: a softer gate and a higher learning
# rate replace the 262,144 tokens of an official step, and a ramp that doubles gives the low
# compressions time too (a linear one leaves 2x after a seventh of the steps).
LAPTOP = replace(
    OFFICIAL,
    **dict(name="laptop", window=16, compression_x=8, ramp_steps=40, doubling=True),
    **dict(hold_steps=24, divergence="teacher||student", logit_scale=30.0, temperature=0.3),
    **dict(hinge_weight=2.0, learning_rate=3e-4, batch=2, context=384),
)
RECIPES = {recipe.name: recipe for recipe in (OFFICIAL, PAPER, LAPTOP)}


class Evictor(nn.Module):
    """Eviction logits for every full-attention layer of one base model.

    The slot cache reads `window` and `layers`; `fingerprint` identifies the trained values in
    record keys.
    """

    def __init__(self, weights: PreTrainedModel, recipe: EvictorRecipe, base_hash: str):
        super().__init__()
        config = weights.config.get_text_config()
        windows = layer_windows(config)
        self.layers = tuple(i for i, window in enumerate(windows) if window is None)
        if not self.layers:
            raise ValueError(
                f"{config.model_type} has sliding-window layers only; DMS evicts in layers with "
                f"full attention, choose another model."
            )
        if recipe.window < 1 or recipe.compression_x < 1:
            raise ValueError(
                f"window is {recipe.window} and compression_x {recipe.compression_x}; both must "
                f"be at least 1 (1 is immediate eviction, and no compression)."
            )
        self.recipe, self.window, self.base_hash = recipe, recipe.window, base_hash
        self.heads = config.num_key_value_heads
        self.fade = 0.0  # share of a borrowed neuron that attention still sees
        self.card: dict = {}
        size = config.hidden_size
        if recipe.source == "adapter":
            self.norm = nn.ParameterList(nn.Parameter(torch.ones(size)) for _ in self.layers)
            self.eps = config.rms_norm_eps
            self.linear = nn.ModuleList(nn.Linear(size, self.heads) for _ in self.layers)
            for linear in self.linear:
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        self.to(weights.device)

    @property
    def name(self) -> str:
        """By the target compression of its training, for example "dms-4x"."""
        return f"dms-{self.card.get('target_x', 1):.3g}x"

    @property
    def fingerprint(self) -> str:
        """Hash of the trained values, the training and the base model: 12 hex digits."""
        training = {name: self.card.get(name) for name in ("job", "steps")}
        sha = hashlib.sha256(f"{self.base_hash} {asdict(self.recipe)} {training}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            sha.update(name.encode() + tensor.half().cpu().numpy().tobytes())
        return sha.hexdigest()[:12]

    def logits(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Eviction logits of the adapter in the `number`-th of `layers`.

        hidden [..., hidden size], before the layer's own norm; returns [..., KV heads] float32.
        """
        scale, offset, linear = (
            self.recipe.logit_scale,
            self.recipe.logit_offset,
            self.linear[number],
        )
        if hidden.is_cuda and not torch.is_grad_enabled():
            from kit.inference.triton_layers import scored  # imports Triton, for CUDA only

            inputs = self.norm[number], linear.weight, linear.bias, self.eps, scale, offset
            return scored(hidden, *inputs)
        normed = nn.functional.rms_norm(
            hidden.float(), (hidden.shape[-1],), self.norm[number], self.eps
        )
        return scale * linear(normed) + offset

    @contextmanager
    def attached(self, weights: PreTrainedModel) -> Iterator[None]:
        """Each layer calls `slots.set_eviction_logits(layer, logits [B, T, H])` in this block."""
        with ExitStack() as hooks:
            for number, layer in enumerate(self.layers):
                block = weights.base_model.layers[layer]
                if self.recipe.source == "adapter":
                    hook = self._adapter_hook(number)
                    hooks.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
                else:
                    remember, borrow = self._neuron_hooks(block.self_attn)
                    handle = block.register_forward_pre_hook(remember, with_kwargs=True)
                    hooks.callback(handle.remove)
                    hooks.callback(block.self_attn.q_proj.register_forward_hook(borrow).remove)
            yield

    def _adapter_hook(self, number: int):
        def decide(block, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            kwargs["slots"].set_eviction_logits(self.layers[number], self.logits(number, hidden))

        return decide

    def _neuron_hooks(self, attention):
        """The last neuron of the first query head of each group serves as the logit."""
        group = attention.q_proj.out_features // attention.head_dim // self.heads
        first = torch.arange(self.heads, device=attention.q_proj.weight.device) * group
        neuron = first * attention.head_dim + attention.head_dim - 1
        slots = {}

        def remember(block, args, kwargs):
            slots["current"] = kwargs["slots"]

        def borrow(projection, args, output):
            logit = self.recipe.logit_scale * output[..., neuron].float()
            slots["current"].set_eviction_logits(
                attention.layer_idx, logit + self.recipe.logit_offset
            )
            mask = torch.ones_like(output[0, 0])
            mask.index_fill_(0, neuron, self.fade)
            return output * mask

        return remember, borrow

    def save(self, file: Path, extra: dict[str, torch.Tensor] | None = None) -> None:
        """Write the evictor in float16 with its card as one safetensors file, whole or not at all.

        `extra` are base weights that were trained along ("all" recipes).
        """
        tensors = {name: t.half().cpu().contiguous() for name, t in self.state_dict().items()}
        tensors |= {f"base.{name}": t.cpu().contiguous() for name, t in (extra or {}).items()}
        card = {**self.card, "recipe": asdict(self.recipe), "base_hash": self.base_hash}
        tensors = tensors or {"none": torch.zeros(1)}
        with atomic(file) as part:
            save_file(tensors, part, metadata={"card": json.dumps(card)})


def read_card(file: Path) -> dict:
    """Recipe, base hash, steps, compression and KL of a saved evictor."""
    try:
        with safe_open(file, "pt") as handle:
            return json.loads(handle.metadata()["card"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no evictor of the kit ({error}); train it again.") from error


def load(file: Path, model) -> Evictor:
    """The evictor in `file` for `model`, a kit Model.

    An "all" recipe changes the base: its trained weights are copied into `model.weights`.
    Raises ValueError when it was trained for other weights than these, or than those that these
    were quantized from.
    """
    card = read_card(file)
    if card["base_hash"] not in model.hashes:
        raise ValueError(
            f"{file} was trained for weights {card['base_hash']}, {model.name} has "
            f"{model.weights_hash}; load the model it belongs to or train an evictor for this one."
        )
    evictor = Evictor(model.weights, EvictorRecipe(**card.pop("recipe")), card.pop("base_hash"))
    with safe_open(file, "pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    own = {name: tensors[name] for name in evictor.state_dict()}
    evictor.load_state_dict({name: tensor.float() for name, tensor in own.items()})
    base = {k.removeprefix("base."): v for k, v in tensors.items() if k.startswith("base.")}
    if base:
        model.weights.load_state_dict(base, strict=False)
    evictor.card = card
    return evictor.requires_grad_(False).eval()
