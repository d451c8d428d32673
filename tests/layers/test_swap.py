import pytest
import torch
from lowrank_cases import case, conv1d, random
from torch import nn

from fasc_lightning.layers import (
    LowRankLinear,
    PivotedLinear,
    compressed_layers,
    is_compressed,
    swap_modules,
    swap_to_dense,
)


class Tied(nn.Module):
    """A block held under two names, and a layer inside it held under two more."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        self.first = block
        self.second = block
        self.shortcut = block[0]
        self.layers = nn.ModuleList([nn.Linear(6, 6), conv1d(6, 6)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.second(self.first(x)) + self.shortcut(x).sum()


def test_swap_replaces_every_occurrence_and_back():
    model = Tied().eval()
    x = torch.randn(2, 6)
    before, old, names = model(x), model.shortcut, list(model.state_dict())
    new = LowRankLinear(6, 8, 2)
    replaced = swap_modules(model, {"second.0": new, "layers.1": PivotedLinear(6, 6, 2)})
    assert replaced["second.0"] is old
    assert model.first[0] is model.second[0] is model.shortcut is new
    assert isinstance(model.layers[1], PivotedLinear)
    assert is_compressed(model)
    assert not torch.equal(model(x), before)
    assert list(compressed_layers(model)) == ["first.0", "layers.1"]
    swap_modules(model, replaced)
    assert model.shortcut is old
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == names
    assert not is_compressed(model)


def test_swap_keeps_mode_dtype_and_flags():
    model = Tied().bfloat16()
    model.layers.eval()
    model.first.requires_grad_(False)
    frozen = LowRankLinear(6, 6, 2).requires_grad_(False)
    swap_modules(model, {"layers.0": frozen, "first.0": PivotedLinear(6, 8, 2)})
    assert not model.layers[0].training
    assert not any(module.training for module in model.layers[0].modules())
    assert model.first[0].training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.first[0].permutation.dtype == torch.int32
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in model.first[0].parameters())


def test_swap_onto_a_meta_model_keeps_the_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8))
    swap_modules(model, {"0": LowRankLinear(6, 8, 2)})
    assert model[0].factor_in.weight.device.type == "cpu"


@pytest.mark.parametrize(
    ("replacements", "error", "message"),
    [
        ({"layers.0": LowRankLinear(6, 6, 2), "layers.7": nn.Linear(6, 6)}, KeyError, "'layers.7'"),
        ({"layers.0": LowRankLinear(6, 6, 2), "": nn.Linear(6, 6)}, ValueError, "the model itself"),
        ({"layers.0": LowRankLinear(6, 6, 2), "first.0": nn.Linear(6, 9)}, ValueError, r"\(8, 6\).*\(9, 6\)"),
        ({"first.0": nn.Linear(6, 8), "second.0": nn.Linear(6, 8)}, ValueError, "second name"),
        ({"first": nn.Identity(), "second.0": nn.Linear(6, 8)}, ValueError, "inside 'first'"),
    ],
)
def test_swap_rejects_and_changes_nothing(replacements, error, message):
    model = Tied()
    before = dict(model.named_modules(remove_duplicate=False))
    with pytest.raises(error, match=message):
        swap_modules(model, replacements)
    assert dict(model.named_modules(remove_duplicate=False)) == before


def test_swap_restores_the_model_when_it_fails_midway():
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def __setattr__(self, name, value):
            if isinstance(value, LowRankLinear):
                raise RuntimeError("no")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.Linear(6, 6), Stubborn(), nn.Linear(6, 6))
    before = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="no"):
        swap_modules(model, {name: LowRankLinear(6, 6, 2) for name in ("0", "1.layer", "2")})
    assert dict(model.named_modules()) == before


def test_to_dense_keeps_the_function():
    model = Tied().double().eval()
    compressed = {"first.0": case("pivot", 8, 6, 3)[0], "layers.1": case("factors", 6, 6, 3)[0]}
    swap_modules(model, compressed)
    model.layers[1].requires_grad_(False)
    x = random(2, 6)
    before = model(x)
    replaced = swap_to_dense(model)
    assert replaced == compressed
    assert not is_compressed(model)
    assert type(model.layers[1]) is type(conv1d(6, 6))  # as it was
    assert type(model.first[0]) is nn.Linear
    assert model.first[0] is model.shortcut
    assert torch.allclose(model(x), before, atol=1e-12)
    assert not model.shortcut.training
    assert model.shortcut.weight.requires_grad
    assert not model.layers[1].weight.requires_grad
    assert swap_to_dense(model) == {}
