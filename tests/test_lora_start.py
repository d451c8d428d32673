from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from layer_moments import full_moments
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import causal_model, mlp
from torch import nn

from fasc_lightning import compress, lora_start
from fasc_lightning.lora_start import balanced
from fasc_lightning.solvers import SHRINK_A, SHRINK_COUPLED_G
from fasc_lightning.studies.pruning import prune_magnitude

peft = pytest.importorskip("peft", reason="peft is not installed")

module = sys.modules["fasc_lightning.lora_start"]

# peft's own use of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(64, (2, 16), generator=generator)} for _ in range(count)]


def pair(family="llama"):
    """A dense model, and one whose weights are rounded to multiples of 0.1."""
    dense = causal_model(family, initializer_range=0.2).eval()
    rounded = copy.deepcopy(dense)
    for name, parameter in rounded.named_parameters():
        if parameter.ndim == 2 and not any(word in name for word in ("embed", "wte", "wpe", "lm_head")):
            parameter.data = (parameter.data * 10).round() / 10
    return dense, rounded


def rows_of(model, name, data):
    """Inputs and gradients of the mean loss's terms at the outputs of a layer, by autograd, in float64."""
    model = copy.deepcopy(model).double()
    xs, hs = [], []

    def see(module, args, output):
        xs.append(args[0])
        output.register_hook(hs.append)

    model.get_submodule(name).register_forward_hook(see)
    for batch in data:
        ids = batch["input_ids"]
        logits = model(input_ids=ids).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    return torch.cat([x.flatten(0, 1) for x in xs]).detach(), torch.cat([h.flatten(0, 1) for h in hs])


def shrunk(S, amount):
    return (1 - amount) * S + amount * np.trace(S) / len(S) * np.eye(len(S))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"])
def test_the_start_is_the_closed_form_by_scipy_from_autograd(name):
    dense, rounded = pair()
    start = lora_start(rounded, dense, batches(), r=4, progress=False)
    W, other = (model.get_submodule(name).weight.detach().double() for model in (dense, rounded))
    x, h = rows_of(dense, name, batches())
    A, G = (S.numpy() for S in full_moments(x, h, W).coupled)
    root_A, root_G = (
        scipy.linalg.sqrtm(shrunk(S, amount)).real for S, amount in ((A, SHRINK_A), (G, SHRINK_COUPLED_G))
    )
    U, s, V = np.linalg.svd(root_G @ (W - other).numpy() @ root_A)
    best = np.linalg.inv(root_G) @ (U[:, :4] * s[:4]) @ V[:4] @ np.linalg.inv(root_A)
    found = start.layers[name]
    torch.testing.assert_close((found.B @ found.A).double(), torch.from_numpy(best), rtol=2e-3, atol=2e-4)
    assert found.left / found.loss == pytest.approx((s[4:] ** 2).sum() / (s**2).sum(), rel=1e-3)
    assert 0 < start.removed < 1
    assert f"rank 4 on {len(start.layers)} layers" in str(start)


def test_the_factors_share_the_singular_values():
    left, right = torch.randn(7, 3) * 100, torch.randn(3, 9)
    B, A = balanced(left, right)
    torch.testing.assert_close(B @ A, left @ right)
    torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-5, atol=1e-3)  # the products are some 100


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_puts_the_folder_on_the_model(tmp_path, family):
    dense, rounded = pair(family)
    before = {name: value.clone() for name, value in rounded.state_dict().items()}
    start = lora_start(rounded, dense, batches(), r=4, progress=False)
    folder = start.save(tmp_path / "start", base_model="some/model")
    assert all(torch.equal(value, before[name]) for name, value in rounded.state_dict().items())
    ids = batches(1)[0]["input_ids"]
    with torch.no_grad():
        target, plain = dense(input_ids=ids).logits, rounded(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(rounded), folder, is_trainable=True)
        logits = adapted(input_ids=ids).logits
    assert (logits - target).norm() < 0.9 * (plain - target).norm()
    assert adapted.peft_config["default"].base_model_name_or_path == "some/model"
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {
        f"base_model.model.{name}.lora_{side}.default.weight" for name in start.layers for side in "AB"
    }
    merged = adapted.merge_and_unload()
    name = next(iter(start.layers))
    weight = merged.get_submodule(name).weight
    change = weight - rounded.get_submodule(name).weight
    found = start.layers[name].B @ start.layers[name].A
    torch.testing.assert_close(change, found.T if family == "gpt2" else found)


def test_a_full_rank_gives_the_dense_model_back():
    dense, rounded = pair()
    start = lora_start(rounded, dense, batches(), r=16, targets=["v_proj"], progress=False)
    for name, layer in start.layers.items():
        whole = rounded.get_submodule(name).weight + layer.B @ layer.A
        torch.testing.assert_close(whole, dense.get_submodule(name).weight, rtol=1e-4, atol=1e-4)
    assert start.removed == pytest.approx(1)


def test_pruned_layers_and_layers_of_other_classes_are_read():
    dense = causal_model().eval()
    pruned = copy.deepcopy(dense)
    prune_magnitude(pruned, 0.5)

    class Half(nn.Module):
        """A layer without a weight of its own: its numbers are in a buffer of int8."""

        def __init__(self, layer):
            super().__init__()
            self.register_buffer("codes", (layer.weight * 100).round().to(torch.int8))

        def forward(self, x):
            return x @ (self.codes.to(x.dtype) / 100).T

    pruned.model.layers[0].mlp.up_proj = Half(dense.model.layers[0].mlp.up_proj)
    start = lora_start(pruned, dense, batches(), r=2, progress=False)
    assert "model.layers.0.mlp.up_proj" in start.layers
    assert all(layer.left < layer.loss for layer in start.layers.values())


def test_both_models_are_left_as_they_were():
    dense, rounded = pair()
    dense.train()
    rounded.train()
    flags = [p.requires_grad for p in dense.parameters()]
    lora_start(rounded, dense, batches(), r=2, progress=False)
    assert all(module.training for model in (dense, rounded) for module in model.modules())
    assert [p.requires_grad for p in dense.parameters()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())
    assert all(p.grad is None for p in dense.parameters())


def test_what_cannot_be_started_is_refused_before_any_work(monkeypatch):
    dense, rounded = pair()
    monkeypatch.setattr(module, "run_fit", None)
    with pytest.raises(ValueError, match="differs from the dense one"):
        lora_start(copy.deepcopy(dense), dense, batches())
    with pytest.raises(ValueError, match="`r` from 1"):
        lora_start(rounded, dense, batches(), r=17)
    with pytest.raises(ValueError, match="`r` from 1"):
        lora_start(rounded, dense, batches(), r=0)
    with pytest.raises(ValueError, match="none of this name"):
        lora_start(mlp(), dense, batches())
    with pytest.raises(TypeError, match="carries one"):
        lora_start(peft.get_peft_model(rounded, peft.LoraConfig(target_modules=["v_proj"])).base_model.model, dense, [])
    narrow = copy.deepcopy(dense)
    narrow.model.layers[0].mlp.up_proj = nn.Linear(3, 5)
    with pytest.raises(ValueError, match=r"up_proj' to take inputs of shape"):
        lora_start(narrow, dense, batches())


def test_layers_of_low_rank_are_trained_by_a_recovery():
    dense, rounded = pair()
    compress(rounded, batches(), keep=0.8, refit=False, progress=False)
    with pytest.raises(TypeError, match="recover"):
        lora_start(rounded, dense, batches(), r=2)


def test_a_dense_model_without_a_loss_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises((TypeError, MisconfigurationException)):
        lora_start(nn.Sequential(nn.Linear(8, 8)), model, [torch.randn(2, 8)], r=2, progress=False)
