"""Sampling of the next token: temperature, top-k, top-p, and one uniform number per step."""

import hashlib

import numpy
import torch

from kit.schema import Sampling

HEAD = 256  # most likely tokens tried before the whole vocabulary is sorted


def seeded_uniforms(problem_id: str, sample: int, seed: int, steps: int) -> numpy.ndarray:
    """Uniform numbers in [0, 1) from problem, sample and run seed alone: [steps]; fewer steps get
    the first of them."""
    text = f"{problem_id}\0{sample}\0{seed}"
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return numpy.random.Generator(numpy.random.Philox(key=key)).random(steps)


def sample_tokens(
    logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor, counters: torch.Tensor
) -> tuple[list[int], list[float]]:
    """Sample next tokens [N] from logits [N, V]: temperature, top-k, top-p, then inverse CDF.

    `uniform` [N] in [0, 1) is where the CDF, most likely token first, is inverted; temperature 0
    is greedy and ignores it. `counters` are copied to the host with them: that waits for the device
    once, or twice where a row needs more than the HEAD most likely tokens.
    """
    tokens, short = _sample_head(logits, sampling, uniform)
    host_values, count = (
        torch.cat([tokens.double(), short.double(), counters]).tolist(),
        len(tokens),
    )
    tokens, short = [*map(int, host_values[:count])], host_values[count : 2 * count]
    if rows := [row for row, few in enumerate(short) if few]:
        at = torch.tensor(rows, device=logits.device)
        for row, token in zip(rows, _sample_sorted(logits[at], sampling, uniform[at]).tolist()):
            tokens[row] = token
    return tokens, host_values[2 * count :]


def _sample_head(
    logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N] by the HEAD most likely alone, and the rows [N] for which those are too few; does
    not wait for the device."""
    if sampling.temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits), dtype=torch.bool)
    logits = logits / sampling.temperature
    wide = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    top = logits.topk(min(wide, HEAD), sorted=True)
    # log_softmax works row by row; logsumexp sums a lone row in another order than one of many.
    if sampling.top_k:
        logp = logits.topk(wide, sorted=True).values.log_softmax(-1)[:, :HEAD]
    else:
        logp = logits.log_softmax(-1).gather(1, top.indices)
    mass = logp.double().exp().cumsum(-1)  # [N, <= HEAD]
    # Top-p keeps the shortest head whose mass reaches top_p, at least one token.
    nucleus = torch.where(mass >= sampling.top_p, mass, torch.inf).amin(-1)
    nucleus = torch.where(nucleus.isinf() & (mass.shape[-1] == wide), mass[:, -1], nucleus)
    short = nucleus.isinf()  # the HEAD tokens do not reach top_p
    if sampling.top_p == 1.0:
        nucleus, short = torch.ones_like(nucleus), mass[:, -1] <= uniform
        short &= mass.shape[-1] < wide
    pick = torch.searchsorted(
        mass, (uniform * nucleus.nan_to_num(posinf=1.0)).unsqueeze(1), right=True
    )
    return top.indices.gather(1, pick.clamp(max=mass.shape[-1] - 1)).squeeze(1), short


def _sample_sorted(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor) -> torch.Tensor:
    """`sample_tokens` of rows that need more than HEAD tokens: sorts the vocabulary."""
    wide = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    top = (logits / sampling.temperature).topk(wide, sorted=True)
    mass = top.values.double().softmax(-1).cumsum(-1)
    end = (mass < sampling.top_p).sum(-1, keepdim=True).clamp(max=wide - 1)
    target = uniform.unsqueeze(1) * mass.gather(1, end)
    pick = torch.searchsorted(mass, target, right=True).clamp(max=wide - 1)
    return top.indices.gather(1, torch.minimum(pick, end)).squeeze(1)
