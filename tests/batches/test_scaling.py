"""G of fits against brute force: gradients of the sum of the token losses, each from its own plain backward pass."""

from __future__ import annotations

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from inside import moments_of
from tiny import VOCABULARY, causal_model
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fasc_lightning import CausalLMModule, FascCallback, compress, score
from fasc_lightning.batches import LossScales, TokenRows, loss_terms_of, reads_loss, replayed_rows
from fasc_lightning.batches._tokens import LossScale
from fasc_lightning.recovery._validation import held_out_loss

IGNORED = -100


def sequences(lengths=((6, 9, 2), (16, 16, 16), (3, 4, 16)), prompt: int = 1):
    """Batches of unequal numbers of labels, padded, with prompts that are not predicted."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for sizes in lengths:
        ids = torch.randint(3, VOCABULARY, (len(sizes), 16), generator=generator)
        mask = torch.arange(16) < torch.tensor(sizes)[:, None]
        labels = ids.masked_fill(~mask, IGNORED)
        labels[:, :prompt] = IGNORED
        batches.append({"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels})
    return batches


class Own(pl.LightningModule):
    """A module of the user's around a language model, without `loss_terms`; each batch has a loss of its own kind."""

    def __init__(self, model: nn.Module, kind: str = "cross_entropy") -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def training_step(self, batch, batch_idx):
        if self.kind == "transformers":
            return {"loss": self.model(**batch).loss}
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        if self.kind == "cross_entropy":
            return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
        values = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        mask = (targets != IGNORED).float()
        if self.kind == "by hand":
            return (values * mask).sum() / mask.sum().clamp(min=1)
        if self.kind == "with aux":
            return (values * mask).sum() / mask.sum() + 1e-4 * sum(p.pow(2).mean() for p in self.parameters())
        if self.kind == "sum":
            return values.sum()
        assert self.kind == "unknown"
        return Hidden.apply(values, mask)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Hidden(torch.autograd.Function):
    """A fused loss, of which the graph tells nothing."""

    @staticmethod
    def forward(ctx, values, mask):
        ctx.save_for_backward(mask)
        return (values * mask).sum() / mask.sum()

    @staticmethod
    def backward(ctx, gradient):
        (mask,) = ctx.saved_tensors
        return gradient * mask / mask.sum(), None


class Gathered(FascCallback):
    """Keeps the moments that the calibration ends with."""

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        moments = moments_of(self)
        self.found = {name: (moments.layer(name).G.double(), moments.tokens(name)) for name in moments.shapes}


def gathered(module, batches, accumulate=1, precision="32-true", plugins=None, **options):
    options = {"keep": 0.7, "method": "fasc-plain", "allocation": "fisher", "refit": False} | options
    options = {"update_weights": False} | options
    callback = Gathered(**options)
    settings = {"plugins": plugins} if plugins else {"precision": precision}
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[callback],
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
        **settings,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return callback.found


def truth(model, batches, prefix, masked=False):
    """G of each layer from recorded gradients of sums of token losses."""
    model = copy.deepcopy(model).eval().double()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    rows = {name: [] for name in layers}
    for batch in batches:
        outputs = {}

        def record(module, args, output, outputs=outputs):
            output.retain_grad()
            outputs[module] = output

        handles = [layer.register_forward_hook(record) for layer in layers.values()]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:].reshape(-1)
        F.cross_entropy(logits[:, :-1].reshape(len(targets), -1), targets, reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            h = outputs[layer].grad.reshape(-1, outputs[layer].shape[-1])
            rows[name].append(h[batch["attention_mask"].bool().flatten()] if masked else h)
    return {
        f"{prefix}{n}": (torch.cat(h).T @ torch.cat(h) / len(torch.cat(h)), len(torch.cat(h))) for n, h in rows.items()
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, (G, tokens) in expected.items():
        assert found[name][1] == tokens
        torch.testing.assert_close(found[name][0], G, rtol=1e-3, atol=1e-3 * G.abs().max().item())


@pytest.mark.parametrize("kind", ["cross_entropy", "by hand", "with aux", "sum", "transformers"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_moments_of_modules_without_loss_terms(kind, accumulate):
    module, batches = Own(causal_model(), kind), sequences()
    expected = truth(module.model, batches, "model.")
    assert_same(gathered(module, batches, accumulate), expected)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_num_items_in_batch_is_what_the_model_divides_by(as_tensor, accumulate):
    module, batches = CausalLMModule(causal_model()), sequences()
    expected = truth(module.model, batches, "model.", masked=True)
    labels = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
    for i, batch in enumerate(batches):
        count = sum(labels) if accumulate == 3 else labels[i] + 5
        batch["num_items_in_batch"] = torch.tensor(count) if as_tensor else count
    assert_same(gathered(module, batches, accumulate), expected)


def test_num_items_reach_a_module_of_the_users_own():
    module, batches = Own(causal_model(), "transformers"), sequences()
    expected = truth(module.model, batches, "model.")
    batches = [{**batch, "num_items_in_batch": 70} for batch in batches]
    assert_same(gathered(module, batches, 2), expected)


def test_shifted_labels_of_the_loader_are_counted():
    module = CausalLMModule(causal_model())
    batch = sequences()[0]
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    shifted[0] = IGNORED
    terms = int((shifted != IGNORED).sum())
    assert module.loss_terms({**batch, "shift_labels": shifted}) == terms != module.loss_terms(batch)
    loss = module._loss({**batch, "shift_labels": shifted})
    assert loss.grad_fn._saved_total_weight == terms


def test_prompts_of_a_mask_are_not_terms():
    """A module that tells padding by a mask, and predicts answers alone."""
    module, batches = Own(causal_model()), sequences(prompt=3)
    expected = truth(module.model, batches, "model.", masked=True)
    found = gathered(module, batches, token_mask=lambda batch: batch["attention_mask"].bool())
    assert_same(found, expected)


def test_a_gradient_scaler_is_divided_out():
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    module, batches = Own(causal_model(), "sum"), sequences()
    expected = truth(module.model, batches, "model.")
    found = gathered(module, batches, 2, plugins=[plugin])
    for name, (G, _) in expected.items():
        assert float(found[name][0].trace() / G.trace()) == pytest.approx(1, rel=0.05)  # of half-precision products


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss])
def test_elementwise_losses_are_sums_of_their_elements(loss):
    class Regression(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

        def training_step(self, batch, batch_idx):
            return loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    torch.manual_seed(0)
    module = Regression()
    net = copy.deepcopy(module.net)
    batches = [(torch.randn(n, 5, 6), torch.randn(n, 5, 4)) for n in (1, 7, 3)]
    found = gathered(module, batches)
    rows = []
    for x, y in batches:
        output = net(x).detach().requires_grad_()
        loss(output, y, reduction="sum").backward()
        rows.append(output.grad.reshape(-1, 4).double())
    h = torch.cat(rows)
    torch.testing.assert_close(found["net.2"][0], h.T @ h / len(h), rtol=1e-4, atol=1e-6)


# What is not known.


def test_a_loss_of_unknown_terms_warns_once_with_the_remedy():
    module, batches = Own(causal_model(), "unknown"), sequences()
    with pytest.warns(UserWarning, match=r"mean over 3 samples, each of 16 tokens.*HINT: give `loss_terms`") as caught:
        gathered(module, batches)
    assert sum("loss_terms" in str(warning.message) for warning in caught) == 1
    terms = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
    by_ids = {batch["input_ids"].sum().item(): count for batch, count in zip(batches, terms, strict=True)}
    module = Own(causal_model(), "unknown")
    expected = truth(module.model, batches, "model.")
    found = gathered(module, batches, loss_terms=lambda batch: by_ids[batch["input_ids"].sum().item()])
    assert_same(found, expected)


def test_prompts_in_the_mask_of_an_unknown_loss_warn():
    module, batches = Own(causal_model(), "unknown"), sequences(prompt=3)
    with pytest.warns(UserWarning, match="tokens of the mask, some of which have the label -100"):
        gathered(module, batches, token_mask=lambda batch: batch["attention_mask"].bool())


def test_what_is_asked_for_counts():
    module, batch = Own(causal_model()), sequences()[0]
    loss = module.training_step(batch, 0)
    for asked, terms in (("sum", 1.0), (lambda batch: 5, 5.0), ("mean", 14.0), (None, 14.0)):
        assert loss_terms_of(module, batch, token_mask=None, loss_terms=asked, loss=loss) == terms
        rows = replayed_rows(module, batch, token_mask=None, loss_terms=asked)
        assert rows.take_loss(loss).scale == rows.scale == terms
    with pytest.raises(ValueError, match="loss_terms"):
        loss_terms_of(module, "text", token_mask=None, loss_terms="mean")
    assert loss_terms_of(module, "text", token_mask=None, loss_terms="mean", loss=loss) == 14


def test_of_several_losses_of_a_batch_the_most_terms_count():
    """And a batch is left out while a loss without a term goes backwards, and then no more."""
    scales = iter([LossScale(8.0), LossScale(0.0, True), LossScale(32.0), LossScale(4.0)])
    rows = TokenRows(scale=100.0, scale_of=lambda loss: next(scales))
    found = []
    for _ in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LossScales().take(torch.zeros(()), rows)
        found.append((rows.scale, rows.overflowed))
    assert found[0] == (8.0, False)
    assert found[1][1]
    assert found[2:] == [(32.0, False), (32.0, False)]


# Batches without a term.


@pytest.mark.parametrize("wrap", [CausalLMModule, Own, lambda m: Own(m, "by hand"), lambda m: Own(m, "with aux")])
@pytest.mark.parametrize("allocation", ["fisher", "measured"])
def test_batches_without_labels_are_left_out(wrap, allocation):
    batches = sequences()
    empty = {**batches[0], "labels": torch.full((3, 16), IGNORED)}
    expected = gathered(wrap(causal_model()), batches, allocation=allocation)
    module = wrap(causal_model())
    with pytest.warns(UserWarning, match=r"batch 1 of epoch 0 on rank 0 has no term \(is each of its labels") as caught:
        found = gathered(module, [batches[0], empty, *batches[1:], empty], allocation=allocation)
    assert sum("has no term" in str(warning.message) for warning in caught) == 1
    assert_same(found, expected)


def test_replays_and_scores_leave_them_out_too():
    batches = [batch for seed in range(3) for batch in sequences()]
    empty = {**batches[0], "labels": torch.full((3, 16), IGNORED)}
    settings = {"keep": 0.6, "progress": False, "refit": True}
    expected = compress(causal_model(), batches, **settings)
    with pytest.warns(UserWarning, match="has no term"):
        report = compress(causal_model(), [empty, *batches], **settings)
    assert report.plan == expected.plan
    assert report.refit["loss"] == expected.refit["loss"]
    plain = score(causal_model(), batches)
    with pytest.warns(UserWarning, match="has no term"):
        scored = score(causal_model(), [empty, *batches])
    assert [row["rho"] for row in scored] == [row["rho"] for row in plain]


def test_a_fit_of_such_batches_alone_errs():
    empty = [{**batch, "labels": torch.full((3, 16), IGNORED)} for batch in sequences()]
    model = causal_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="has no term"), pytest.raises(RuntimeError, match="No gradient reached any"):
        compress(model, empty, keep=0.7, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_that_is_not_finite_with_labels_still_ends_the_fit():
    class Diverged(Own):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    with pytest.raises(FloatingPointError, match="finite loss"):
        gathered(Diverged(causal_model()), sequences())


def test_held_out_batches_weigh_by_their_terms():
    module, batches = Own(causal_model()), sequences()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    found = held_out_loss(
        trainer,
        module,
        [*batches, {**batches[0], "labels": torch.full((3, 16), IGNORED)}],
        lambda batch, loss: loss_terms_of(module, batch, token_mask=None, loss_terms=None, loss=loss),
        lambda batch: reads_loss(module, batch, token_mask=None, loss_terms=None),
    )
    module.eval()
    with torch.no_grad():
        losses = torch.stack([module.training_step(batch, 0) for batch in batches])
    terms = torch.tensor([float((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches])
    assert found == pytest.approx(float((losses * terms).sum() / terms.sum()), rel=1e-6)
