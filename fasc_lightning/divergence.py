"""KL divergence of a student's predictions from a teacher's, for vocabularies whose logits fill the memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Predictions that are looked at together: for a vocabulary of 50 thousand, 50 MB each of a few temporary tensors.
CHUNK = 256


def kl_divergence(teacher: Tensor, student: Tensor, rows: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Return the mean over predictions of KL(softmax(teacher / T) || softmax(student / T)).

    Beside the logits it holds one tensor of their size, the gradient.

    Args:
        teacher: Logits (N, classes).
        student: Logits (N, classes); differentiable.
        rows: Indices of the predictions that count, (n,); None if all do.
        temperature: T.

    Returns:
        Scalar, float32; 0 if nothing counts.
    """
    return _Divergence.apply(teacher, student, rows, temperature)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, rows: Tensor | None, temperature: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[1] else None
        index = torch.arange(len(student), device=student.device) if rows is None else rows
        count = max(1, len(index))
        for chunk in index.split(CHUNK):
            log_p = torch.log_softmax(teacher[chunk].float() / temperature, 1)
            log_q = torch.log_softmax(student[chunk].float() / temperature, 1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            if gradient is not None:
                gradient[chunk] = ((log_q.exp_() - p) / (temperature * count)).to(gradient.dtype)
        ctx.gradient = gradient
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        return None, ctx.gradient * outputs[0].to(ctx.gradient.dtype), None, None


def top_k_divergence(
    log_p: Tensor, index: Tensor, student: Tensor, rows: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Return the mean divergence over k + 1 outcomes: the teacher's k most probable classes, and all others as one.

    Args:
        log_p: The teacher's log probabilities at temperature T, (n, k).
        index: Of which classes, (n, k).
        student: Logits (N, classes); differentiable.
        rows: Indices of the n predictions that count; None if all N do.
        temperature: T.

    Returns:
        Scalar, float32; 0 if nothing counts.
    """
    if len(log_p) == 0:
        return student.sum() * 0.0
    scaled = (student if rows is None else student[rows]).float() / temperature
    log_q = scaled.gather(1, index.long()) - scaled.logsumexp(1, keepdim=True)
    p = log_p.exp()
    rest_p, rest_q = _rest(log_p), _rest(log_q)
    named = (p * (log_p - log_q)).sum(1)
    others = rest_p.exp() * (rest_p - rest_q)
    return (named + others).mean()


def _rest(log_p: Tensor) -> Tensor:
    """Return the log of what probabilities (n, k) leave of 1, (n,), away from log 0."""
    left = 1 - log_p.exp().sum(1)
    return left.clamp(min=1e-7).log()
