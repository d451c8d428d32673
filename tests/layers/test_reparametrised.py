"""Layers whose weight is computed from other tensors: compressed without a trace, and dense again from a checkpoint."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.data import DataLoader, TensorDataset

from fasc_lightning import FascCallback, apply_plan, compress, match_checkpoint
from fasc_lightning.layers import (
    CompressedLinear,
    DenseForm,
    compressed_layers,
    linear_weight,
    swap_modules,
    swap_to_dense,
    trains_weight,
)
from fasc_lightning.layers._reparametrised import computed_weight, is_reparametrised
from fasc_lightning.models import quantize

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*compressed layers and is dense now"),
]


class Halved(nn.Module):
    """A parametrisation of somebody's own: a gain that no checkpoint holds, and one that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("share", torch.tensor(0.5), persistent=False)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return weight * self.share * self.gain


def halved(layer):
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


def twice(layer):
    return parametrizations.spectral_norm(parametrizations.weight_norm(layer))


def pruned(layer):
    prune.random_unstructured(layer, "weight", 0.3)
    return prune.l1_unstructured(layer, "weight", 0.2)


#: Of each mechanism one layer, and how it is made.
KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "cayley": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
    "own": halved,
    "twice": twice,
    "old_weight_norm": nn.utils.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "pruned": pruned,
}


class Net(pl.LightningModule):
    def __init__(self, kind="weight_norm", bias=True) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(12, 24), nn.ReLU(), KINDS[kind](nn.Linear(24, 24, bias=bias)), nn.ReLU(), nn.Linear(24, 3)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader():
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


def made(kind, seed=0, **options):
    torch.manual_seed(seed)
    return Net(kind, **options)


def outputs(module):
    module.eval()
    with torch.no_grad():
        return module(torch.linspace(-1, 1, 24).reshape(2, 12))


@pytest.mark.parametrize("kind", KINDS)
def test_reads_leave_nothing_behind(kind):
    layer = KINDS[kind](nn.Linear(6, 5)).train()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert is_reparametrised(layer)
    first = linear_weight(layer).detach().clone()
    assert torch.equal(linear_weight(layer), first)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(module.training for module in layer.modules())
    layer.eval()(torch.zeros(1, 6))
    assert torch.equal(layer.weight, first)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_that_of_the_present_numbers(kind):
    layer = KINDS[kind](nn.Linear(6, 6, bias=False))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
    weight = linear_weight(layer).detach()  # older hooks have not run since
    layer.eval()
    assert torch.allclose(layer(torch.eye(6)).T, weight, atol=1e-6)


def test_a_read_does_not_fill_the_cache_of_the_layers_own_calls():
    layer = parametrizations.spectral_norm(nn.Linear(6, 5)).train()
    other = copy.deepcopy(layer)
    with parametrize.cached():
        computed_weight(layer)
        mine = layer.weight
    with parametrize.cached():
        theirs = other.weight
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_flags_are_those_of_what_the_weight_is_computed_from(kind):
    layer = KINDS[kind](nn.Linear(6, 5))
    with torch.no_grad():
        layer(torch.zeros(1, 6))  # the weight that a hook sets here requires no gradient
    assert trains_weight(layer)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == "bias")
    assert not trains_weight(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_goes_back_to_its_dense_checkpoint(kind, make_trainer, tmp_path):
    module = made(kind)
    checkpoint = ModelCheckpoint(tmp_path, filename="best", save_last=False)
    trainer = make_trainer(
        FascCallback(keep=0.7), checkpoint, max_epochs=1, enable_checkpointing=True, limit_val_batches=2
    )
    trainer.fit(module, loader(), loader())
    saved = torch.load(checkpoint.best_model_path, weights_only=False)["state_dict"]
    assert isinstance(module.net[2], CompressedLinear)
    assert all(p.requires_grad for p in module.parameters())
    expected = made(kind, seed=1)
    expected.load_state_dict(saved)
    small = copy.deepcopy(module.state_dict())
    trainer.test(module, loader(), ckpt_path=checkpoint.best_model_path, verbose=False, weights_only=False)
    assert type(module.net[2]) is not nn.Linear or is_reparametrised(module.net[2])
    assert module.state_dict().keys() == saved.keys()
    assert torch.equal(outputs(module), outputs(expected))
    assert all(p.requires_grad for p in module.parameters())
    module.train()  # it is trained on as one
    module(torch.zeros(1, 12)).sum().backward()
    # And the factors come back over it.
    match_checkpoint(module, {"state_dict": small})
    module.load_state_dict(small)
    assert isinstance(module.net[2], CompressedLinear)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_computes_what_it_would_without_a_calibration(kind, make_trainer):
    modules = made(kind), made(kind)
    for module, callbacks in zip(modules, ([FascCallback(keep=0.7)], []), strict=True):
        make_trainer(*callbacks, max_epochs=1, limit_val_batches=0).fit(module, loader())
    mine, theirs = (m.net[0] for m in modules)
    # All layers are compressed at the end; the bias of the first has been through every step of the fit.
    assert torch.equal(mine.bias, theirs.bias)


@pytest.mark.parametrize("kind", ["weight_norm", "old_weight_norm", "pruned"])
@pytest.mark.parametrize("bias", [True, False])
def test_through_every_later_change_of_the_layer(kind, bias):
    module = made(kind, bias=bias)
    dense = {name: value.clone() for name, value in module.state_dict().items()}
    expected = outputs(module)
    apply_plan(module, {"net.2": {"rank": 5, "layout": "pivot"}})
    quantize(module)
    module = copy.deepcopy(module)
    swap_to_dense(module)
    assert type(module.net[2]) is nn.Linear
    assert not is_reparametrised(module.net[2])
    match_checkpoint(module, {"state_dict": dense})
    module.load_state_dict(dense)
    assert torch.equal(outputs(module), expected)


def test_frozen_parts_stay_frozen_and_types_are_kept():
    module = made("weight_norm").to(torch.bfloat16)
    original = module.net[2].parametrizations.weight.original0.requires_grad_(False)
    state = module.state_dict()
    apply_plan(module, {"net.2": {"rank": 5, "layout": "factors"}})
    match_checkpoint(module, {"state_dict": state})
    parts = dict(module.net[2].named_parameters())
    assert {name: p.requires_grad for name, p in parts.items()} == {
        "bias": True,
        "parametrizations.weight.original0": False,
        "parametrizations.weight.original1": True,
    }
    assert {p.dtype for p in parts.values()} == {torch.bfloat16}
    assert parts["parametrizations.weight.original0"] is not original


@pytest.mark.parametrize("kind", KINDS)
def test_a_form_holds_no_weights_and_pickles_empty(kind):
    layer = KINDS[kind](nn.Linear(64, 64))
    form = DenseForm(layer)
    assert all(tensor.is_meta for tensor in form._twin.state_dict().values())
    assert form.fits(layer.state_dict())
    assert not form.fits(nn.Linear(64, 64).state_dict())
    assert not pickle.loads(pickle.dumps(form)).fits(layer.state_dict())


def test_a_compressed_module_can_be_pickled():
    module = made("weight_norm").net
    apply_plan(module, {"2": {"rank": 5, "layout": "factors"}})
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(torch.ones(1, 12)), module(torch.ones(1, 12)))


def test_hooks_of_ones_own_are_not_copied():
    layer, held = nn.utils.weight_norm(nn.Linear(4, 4)), []

    class Held:
        def __deepcopy__(self, memo):
            raise AssertionError

        def __call__(self, *args):
            held.append(args)

    layer.register_forward_hook(Held())
    layer.register_forward_pre_hook(Held())
    layer.register_state_dict_post_hook(Held())
    new = DenseForm(layer).filled(layer.state_dict(), torch.device("cpu"), torch.float32)
    before = len(held)
    assert torch.equal(new(torch.ones(1, 4)), F.linear(torch.ones(1, 4), computed_weight(layer), layer.bias))
    assert len(held) == before


def test_a_swap_that_is_undone_leaves_the_layer_as_it_was():
    module = made("weight_norm").net
    layer = module[2]
    before = set(vars(layer))
    swap_modules(module, apply_plan(module, {"2": {"rank": 5, "layout": "factors"}}))
    assert module[2] is layer
    assert set(vars(layer)) == before


class Uncopied(nn.Module):
    """A parametrisation that cannot be copied."""

    def __deepcopy__(self, memo):
        raise NotImplementedError

    def forward(self, weight):
        return 2 * weight


def test_layers_without_a_way_back_are_named_at_the_start(make_trainer):
    module = Net("own")
    layer = nn.Linear(24, 24)
    parametrize.register_parametrization(layer, "weight", Uncopied())
    module.net[2] = layer
    trainer = make_trainer(FascCallback(keep=0.7), max_epochs=1, limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"1 layers \(net\.2\).*remove_parametrizations"):
        trainer.fit(module, loader())
    assert set(compressed_layers(module)) >= {"net.2"}


def test_what_compress_takes_is_the_pruned_weight():
    module = made("pruned")
    mask = module.net[2].weight_mask.clone()
    masked = module.net[2].weight.detach().clone()
    assert torch.equal(masked == 0, mask == 0)
    apply_plan(module, {"net.2": {"rank": 24, "layout": "factors"}})
    assert torch.allclose(module.net[2].to_weight(), masked, atol=1e-5)
    assert compress(made("pruned"), list(loader()), keep=0.7, progress=False).layers
