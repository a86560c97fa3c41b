"""Completions to learn from, by `kit.decode`: TRL's rollout function over the kit's cache.

Under DMS the sampler evicts and the trained model does not, so each token comes with its
log-probability under the sampler; a plain cache samples what the model says and needs none.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from kit import decode
from kit.gates import Gates, hidden
from kit.kv import layer_windows
from kit.models import Model
from kit.policies import DMS, Full
from kit.schema import Problem, Prompt, Sampling, digest

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
