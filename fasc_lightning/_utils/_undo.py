"""Temporary changes to a user's modules and objects, undone however the work ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Undo(ExitStack):
    """Steps that undo changes, run in reverse order; each is registered before its change.

    A step may therefore find its change half made or not made at all, and may run again after it is done: it sets the
    earlier state and adds nothing to it. Every step is registered twice. If an exception interrupts a step, its second
    run finishes the work, and all other steps run before the exception goes on.
    """

    def add(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Register a step."""
        for _ in range(2):
            self.callback(step, *args, **kwargs)

    def set(self, holder: Any, name: str, value: Any) -> None:
        """Set an attribute; the step restores its value, or removes it if the object had none of its own."""
        own = vars(holder)
        if name in own or name == "__class__":
            self.add(setattr, holder, name, getattr(holder, name))
        else:
            self.add(own.pop, name, None)
        setattr(holder, name, value)

    def hook(self, register: Callable[..., RemovableHandle], hook: Callable[..., Any], **options: Any) -> None:
        """Register a hook on a module.

        Args:
            register: The module's method.
            hook: The hook.
            **options: Options of the method.
        """
        handles: list[RemovableHandle] = []
        self.add(_unhook, register.__self__, hook, handles, RemovableHandle.next_id)  # type: ignore[attr-defined]
        handles.append(register(hook, **options))

    def keep(self, model: nn.Module, attributes: bool = False) -> None:
        """Restore a model's structure at the end: classes, children, parameters, buffers, hooks, flags.

        Values of tensors are not restored.

        Args:
            model: Any module.
            attributes: Whether all other attributes of modules and of their configurations are restored, too.
        """
        self.add(_Structure.of(model, attributes).restore)

    def keep_modes(self, model: nn.Module) -> None:
        """Restore at the end which modules are in training mode."""
        self.add(_put_modes, [(vars(module), module.training) for module in model.modules()])

    def keep_flags(self, model: nn.Module) -> None:
        """Restore at the end which parameters require a gradient."""
        self.add(_put_flags, [(parameter, parameter.requires_grad) for parameter in model.parameters()])

    def forget(self) -> None:
        """Keep the changes."""
        self.pop_all()


@contextmanager
def undoing() -> Iterator[Undo]:
    """Undo changes when a block ends.

    The stack is entered twice, because an exception may arrive between the end of the block and the start of the exit.
    """
    with Undo() as undo, undo:
        yield undo


def _put_modes(modes: list[tuple[dict[str, Any], bool]]) -> None:
    for own, training in modes:
        own["training"] = training


def _put_flags(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


def _unhook(module: nn.Module, hook: Callable[..., Any], handles: list[RemovableHandle], first: int) -> None:
    """Remove a hook; if its registration was interrupted, find it by its identity and its time."""
    for handle in handles:
        handle.remove()
    if not handles:
        kept = [value for key, value in vars(module).items() if "_hooks" in key and isinstance(value, dict)]
        ids = [i for hooks in kept for i, found in hooks.items() if i >= first and _is(found, hook)]
        for hooks in kept:
            for i in ids:
                hooks.pop(i, None)


def _is(found: Any, hook: Callable[..., Any]) -> bool:
    return found is hook or getattr(found, "hook", None) is hook  # torch wraps hooks of one kind


@dataclass
class _Structure:
    """The structure of a model's modules.

    Attributes:
        whole: Whether all attributes are noted.
        classes: Classes of the modules.
        attributes: Attributes of modules and configurations, with copies.
        containers: Containers of children, tensors and hooks, with copies.
        flags: ``requires_grad`` of each parameter.
    """

    whole: bool
    classes: list[tuple[nn.Module, type]]
    attributes: list[tuple[dict[str, Any], dict[str, Any]]]
    containers: list[tuple[Any, Any]]
    flags: list[tuple[nn.Parameter, bool]]

    @staticmethod
    def of(model: nn.Module, whole: bool) -> _Structure:
        noted = _Structure(whole, [], [], [], [(p, p.requires_grad) for p in model.parameters()])
        for part in model.modules():
            own = vars(part)
            noted.classes.append((part, type(part)))
            noted.attributes.append((own, {key: value for key, value in own.items() if whole or _is_part(key, value)}))
            noted.containers += [(value, value.copy()) for key, value in own.items() if _is_container(key)]
            config = own.get("config")
            if whole and hasattr(config, "__dict__"):
                noted.attributes.append((vars(config), dict(vars(config))))
        return noted

    def restore(self) -> None:
        for part, kind in self.classes:
            if type(part) is not kind:
                part.__class__ = kind
        for own, before in self.attributes:
            for key in [key for key in own if key not in before and (self.whole or _is_part(key, own[key]))]:
                del own[key]
            own.update(before)
        for container, before in self.containers:
            if _contents(container) != _contents(before):
                container.clear()
                container.update(before)
        _put_flags(self.flags)


def _is_container(key: str) -> bool:
    return key in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set") or "_hooks" in key


def _is_part(key: str, value: Any) -> bool:
    """Whether an attribute belongs to a module's structure; a function in place of a method does."""
    return key == "training" or _is_container(key) or isinstance(value, FunctionType | MethodType)


def _contents(container: Any) -> list[Any]:
    return [(key, id(value)) for key, value in container.items()] if isinstance(container, dict) else list(container)
