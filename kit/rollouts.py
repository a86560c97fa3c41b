"""Completions to learn from, by `kit.decode`: TRL's rollout function over the kit's cache.

Under DMS the sampler evicts and the trained model does not, so each token comes with its
log-probability under the sampler; a plain cache samples what the model says and needs none.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from kit import decode
from kit.gates import Gates, hidden
from kit.kv import layer_windows
from kit.models import Model
from kit.policies import DMS, Full
from kit.schema import Problem, Prompt, Sampling, digest

CLIP = 2.0  # most that an importance weight of the sampler's tokens may be, TRL's default
NOTHING = Problem("", "", "", "", 0, "")  # a chat alone, whose problem TRL keeps


def completions(
    model: Model, asked: Sequence[list[dict]], sampling: Sampling, policy: Full
) -> dict[str, list]:
    """One completion of each chat in `asked`, in order; equal chats get samples 0, 1, ...

    Keys as TRL wants them: `prompt_ids`, `completion_ids` (with the token that ends an answer) and
    `logprobs`, which is None unless the policy is DMS.
    """
    seen, requests = Counter(), []
    for messages in asked:
        chat = tuple((message["role"], message["content"]) for message in messages)
        ids = decode.tokenise(model, Prompt(NOTHING, "rollout", chat))
        name = digest(ids, 16)
        requests.append(decode.Request(ids, name, seen[name]))
        seen[name] += 1
    training = model.weights.training
    model.weights.eval()
    done = decode.decode(model, requests, sampling, len(requests), policy=policy)
    end = [model.tokenizer.eos_token_id]
    said = [[*g.token_ids, *(end if g.finish == "stop" else [])] for g in done]
    read = [list(request.prompt_ids) for request in requests]
    evicts = isinstance(policy, DMS)
    logps = sampled_logps(model, policy, read, said, sampling.temperature) if evicts else None
    model.weights.train(training)
    return {"prompt_ids": read, "completion_ids": said, "logprobs": logps}


@torch.no_grad()
def sampled_logps(
    model: Model, policy: DMS, read: list[list[int]], said: list[list[int]], temperature: float
) -> list[list[float]]:
    """Log-probabilities of the tokens `said` after `read` under the evicting model, in nats.

    One pass over whole sequences with hard gates, which equals the evicting cache.
    """
    whole = [torch.tensor(before + after) for before, after in zip(read, said, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True).to(model.device)
    gates = Gates(layer_windows(model.weights.config), policy.evictor.window)
    with decode.slots_attached(model), policy.evictor.attached(model.weights):
        states = hidden(model.weights, ids, gates)
    found = []
    for row, (before, after) in enumerate(zip(read, said, strict=True)):
        at = slice(len(before) - 1, len(before) + len(after) - 1)
        logp = (model.weights.lm_head(states[row, at]) / temperature).log_softmax(-1)
        targets = torch.tensor(after, device=logp.device)
        found.append(logp.gather(-1, targets[:, None])[:, 0].tolist())
    return found


def during(model: Model, recipe, policy: Full, asked: list, trainer) -> dict[str, list]:
    """`completions` for a training by `recipes.Recipe`, by the weights as they are now."""
    if trainer.is_fsdp_enabled:
        raise ValueError(
            'rollouts is "kit", and FSDP shards the weights; take "vllm-server", "vllm" or '
            '"transformers".'
        )
    weights = trainer.accelerator.unwrap_model(trainer.model)
    weights = weights.get_base_model() if recipe.lora_rank else weights
    # A group may lie in several processes, which must not say the same.
    mark = [recipe.seed, trainer.state.global_step, trainer.accelerator.process_index]
    seed = int(digest(mark, 7), 16)
    sampling = Sampling(recipe.max_new_tokens, recipe.temperature, seed=seed)
    return completions(replace(model, weights=weights), asked, sampling, policy)


def trainer_class():
    """GRPOTrainer, corrected for a sampler that is not the model: made here, since importing TRL
    takes seconds."""
    from trl import GRPOTrainer

    class Corrected(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            made = super()._generate_and_score_completions(inputs)
            if self.use_vllm or "sampling_per_token_logps" not in made:
                return made
            mask, count = made["completion_mask"], made["completion_ids"].size(1)
            whole = torch.cat([made["prompt_ids"], made["completion_ids"]], dim=1)
            masks = torch.cat([made["prompt_mask"], mask], dim=1)
            with torch.no_grad():
                ours = self._get_per_token_logps_and_entropies(self.model, whole, masks, count)[0]
            gap = (ours - made["sampling_per_token_logps"]) * mask
            self._metrics["train"]["sampling/logp_gap"].append(float(gap.abs().sum() / mask.sum()))
            # The clipped objective is linear in the advantage, so weighing one weighs the other.
            made["advantages"] = made["advantages"][:, None] * gap.exp().clamp(max=CLIP)
            return made

    return Corrected
