"""Rollouts for GRPO by `kit.inference.decode`: TRL's rollout function on the kit's KV cache.

Where the sampler differs from the policy that is trained, each token comes with its log-probability
under the sampler. That is so under DMS, which evicts, and where the device computes in a smaller
dtype than that of the weights: there a copy of the weights in that dtype samples, as vLLM does
beside a trainer. Rounding alone biases the gradient (https://arxiv.org/abs/2510.26788); both gaps
are corrected by `grpo.importance_weight`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from kit.dms.gates import Gates, hidden
from kit.inference import decode
from kit.inference.kv_cache import layer_windows
from kit.inference.policies import DMS, Full
from kit.models.load import Model, default_dtype, twin
from kit.schema import Problem, Prompt, Sampling, digest

AT_ONCE = 8  # sequences per forward pass of `sampled_logps`
ROWS = 512  # tokens whose logits it has at once
NOTHING = Problem("", "", "", "", 0, "")  # a chat alone, whose problem TRL keeps


def completions(
    model: Model,
    chats: Sequence[list[dict]],
    sampling: Sampling,
    policy: Full,
    differs: bool = False,
) -> dict[str, list]:
    """One completion of each of `chats`, in order; equal chats get samples 0, 1, ...

    Keys are those of TRL: `prompt_ids`, `completion_ids` (with the end-of-sequence token) and
    `logprobs` in nats, None unless the policy is DMS or the model otherwise `differs` from the one
    that is trained.
    """
    counts, requests = Counter(), []
    for messages in chats:
        chat = tuple((message["role"], message["content"]) for message in messages)
        ids = decode.tokenize(model, Prompt(NOTHING, "rollout", chat))
        name = digest(ids, 16)
        requests.append(decode.Request(ids, name, counts[name]))
        counts[name] += 1
    training = model.weights.training
    model.weights.eval()
    generations = decode.decode(model, requests, sampling, len(requests), policy=policy)
    answers = [[*g.token_ids, *([g.stop_id] if g.finish == "stop" else [])] for g in generations]
    prompts = [list(request.prompt_ids) for request in requests]
    differs = differs or isinstance(policy, DMS)
    logps = (
        sampled_logps(model, policy, prompts, answers, sampling.temperature) if differs else None
    )
    model.weights.train(training)
    return {"prompt_ids": prompts, "completion_ids": answers, "logprobs": logps}


@torch.no_grad()
def sampled_logps(
    model: Model,
    policy: Full,
    prompts: list[list[int]],
    completions: list[list[int]],
    temperature: float,
) -> list[list[float]]:
    """Log-probabilities of the tokens of `completions` after `prompts` under the sampler, in nats.

    By teacher forcing, AT_ONCE sequences per forward pass; with hard gates where the policy is DMS,
    which is equivalent to the evicting cache.
    """
    windows, logps = layer_windows(model.weights.config), []
    sequences = [torch.tensor(p + c) for p, c in zip(prompts, completions, strict=True)]
    for first in range(0, len(sequences), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        ids = torch.nn.utils.rnn.pad_sequence(sequences[part], batch_first=True).to(model.device)
        gates = Gates(windows, policy.evictor.window if isinstance(policy, DMS) else 1)
        with decode.slots_attached(model), policy.attached(model.weights):
            states = hidden(model.weights, ids, gates)
        for row, prompt, completion in zip(states, prompts[part], completions[part]):
            at = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
            targets, found = torch.tensor(completion, device=row.device), []
            for states, chosen in zip(row[at].split(ROWS), targets.split(ROWS), strict=True):
                logp = (model.weights.lm_head(states).float() / temperature).log_softmax(-1)
                found += logp.gather(-1, chosen[:, None])[:, 0].tolist()
            logps.append(found)
    return logps


class Sampler:
    """TRL's rollout function for a training by `grpo.GRPOConfig`: `completions` of the weights as
    they are now, in the dtype that the device computes in.

    Weights stored in another dtype are copied into a twin, which is allocated once. ValueError for
    a policy whose log-probabilities are not defined.
    """

    def __init__(self, model: Model, config, policy: Full):
        if not (isinstance(policy, DMS) or type(policy) is Full):
            raise ValueError(
                f"Rollouts under {policy.name} do not know the log-probabilities of what they "
                f"sample; take full attention or DMS."
            )
        self.model, self.config, self.policy, self._twin = model, config, policy, None

    def __call__(self, chats: list, trainer) -> dict[str, list]:
        config = self.config
        if trainer.is_fsdp_enabled:
            raise ValueError(
                'rollouts is "kit", and FSDP shards the weights; take "vllm-server", "vllm" or '
                '"transformers".'
            )
        trained = trainer.accelerator.unwrap_model(trainer.model)
        trained = trained.get_base_model() if config.lora_rank else trained
        # Processes that share a group must not draw the same tokens.
        mark = [config.seed, trainer.state.global_step, trainer.accelerator.process_index]
        seed = int(digest(mark, 7), 16)
        sampling = Sampling(config.max_new_tokens, config.temperature, seed=seed)
        model = replace(self.model, weights=self._weights(trained))
        differs = config.corrected and model.weights is not trained
        return completions(model, chats, sampling, self.policy, differs)

    @torch.no_grad()
    def _weights(self, trained):
        dtype = default_dtype(trained.device)
        if trained.dtype == dtype:
            return trained
        if self._twin is None:
            self._twin = twin(trained, dtype).eval()
        for target, source in zip(self._twin.parameters(), trained.parameters(), strict=True):
            target.copy_(source)
        return self._twin
