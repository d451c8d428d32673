"""Every architecture family through Trainer(callbacks=[FascCallback(rank=0.5)])."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import FAMILIES, Classifier, Patches, causal_module, feature_loader, mlp, token_loader
from torch import nn
from torch.utils.data import DataLoader

from fasc_lightning import FascCallback
from fasc_lightning.layers import compressed_layers


def fit(make_trainer, module, loader):
    callback = FascCallback(rank=0.5)
    before = sum(p.numel() for p in module.parameters())
    make_trainer(callback).fit(module, loader)
    report = callback.report
    budget = sum(k * (m + n - k) for m, n in (r.shape for r in report.layers) for k in [round(min(m, n) / 2)])
    weights = {r.name: r for r in report.layers}
    kept = sum(
        r.rank * (sum(r.shape) - r.rank) if r.layout == "pivot" else r.shape[0] * r.shape[1] for r in report.layers
    )
    assert kept <= budget
    # What the layers really hold is what the ranks promise.
    layers = compressed_layers(module)
    assert layers
    for name, layer in layers.items():
        biases = 0 if layer.bias is None else layer.out_features
        assert sum(p.numel() for p in layer.parameters()) - biases == layer.rank * (
            layer.in_features + layer.out_features - layer.rank
        )
        assert weights[name].rank == layer.rank
    saved = sum(r.shape[0] * r.shape[1] for r in report.layers) - kept
    assert sum(p.numel() for p in module.parameters()) == before - saved
    return report


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_causal_families(make_trainer, family):
    module = causal_module(family)
    fit(make_trainer, module, token_loader(samples=32, padded=True))
    module.eval()
    ids = torch.randint(3, 60, (2, 7))
    assert torch.isfinite(module.model(ids).logits).all()
    generated = module.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert generated.shape[0] == 2
    assert 7 < generated.shape[1] <= 10


def test_bert_classifier(make_trainer):
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=3,
    )

    class BertModule(Classifier):
        def training_step(self, batch, batch_idx):
            return self.net(**batch).loss

        def token_mask(self, batch):
            return batch["attention_mask"].bool()

        def loss_terms(self, batch):
            return len(batch["labels"])

    data = token_loader(samples=32, padded=True).dataset
    samples = [{**data[i], "labels": torch.tensor(i % 3)} for i in range(len(data))]
    module = BertModule(transformers.BertForSequenceClassification(config).train())
    report = fit(make_trainer, module, DataLoader(samples, batch_size=4))
    tokens = {row.name.rsplit(".", 1)[-1]: row.tokens for row in report.layers}
    assert tokens["query"] == int(data.attention_mask.sum())
    assert tokens["classifier"] == 32
    logits = module.net(data.input_ids, attention_mask=data.attention_mask).logits
    assert logits.shape == (32, 3)


def test_mlp_classifier(make_trainer):
    module = mlp()
    fit(make_trainer, module, feature_loader())
    assert module(torch.randn(4, 12)).shape == (4, 3)


def test_small_vision_model(make_trainer):
    module = Classifier(nn.Sequential(Patches()))
    report = fit(make_trainer, module, feature_loader((1, 16, 16)))
    tokens = {row.name.rsplit(".", 1)[-1]: row.tokens for row in report.layers}
    assert tokens == {"up": 32 * 16, "down": 32 * 16, "head": 32}
    assert module(torch.randn(2, 1, 16, 16)).shape == (2, 3)
