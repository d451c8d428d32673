"""Counts against the ratio of gradients: scaled by it, a loss has the gradient of the sum of its terms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fasc_lightning.batches import graph_alone
from fasc_lightning.batches._loss_graph import LossCount, count_terms

B, T, V = 3, 5, 7
SUM = {"reduction": "sum"}


@pytest.fixture
def z():
    torch.manual_seed(0)
    return torch.randn(B, T, V, dtype=torch.float64, requires_grad=True)


def labels(ignored: int = 4) -> torch.Tensor:
    y = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    y.view(-1)[:ignored] = -100
    return y


def ce(z, y=None, **options):
    y = labels() if y is None else y
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), **options)


def each(z):
    """Losses of the tokens, 0 of those that are ignored, and which are not."""
    return ce(z, reduction="none").view(B, T), (labels() != -100).double()


def by_hand(z):
    values, mask = each(z)
    return (values * mask).sum() / mask.sum()


def penalty(z):
    return 1e-4 * sum((part**2).sum() for part in torch.nn.Parameter(torch.ones(300)).split(1))


#: A loss, and the sum of its token losses as it is written down.
LOSSES = {
    "cross entropy": (ce, lambda z: ce(z, **SUM)),
    "over (samples, classes, length)": (lambda z: F.cross_entropy(z.transpose(1, 2), labels()), lambda z: ce(z, **SUM)),
    "with smoothing": (lambda z: ce(z, label_smoothing=0.1), lambda z: ce(z, label_smoothing=0.1, **SUM)),
    "with class weights": (
        lambda z: ce(z, weight=torch.arange(1.0, V + 1).double()),
        lambda z: ce(z, weight=torch.arange(1.0, V + 1).double(), **SUM),
    ),
    "sum over a count": (lambda z: ce(z, **SUM) / torch.tensor(11), lambda z: ce(z, **SUM)),
    "a sum": (lambda z: ce(z, **SUM), lambda z: ce(z, **SUM)),
    "masked by hand": (by_hand, lambda z: ce(z, **SUM)),
    "times one over a count": (lambda z: ce(z, reduction="none").sum() * (1 / 11), lambda z: ce(z, **SUM)),
    "selected": (lambda z: each(z)[0][each(z)[1].bool()].mean(), lambda z: ce(z, **SUM)),
    "dot product": (lambda z: torch.dot(each(z)[0].flatten(), each(z)[1].flatten()) / 11, lambda z: ce(z, **SUM)),
    "einsum": (lambda z: torch.einsum("bt,bt->", *each(z)) / 11, lambda z: ce(z, **SUM)),
    "mean of means": (lambda z: each(z)[0].mean(1).mean(), lambda z: ce(z, **SUM)),
    "along dimensions": (lambda z: each(z)[0].mean(-1, keepdim=True).sum() / B, lambda z: ce(z, **SUM)),
    "negative log likelihood": (
        lambda z: -z.log_softmax(-1).gather(-1, labels().clamp(min=0)[..., None]).mean(),
        lambda z: -z.log_softmax(-1).gather(-1, labels().clamp(min=0)[..., None]).sum(),
    ),
    "chunks of alike size": (
        lambda z: sum(F.cross_entropy(part, y) for part, y in zip(z, labels(0), strict=True)) / B,
        lambda z: ce(z, labels(0), **SUM),
    ),
    "stacked chunks": (
        lambda z: torch.stack([F.cross_entropy(part, y) for part, y in zip(z, labels(0), strict=True)]).mean(),
        lambda z: ce(z, labels(0), **SUM),
    ),
    "chunks by their share": (
        lambda z: ce(z[:1], labels(2)[:1]) * (3 / 13) + ce(z[1:], labels(2)[1:]) * (10 / 13),
        lambda z: ce(z, labels(2), **SUM),
    ),
    "squared errors": (lambda z: F.mse_loss(z, z.detach() + 1), lambda z: F.mse_loss(z, z.detach() + 1, **SUM)),
    "absolute errors": (lambda z: F.l1_loss(z, z.detach() + 1), lambda z: F.l1_loss(z, z.detach() + 1, **SUM)),
    "binary": (
        lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)),
        lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z), **SUM),
    ),
    "another type": (lambda z: ce(z).to(torch.float32)[None].squeeze(), lambda z: ce(z, **SUM)),
}


def gradient(loss, z):
    return torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_the_count_makes_a_sum_of_token_losses(z, name):
    loss, total = LOSSES[name]
    found = count_terms(loss(z))
    assert found is not None
    assert not found.empty
    torch.testing.assert_close(gradient(loss(z), z) * found.terms, gradient(total(z), z), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", ["cross entropy", "sum over a count", "masked by hand", "a sum", "squared errors"])
def test_what_others_did_to_the_loss_is_not_its_own(z, name):
    """Lightning divides by the batches of an accumulation, and a scaler multiplies."""
    loss = LOSSES[name][0]
    found = count_terms(loss(z) / 4 * torch.tensor(65536.0), factor=65536.0, divisor=4)
    assert found == pytest.approx(count_terms(loss(z)))


@pytest.mark.parametrize(
    "aux",
    [
        lambda z: 0.01 * (z.mean((0, 1)) ** 2).mean(),
        penalty,
        lambda z: 0.01 * F.mse_loss(z, z.detach()),
        lambda z: z.pow(2).sum() * 1e-3,
        lambda z: torch.zeros(()),
    ],
)
def test_auxiliary_losses_do_not_decide(z, aux):
    assert count_terms(ce(z) + aux(z)) == (11, False)
    assert count_terms(aux(z) + 0.5 * ce(z)) == (11, False)
    assert count_terms(by_hand(z) + penalty(z)) == (11, False)


def test_factors_belong_to_the_terms(z):
    assert count_terms(0.5 * ce(z)) == (11, False)
    assert count_terms(by_hand(z) * 0.5) == (11, False)
    log_variance = nn.Parameter(torch.zeros(()))
    assert count_terms(ce(z) * (-log_variance).exp() + log_variance) == (11, False)


def test_losses_without_a_target_are_empty(z):
    nothing = torch.full((B, T), -100)
    assert count_terms(ce(z, nothing)) == LossCount(0, True)
    assert count_terms(ce(z, nothing, **SUM) / 9) == LossCount(9, True)
    assert count_terms(ce(z, nothing) + 0.1 * z.mean()) == LossCount(0, True)
    assert count_terms(ce(z, nothing) + ce(z)) == LossCount(11, False)
    assert count_terms((each(z)[0] * 0).sum() / torch.tensor(0.0)) == LossCount(0, False)


def test_what_a_graph_does_not_tell_is_not_guessed(z):
    assert count_terms(each(z)[0].max()) is None
    assert count_terms(each(z)[0].logsumexp((0, 1))) is None
    assert count_terms(torch.zeros((), requires_grad=True)) is None
    assert count_terms(torch.zeros(())) is None
    assert count_terms(each(z)[0]) is None


def test_a_graph_is_read_and_not_run(z):
    calls = []

    def loss(z):
        calls.append(1)
        return ce(z * 2)

    found = checkpoint(loss, z, use_reentrant=False)
    assert count_terms(found) is None
    assert len(calls) == 1
    value = by_hand(z)
    expected = gradient(by_hand(z), z)
    count_terms(value)
    assert torch.equal(gradient(value, z), expected)
    assert z.grad is None


def test_a_deep_graph_ends(z):
    loss = ce(z)
    for _ in range(30_000):
        loss = loss + 1e-9 * z.mean()
    assert count_terms(loss) in (None, LossCount(11, False))


def test_a_graph_alone_holds_no_activations(z):
    packed = []
    with torch.no_grad(), graph_alone():
        for name in ("cross entropy", "masked by hand", "squared errors", "sum over a count"):
            loss = LOSSES[name][0](z)
            packed.append(count_terms(loss))
            assert float(loss.detach()) == pytest.approx(float(LOSSES[name][0](z).detach()))
            assert loss.grad_fn is not None
    assert packed == [(11, False), (11, False), (B * T * V, False), (11, False)]
