"""KL divergence between a student and a teacher that share a vocabulary, without storing logits.

The logits of 1,000 tokens over a vocabulary of 50,000 take 200 MB, and automatic differentiation
stores several copies. Here they exist for one chunk of tokens at a time: the forward pass also
computes the gradient with respect to the hidden states, as fused cross-entropy kernels do (Liger
kernels, https://arxiv.org/abs/2410.10989).

Logits are float32 whatever the dtype of the states: bfloat16 would round them by up to a sixteenth,
and two equal models would seem a thousandth of a nat apart.
"""

import torch

DIVERGENCES = ("student||teacher", "teacher||student")
ROWS = 256  # tokens per chunk
COLUMNS = 4096  # of the vocabulary, per cast


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, head, teacher_head, divergence):
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        head_grad = torch.zeros_like(_precise(head)) if ctx.needs_input_grad[2] else None
        for first in range(0, len(student), ROWS):
            rows = slice(first, first + ROWS)
            student_logp = _logits(student[rows], head).log_softmax(-1)
            teacher_logp = _logits(teacher[rows], teacher_head).log_softmax(-1)
            if divergence == "teacher||student":
                p = teacher_logp.exp()
                total += (p * (teacher_logp - student_logp)).sum(dtype=torch.float64)
                slope = student_logp.exp_().sub_(p)
            else:
                p, gap = student_logp.exp(), student_logp.sub_(teacher_logp)
                kl = (p * gap).sum(-1, keepdim=True)
                total += kl.sum(dtype=torch.float64)
                slope = p.mul_(gap.sub_(kl))
            slope = slope.to(head.dtype)
            if grad is not None:
                grad[rows] = slope @ head
            if head_grad is not None:
                head_grad += slope.T @ student[rows]  # summed over the chunks in float32
        ctx.save_for_backward(grad, None if head_grad is None else head_grad.to(head.dtype))
        ctx.count = len(student)
        return (total / len(student)).float()

    @staticmethod
    def backward(ctx, upstream):
        scale = upstream / ctx.count
        grads = (
            None if grad is None else (grad * scale).to(grad.dtype) for grad in ctx.saved_tensors
        )
        student, head = grads
        return student, None, head, None, None


def divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    head: torch.Tensor,
    teacher_head: torch.Tensor,
    kind: str = "teacher||student",
) -> torch.Tensor:
    """Mean KL in nats per token; gradients flow to `student` and `head`.

    student, teacher [N, hidden size], after the final norm; head, teacher_head [V, hidden size].
    "teacher||student" is KL(teacher || student), the forward direction of distillation.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"divergence is {kind!r}; choose one of {DIVERGENCES}.")
    return _Divergence.apply(student, teacher, head, teacher_head, kind)


@torch.no_grad()
def compare(student, teacher, head, teacher_head, targets) -> dict[str, torch.Tensor]:
    """Per token: KL(teacher || student) and both surprisals of `targets` [N], in nats: [N] each.

    Probabilities are float64: a small KL is the difference of sums that are nearly equal.
    """
    out = {"kl": [], "nats": [], "full_nats": []}
    for first in range(0, len(student), ROWS):
        rows = slice(first, first + ROWS)
        student_logp = _logits(student[rows], head).double().log_softmax(-1)
        teacher_logp = _logits(teacher[rows], teacher_head).double().log_softmax(-1)
        out["kl"].append((teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1))
        word = targets[rows, None]
        out["nats"].append(-student_logp.gather(1, word).squeeze(1))
        out["full_nats"].append(-teacher_logp.gather(1, word).squeeze(1))
    return {name: torch.cat(parts) for name, parts in out.items()}


def _logits(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Logits [N, V], at least float32, without gradients. A copy of the whole head in float32 would
    take longer to allocate than to multiply."""
    states = _precise(states)
    logits = states.new_empty(len(states), len(head))
    for first in range(0, len(head), COLUMNS):
        part = slice(first, first + COLUMNS)
        torch.mm(states, head[part].to(states.dtype).T, out=logits[:, part])
    return logits


def _precise(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
