from __future__ import annotations

import pytest
import torch

from fasc_lightning.recovery._divergence import kl_divergence, top_k_divergence

pytest.importorskip("peft", reason="peft is not installed")


@pytest.mark.parametrize("rows", [None, [0, 3, 4]])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_its_gradient_are_those_of_the_definition(rows, temperature, monkeypatch):
    monkeypatch.setattr("fasc_lightning.recovery._divergence.CHUNK", 2)
    teacher, student = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    index = None if rows is None else torch.tensor(rows)
    found, expected = student.clone().requires_grad_(), student.clone().requires_grad_()
    (3 * kl_divergence(teacher, found, index, temperature)).backward()
    chosen = range(5) if rows is None else rows
    p, q = (torch.log_softmax(x[list(chosen)] / temperature, 1) for x in (teacher, expected))
    loss = (p.exp() * (p - q)).sum(1).mean()
    (3 * loss).backward()
    torch.testing.assert_close(kl_divergence(teacher, student, index, temperature), loss.detach())
    torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("rows", [None, [0, 2, 3]])
def test_divergence_over_the_largest_and_the_rest(rows, monkeypatch):
    monkeypatch.setattr("fasc_lightning.recovery._divergence.CHUNK", 2)
    teacher, student = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    chosen = list(range(4)) if rows is None else rows
    log_p, index = torch.log_softmax(teacher[chosen] / 2, 1).topk(3, 1)
    found, expected = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = top_k_divergence(log_p, index.int(), found, None if rows is None else torch.tensor(rows), temperature=2)
    p, q = (torch.softmax(x[chosen] / 2, 1) for x in (teacher, expected))
    p, q = (torch.cat([x.gather(1, index), 1 - x.gather(1, index).sum(1, keepdim=True)], 1) for x in (p, q))
    definition = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(loss, definition)
    loss.backward()
    definition.backward()
    torch.testing.assert_close(found.grad, expected.grad)
    # All classes: the whole divergence.
    log_p, index = torch.log_softmax(teacher[chosen], 1).topk(9, 1)
    among = torch.tensor(chosen)
    torch.testing.assert_close(top_k_divergence(log_p, index, student, among), kl_divergence(teacher, student, among))


def test_a_student_who_leaves_nothing_to_the_others_is_still_led_back():
    """In float32 1 minus what it gives to the largest is 0, and a logarithm of that leads nowhere."""
    student = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    loss = top_k_divergence(torch.tensor([[0.5]]).log(), torch.tensor([[0]]), student)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (-0.6931472 + 60 - 0.6931472) + 0.5 * -0.6931472, rel=1e-4)
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, -0.25, -0.25]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32_and_its_gradients_do_not_vanish(dtype):
    """As a GradScaler has it: the loss is multiplied before the way back."""
    count, scale = 4096, 2.0**16
    logits = [(3 * torch.randn(count, 32)).to(dtype) for _ in range(2)]
    teacher, student = logits[0], logits[1].requires_grad_()
    exact = student.detach().double().requires_grad_()
    p, q = torch.log_softmax(teacher.double(), 1), torch.log_softmax(exact, 1)
    expected = (p.exp() * (p - q)).sum(1).mean()
    expected.backward()
    log_p, index = p.float().topk(32, 1)
    for loss in (kl_divergence(teacher, student), top_k_divergence(log_p, index, student)):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        student.grad = None
        (loss * scale).backward()
        assert student.grad.dtype == dtype
        found = student.grad.double() / scale
        assert float((found - exact.grad).norm() / exact.grad.norm()) < 1e-2
    # One prediction: the scale is beyond what float16 holds, its gradient is not.
    student.grad = None
    loss = kl_divergence(teacher, student, torch.tensor([0]), temperature=4.0)
    (loss * scale).backward()
    assert torch.isfinite(student.grad).all()


def test_a_second_way_back_is_refused():
    loss = kl_divergence(torch.randn(2, 3), torch.randn(2, 3, requires_grad=True))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_nothing_that_counts_is_no_loss():
    student = torch.randn(2, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    assert kl_divergence(torch.randn(2, 3), student, none) == 0
    assert top_k_divergence(torch.zeros(0, 2), torch.zeros(0, 2), student, none) == 0
