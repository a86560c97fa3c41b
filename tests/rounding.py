"""What rounding may change in a dtype: measured against float64 on the same input, not assumed."""

import dataclasses

import torch

from kit.models.load import Model, twin

TIMES = 4  # how far off something may be, in errors of a plain computation in the same dtype


def exact(model: Model) -> Model:
    """The same weights, as they are rounded, in a model that computes in float64."""
    return dataclasses.replace(model, weights=twin(model.weights, torch.float64))


def tolerance(plain: torch.Tensor, right: torch.Tensor) -> float:
    """What a number may miss: TIMES the largest error of `plain`, computed in the dtype under test,
    against `right`, the same in float64; at least that of one rounding of the largest number."""
    once = torch.finfo(plain.dtype).eps / 2 * right.abs().max()
    return TIMES * float(torch.maximum((plain.double() - right).abs().max(), once))


def assert_close(found: torch.Tensor, plain: torch.Tensor, right: torch.Tensor) -> None:
    """`found` is as near to the float64 numbers `right` as `plain` is, to within TIMES."""
    bound = dict(atol=tolerance(plain, right), rtol=0)
    torch.testing.assert_close(found.double(), right.double(), **bound)


@torch.inference_mode()
def assert_same_greedy(model: Model, prompt, ours, theirs) -> None:
    """Two greedy continuations of the token ids `prompt` part nowhere in float32, and in
    fewer bits only where rounding cannot tell the logits of the two tokens apart."""
    ours, theirs = list(ours), list(theirs)
    if model.dtype == torch.float32 or ours == theirs:
        assert ours == theirs
        return
    assert len(ours) == len(theirs)
    at = next(i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1])
    ids = torch.tensor([[*prompt, *ours[:at]]], device=model.device)
    plain, right = (m.weights(ids).logits[0, -1] for m in (model, exact(model)))
    margin = abs(float(right[ours[at]] - right[theirs[at]]))
    assert margin <= 2 * tolerance(plain, right), f"apart at new token {at}"
