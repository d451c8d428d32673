"""The other namespace of the same library: its classes have the same names and are others."""

from __future__ import annotations

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from processes import run_script
from tiny import causal_model, causal_module, mlp, token_loader
from torch import nn

from fasc_lightning import FascCallback, compress, score
from fasc_lightning.distributed import check_namespace

REMEDY = r"is of `pytorch_lightning`.* HINT: `import lightning\.pytorch as pl`"


class Other(nn.Module):
    """Stands in for a LightningModule, or a Trainer, of `pytorch_lightning`."""


Other.__module__ = "pytorch_lightning.core.module"


class Derived(Other):
    """A user's own class."""


def test_trainers_and_modules_of_the_other_namespace_are_refused(make_trainer):
    for thing in (Other(), Derived()):
        with pytest.raises(MisconfigurationException, match=REMEDY):
            check_namespace(make_trainer(), thing)
    with pytest.raises(MisconfigurationException, match=r"but Derived is of `pytorch_lightning`"):
        check_namespace(Derived())
    check_namespace(make_trainer(), causal_module(), mlp(), causal_model())


@pytest.mark.parametrize("options", [{"rank": 0.5}, {"monitor": 2}])
def test_the_callback_refuses_them_when_a_fit_is_set_up(make_trainer, options):
    trainer = make_trainer()
    with pytest.raises(MisconfigurationException, match=REMEDY):
        FascCallback(**options).setup(trainer, Derived(), "fit")
    foreign = object.__new__(type("Trainer", (Other,), {"__module__": "pytorch_lightning.trainer.trainer"}))
    with pytest.raises(MisconfigurationException, match=r"but Trainer is of `pytorch_lightning`"):
        FascCallback(**options).setup(foreign, mlp(), "fit")


@pytest.mark.parametrize("call", [lambda model, data: compress(model, data, keep=0.8), score])
def test_functions_refuse_modules_of_the_other_namespace(call):
    class Module(type(causal_model())):
        pass

    Module.__module__ = "pytorch_lightning.core.module"
    model = causal_model()
    model.__class__ = Module
    with pytest.raises(MisconfigurationException, match=REMEDY):
        call(model, list(token_loader()))


def test_a_trainer_of_the_real_package_names_the_import():
    said = run_script("other_namespace.py")  # a process of its own: the import changes the loggers of `lightning`
    assert "MisconfigurationException: Expected a Trainer and a LightningModule of the package `lightning`" in said
    assert "HINT: `import lightning.pytorch as pl` in place of `import pytorch_lightning as pl`" in said
