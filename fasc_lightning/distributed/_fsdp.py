"""Sharded weights (FSDP2, under Lightning's ModelParallelStrategy): how they are read, and how the sharding ends.

While a block computes, FSDP2 gathers its weights, so hooks on its layers see the activations, gradients and weights of
a whole module. At all other times a parameter is a DTensor, and each process holds some of its rows. All processes must
read the same parameters together, in the same order.

A compressed module is whole: its low-rank layers are a fraction of the dense ones, and it is saved, evaluated and run
without the sharded training. So compression ends the sharding (:class:`Unsharding`). PyTorch has no function for this:
parameters become plain ones, and the hooks, classes and states that ``fully_shard`` put on modules are removed. All of
it can be undone.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from fasc_lightning._utils import Undo, amount, available_memory
from fasc_lightning.distributed._collectives import gather_everywhere
from fasc_lightning.distributed._dtensor import is_dtensor, whole
from fasc_lightning.layers import expert_groups

#: Module of FSDP2's hooks.
_CODE = "torch.distributed.fsdp._fully_shard"

#: Attributes with a module's hooks by number, FSDP2's included, and with options of hooks by the same number.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
_NOTES = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")

#: Flags for the compiler that ``fully_shard`` sets on every module.
_FLAGS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def is_sharded(module: nn.Module) -> bool:
    """Tell whether a module's weights are sharded."""
    return any(_is_fsdp(part) for part in module.modules()) or any(is_dtensor(p) for p in module.parameters())


def reshard(module: nn.Module) -> None:
    """Free the weights that are still gathered, for example the root's after a validation."""
    for part in module.modules():
        if _is_fsdp(part):
            part.reshard()  # type: ignore[operator]


def check_mesh(strategy: ModelParallelStrategy) -> None:
    """Refuse tensor parallelism: its processes hold parts of layers instead of other batches.

    Args:
        strategy: Strategy whose processes have started.

    Raises:
        MisconfigurationException: With the remedy.
    """
    size = strategy.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise MisconfigurationException(
            f"Expected data parallelism but {type(strategy).__name__} splits layers over {size} processes "
            "(tensor_parallel_size; by default all of a node), and no process has a whole activation. HINT: "
            f"ModelParallelStrategy(data_parallel_size={strategy.world_size}, tensor_parallel_size=1), and "
            "`fully_shard` in `configure_model`."
        )


def check_sharded(trainer: pl.Trainer, pl_module: pl.LightningModule, layers: Iterable[str]) -> None:
    """Refuse modules that cannot be calibrated under ModelParallelStrategy, once ``configure_model`` has run.

    Args:
        trainer: Trainer of the fit.
        pl_module: Module of the fit.
        layers: Names of the targeted layers.

    Raises:
        MisconfigurationException: With the remedy.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    if trainer.world_size > 1 and not is_sharded(pl_module):
        raise MisconfigurationException(
            f"Expected `configure_model` of {type(pl_module).__name__} to shard its weights but it shards none: "
            "nothing then averages gradients, and each process trains a module of its own. HINT: call "
            "torch.distributed.fsdp.fully_shard(block, mesh=self.device_mesh['data_parallel']) for the blocks and "
            "then the model, or use strategy='ddp'."
        )
    if is_sharded(pl_module) and (groups := expert_groups(layers)):
        raise MisconfigurationException(
            f"Expected layers with weights of their own but {len({experts for experts, _ in groups})} modules hold "
            "fused experts, whose slices are spread over processes. HINT: exclude the experts, or compress under "
            "'ddp'."
        )


def lacks_room(trainer: pl.Trainer, pl_module: pl.LightningModule, besides: int) -> str:
    """Return why a sharded module cannot be made whole on every process before compression; "" if it can.

    Args:
        trainer: Trainer of the fit.
        pl_module: Module of the fit.
        besides: Bytes that are needed besides the module.
    """
    if not is_sharded(pl_module):
        return ""
    device = trainer.strategy.root_device
    processes = getattr(trainer.strategy, "num_processes", 1) if device.type == "cpu" else 1  # they share memory
    needed, free = processes * (_missing_bytes(pl_module) + besides), available_memory(device)
    reason = ""
    if needed > free:
        reason = (
            f"the weights of the whole module and the moments need {amount(needed, 'B')} on {device} of process "
            f"{trainer.global_rank} and {amount(free, 'B')} is free"
        )
    return next(filter(None, gather_everywhere(trainer, reason)), "")


class Unsharding:
    """Makes a sharded module whole, in place and on every process, and sharded again after a failure.

    The shards are kept until :meth:`forget`.
    """

    def __init__(self) -> None:
        self._undo = Undo()

    def run(self, module: nn.Module) -> None:
        """Make a sharded module whole; a whole module stays as it is. All processes must call this.

        Args:
            module: A module with the same parts on every process.
        """
        if not is_sharded(module):
            return
        reshard(module)
        try:
            self._gather(module)
            for part in module.modules():
                self._take_off(part)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Restore the sharded module; safe at any time."""
        self._undo.close()

    def forget(self) -> None:
        """Free the shards."""
        self._undo.forget()

    def _gather(self, module: nn.Module) -> None:
        """Replace sharded parameters by plain ones, one at a time; tied parameters stay tied."""
        made: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is None or not is_dtensor(parameter):
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
                self._set(part._parameters, name, made[id(parameter)])

    def _take_off(self, part: nn.Module) -> None:
        """Remove everything that ``fully_shard`` has put on a module."""
        from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
        from torch.distributed._composable_state import _module_state_mapping

        own: Any = vars(part)
        for kind in _HOOKS:
            ours = [key for key, hook in own[kind].items() if getattr(hook, "__module__", "").startswith(_CODE)]
            if ours:
                for hooks in (own[kind], *(own[notes] for notes in _NOTES)):
                    self._drop(hooks, ours)
        for flag in _FLAGS:
            self._pop(own, flag)
        if not _is_fsdp(part):
            return
        # Without a trace, so that `fully_shard` can be applied again.
        states = own[STATE_KEY]
        for key in [key for key, state in states.items() if type(state).__module__.startswith(_CODE)]:
            self._pop(states, key)
        self._pop(own[REGISTRY_KEY], "fully_shard")
        self._pop(_module_state_mapping, part)
        sharded: Any = type(part)
        self._undo.set(part, "__class__", sharded.__mro__[getattr(sharded, "_orig_cls_mro_index", 2)])

    def _set(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        self._undo.add(mapping.__setitem__, key, mapping[key])
        mapping[key] = value

    def _pop(self, mapping: MutableMapping[Any, Any], key: Any) -> None:
        if key in mapping:
            self._undo.add(mapping.__setitem__, key, mapping[key])
            mapping.pop(key)

    def _drop(self, hooks: dict[int, Any], keys: list[int]) -> None:
        """Remove hooks; the undo step restores them in their earlier order."""
        before = list(hooks.items())

        def put_back() -> None:
            again = {key: hook for key, hook in before if key in keys or key in hooks}
            since = {key: hook for key, hook in hooks.items() if key not in again}
            hooks.update({**again, **since})  # so that an interruption loses no hook
            for key in [*again, *since]:
                hooks[key] = hooks.pop(key)

        self._undo.add(put_back)
        for key in keys:
            hooks.pop(key, None)


def _is_fsdp(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _missing_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters that are on other processes."""
    missing = 0
    for parameter in module.parameters():
        if is_dtensor(parameter):
            local: Any = parameter
            missing += (parameter.numel() - local.to_local().numel()) * parameter.element_size()
    return missing
