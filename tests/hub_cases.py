"""Compressed models of every family, made once, and ways to look at and tamper with their folders."""

from __future__ import annotations

import copy
import json
from functools import cache

import torch
from safetensors.torch import load_file, save_file
from tiny import aligned, causal_model, token_loader
from transformers import PreTrainedModel

from fasc_lightning import CompressionReport, compress
from fasc_lightning.layers import make_lowrank

IDS = torch.arange(3, 17).reshape(2, 7)


@cache
def _compressed(family, layout, keep, settings) -> tuple[PreTrainedModel, CompressionReport]:
    model = causal_model(family, **dict(settings)).eval()
    report = compress(model, list(token_loader(samples=16)), keep=keep, layout=layout, progress=False)
    return model, report


def compressed_with_report(family="llama", layout="auto", keep=0.7, **settings):
    """A compressed model of a family, free to be changed, and its report."""
    model, report = _compressed(family, layout, keep, tuple(settings.items()))
    return copy.deepcopy(model), report


def compressed(family="llama", layout="auto", **settings):
    """A compressed model of a family, free to be changed."""
    return compressed_with_report(family, layout, **settings)[0]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def assert_same(reloaded, model):
    assert not reloaded.training
    assert torch.equal(logits(aligned(reloaded)), logits(aligned(model)))
    assert_same_state(reloaded, model)


def assert_same_state(reloaded, model):
    got, expected = reloaded.state_dict(), model.state_dict()
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        assert torch.equal(got[key], value)


def assert_complete(info):
    assert {key: value for key, value in info.items() if value} == {}


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def make_truncated(linear, rank=6, layout="auto"):
    """A low-rank layer from the first singular directions of a linear layer."""
    U, S, Vh = torch.linalg.svd(linear.weight.detach())
    return make_lowrank(U[:, :rank] * S[:rank], Vh[:rank], linear.bias, layout)
