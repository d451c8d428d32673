"""What tests of a fit look at: the state of a module before and after, and a callback that keeps its moments."""

from __future__ import annotations

import copy

import torch
from inside import is_calibrating, moments_of

from fasc_lightning import FascCallback
from fasc_lightning.layers import is_compressed


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_untouched(module, before, flags=None):
    """The module is exactly what it was: weights, structure, gradient flags; and no hook is left."""
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not is_compressed(module)
    assert_no_hooks(module)
    if flags is not None:
        assert {name: p.requires_grad for name, p in module.named_parameters()} == flags


def assert_no_hooks(module):
    for m in module.modules():
        assert not m._forward_hooks
        assert not m._forward_pre_hooks
        assert not m._backward_hooks


class RecordingCallback(FascCallback):
    """Keeps a copy of the moments and counts the batches that were calibrated."""

    batches = 0

    def on_train_batch_end(self, *args):
        self.batches += is_calibrating(self)
        super().on_train_batch_end(*args)

    def on_fit_end(self, trainer, pl_module):
        self.kept_moments = copy.deepcopy(moments_of(self))
        super().on_fit_end(trainer, pl_module)
