"""The KL divergence of a student's predictions from a teacher's, with little memory beside the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Predictions in a chunk: for a vocabulary of 50 thousand, each of a few temporary tensors takes 50 MB.
CHUNK = 256

#: Least probability of all classes beside the k most probable ones together: the size of rounding.
MIN_REST = 1e-7

#: Returns the target log probabilities (c, classes) of a chunk of c counted predictions. Its arguments are the chunk's
#: slice of the counted predictions, their indices, and the student's log probabilities.
_Target = Callable[[slice, Tensor, Tensor], Tensor]


def kl_divergence(teacher: Tensor, student: Tensor, rows: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Return the mean over predictions of KL(softmax(teacher / T) || softmax(student / T)).

    The computation is in at least float32, whatever the type of the logits. Beside the logits it holds one tensor of
    the student's size and type, the gradient.

    Args:
        teacher: Logits, shape (N, classes).
        student: Logits, shape (N, classes); differentiable once.
        rows: Indices of the counted predictions, shape (n,); None counts all.
        temperature: Temperature T.

    Returns:
        A scalar in at least float32; 0 if no prediction counts.
    """

    def target(where: slice, index: Tensor, log_q: Tensor) -> Tensor:
        return torch.log_softmax(teacher[index].to(log_q.dtype) / temperature, 1)

    return _Divergence.apply(student, rows, temperature, target)


def top_k_divergence(
    log_p: Tensor, index: Tensor, student: Tensor, rows: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Return the mean divergence over k + 1 outcomes: the teacher's k most probable classes, and all others as one.

    This equals :func:`kl_divergence` from a teacher that distributes its remaining probability over the other classes
    as the student does. It takes as much memory.

    Args:
        log_p: The teacher's log probabilities at temperature T, shape (n, k).
        index: Classes of these log probabilities, shape (n, k).
        student: Logits, shape (N, classes); differentiable once.
        rows: Indices of the n counted predictions; None counts all N.
        temperature: Temperature T.

    Returns:
        A scalar in at least float32; 0 if no prediction counts.
    """

    def target(where: slice, _: Tensor, log_q: Tensor) -> Tensor:
        kept, classes = log_p[where].to(log_q.dtype), index[where].long()
        if kept.shape[1] == log_q.shape[1]:
            return torch.empty_like(log_q).scatter_(1, classes, kept)
        rest = (1 - kept.exp().sum(1, keepdim=True)).clamp(min=MIN_REST).log()
        others = torch.log_softmax(log_q.scatter(1, classes, -torch.inf), 1)
        return others.add_(rest).scatter_(1, classes, kept)

    return _Divergence.apply(student, rows, temperature, target)


class _Divergence(torch.autograd.Function):
    """The mean over predictions of KL(p || q). The forward computes its gradient q - p, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, rows: Tensor | None, temperature: float, target: _Target) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        index = torch.arange(len(student), device=student.device) if rows is None else rows
        count = max(1, len(index))
        for start in range(0, len(index), CHUNK):
            where = slice(start, start + CHUNK)
            chunk = index[where]
            log_q = torch.log_softmax(student[chunk].to(dtype) / temperature, 1)
            log_p = target(where, chunk, log_q)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            if gradient is not None:
                gradient[chunk] = (log_q.exp_() - p).to(gradient.dtype)
        # The backward divides, after a GradScaler has multiplied: in float16 the gradient would vanish before.
        ctx.gradient, ctx.scale = gradient, 1 / (temperature * count)
        return (total / count).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Any) -> Any:
        if ctx.gradient is None:
            raise RuntimeError("Expected one backward pass through a divergence, which keeps nothing for a second one.")
        gradient, ctx.gradient = ctx.gradient, None
        # A Python number is not rounded to the gradient's type; it may be beyond the range of float16.
        return gradient.mul_(float(outputs[0] * ctx.scale)), None, None, None
