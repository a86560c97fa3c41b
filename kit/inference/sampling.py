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


def sample_tokens(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor) -> torch.Tensor:
    """Sample next tokens [N] from logits [N, V]: temperature, top-k, top-p, then inverse CDF.

    `uniform` [N] in [0, 1) is where the CDF, most likely token first, is inverted; temperature 0
    is greedy and ignores it.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
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
    kept = torch.where(mass >= sampling.top_p, mass, torch.inf).amin(-1)
    kept = torch.where(kept.isinf() & (mass.shape[-1] == wide), mass[:, -1], kept)
    short = kept.isinf()  # the HEAD tokens do not reach top_p
    if sampling.top_p == 1.0:
        kept, short = torch.ones_like(kept), mass[:, -1] <= uniform
        short &= mass.shape[-1] < wide
    pick = torch.searchsorted(
        mass, (uniform * kept.nan_to_num(posinf=1.0)).unsqueeze(1), right=True
    )
    tokens = top.indices.gather(1, pick.clamp(max=mass.shape[-1] - 1)).squeeze(1)
    if short.any():
        tokens[short] = _sample_sorted(logits[short], wide, sampling.top_p, uniform[short])
    return tokens


def _sample_sorted(logits, wide: int, top_p: float, uniform) -> torch.Tensor:
    """`sample_tokens` for rows that need more than HEAD tokens: sorts the vocabulary."""
    top = logits.topk(wide, sorted=True)
    mass = top.values.double().softmax(-1).cumsum(-1)
    end = (mass < top_p).sum(-1, keepdim=True).clamp(max=wide - 1)
    target = uniform.unsqueeze(1) * mass.gather(1, end)
    pick = torch.searchsorted(mass, target, right=True).clamp(max=wide - 1)
    return top.indices.gather(1, torch.minimum(pick, end)).squeeze(1)
