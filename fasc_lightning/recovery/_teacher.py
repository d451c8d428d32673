"""The teacher of a recovery: the dense model that the compressed one learns from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from fasc_lightning._utils import ForwardHook, Undo, amount, available_memory, fingerprint, undoing
from fasc_lightning.layers import linear_weight
from fasc_lightning.options import Distillation
from fasc_lightning.recovery._divergence import kl_divergence, top_k_divergence
from fasc_lightning.recovery._frozen_copy import frozen_copy
from fasc_lightning.recovery._logit_cache import LogitCache
from fasc_lightning.refit import find_blocks, relative_error


class Teacher:
    """The dense model, which gives the loss of the compressed one.

    On the module's own device and in its type, the teacher is the module itself with the dense layers in place during
    its forwards; everything else is shared. On another device or in another type it is a copy.

    Args:
        module: The compressed module.
        dense: The dense layers by name; empty if the cache holds all predictions.
        options: Options of the distillation.
        originals: Former values, by name, of trained parameters outside of compressed layers.
        cache: Cache of the teacher's predictions.

    Raises:
        MemoryError: If the teacher does not fit into memory.
        ValueError: If the cache belongs to another teacher.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        dense: Mapping[str, nn.Module],
        options: Distillation,
        *,
        originals: Mapping[str, Tensor] | None = None,
        cache: LogitCache | None = None,
    ) -> None:
        self.options = options
        self.cache = cache
        self._module: Any = module
        self._slots: list[tuple[dict[str, Any], str, Any]] = []
        self._copy: Any = None
        self._blocks = _BlockOutputs()
        if dense:
            self._prepare(module, dense, originals or {})
        if options.blocks:
            name, blocks = find_blocks(module, list(dense))
            self._blocks.watch(blocks)
            if self._copy is not None:
                self._blocks.watch(self._copy.get_submodule(name))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: a teacher belongs to one module, and a copy of that module has none."""

    def _prepare(self, module: nn.Module, dense: Mapping[str, nn.Module], originals: Mapping[str, Tensor]) -> None:
        device = next(module.parameters()).device
        check_teacher_memory(module, dense, self.options, device)
        modules = dict(module.named_modules(remove_duplicate=False))
        for name, layer in dense.items():
            like = modules[name].weight
            # A teacher that is a copy converts everything at once, directly to its device.
            frozen = frozen_copy(layer, like.device, like.dtype) if self.shares else layer
            self._slots += _places((module._modules for module in modules.values()), modules[name], frozen)
        for name, value in originals.items():
            original = nn.Parameter(value.to(device), requires_grad=False)
            self._slots += _places(
                (module._parameters for module in modules.values()), module.get_parameter(name), original
            )
        if self.shares:
            return
        with self._in_place():
            self._copy = frozen_copy(module, self.options.device, self.options.torch_dtype()).eval()
        self._slots = []

    @property
    def shares(self) -> bool:
        """Whether the teacher is the module itself with dense layers."""
        return self.options.device is None and self.options.dtype is None

    @property
    def needs_labels(self) -> bool:
        """Whether the loss includes the label loss."""
        return self.options.weight < 1

    @property
    def present(self) -> bool:
        """Whether the teacher's model exists, and not only its cache."""
        return bool(self._slots) or self._copy is not None

    def loss(
        self, batch: Any, logits: Tensor, counted: Tensor | None = None, label_loss: Tensor | None = None
    ) -> Tensor:
        """Return the student's loss.

        Args:
            batch: The student's batch.
            logits: The student's logits of its last forward, shape (samples, ..., classes).
            counted: True for counted predictions, shape (samples, ...); None counts all.
            label_loss: The student's loss on labels; needed for a ``weight`` below 1.

        Raises:
            RuntimeError: If the cache lacks the batch and the teacher's model is gone.
            ValueError: If the cache has classes that the student lacks.
        """
        options, student = self.options, self._blocks.take()
        rows = None if counted is None else counted.flatten().nonzero().squeeze(1)
        flat = logits.flatten(0, -2)
        total = logits.new_zeros((), dtype=torch.float32)
        if options.weight:
            total = total + options.weight * options.temperature**2 * self._divergence(batch, flat, counted, rows)
        elif options.blocks:
            self._ask(batch)
        if self.needs_labels:
            assert label_loss is not None
            total = total + (1 - options.weight) * label_loss
        if options.blocks:
            total = total + options.blocks * block_error(student, self._blocks.take(), counted)
        return total

    def fill(self, batch: Any) -> None:
        """Put the predictions of a batch into the cache."""
        assert self.cache is not None
        if not self.cache.has(batch):
            self._put(batch)

    @torch.no_grad()
    def _put(self, batch: Any) -> None:
        assert self.cache is not None
        with self._answering() as model:
            logits, counted = model.predictions(self._moved(batch))
        self.cache.put(batch, counted, logits.flatten(0, -2), self.options.temperature)

    def release(self) -> None:
        """Drop the teacher's model; the cache stays. Safe at any time."""
        self._slots, self._copy = [], None
        self._blocks.remove()

    def _divergence(self, batch: Any, student: Tensor, counted: Tensor | None, rows: Tensor | None) -> Tensor:
        temperature = self.options.temperature
        if self.cache is None:
            return kl_divergence(self._ask(batch), student, rows, temperature)
        found = self.cache.get(batch, counted)
        if found is None and self.present:
            self._put(batch)
            found = self.cache.get(batch, counted)
        if found is None:
            raise RuntimeError(
                f"Expected the teacher's predictions of every batch in {self.options.cache!r} but there are none of "
                "this one, and the teacher is gone. Do samples change each time (by random crops or masks)? HINT: "
                "leave out `cache`."
            )
        if found[1].numel() and int(found[1].max()) >= student.shape[-1]:
            raise ValueError(
                f"Expected the teacher's predictions in {self.options.cache!r} to be of the student's "
                f"{student.shape[-1]} classes but some are of others. Delete the folder: it is damaged or another "
                "model's."
            )
        log_p, index = (x.to(student.device) for x in found)
        return top_k_divergence(log_p, index, student, rows, temperature)

    @torch.no_grad()
    def _ask(self, batch: Any) -> Tensor:
        """Return the teacher's logits, shape (N, classes), on the student's device."""
        with self._answering() as model:
            logits = model.predictions(self._moved(batch))[0]
        return logits.flatten(0, -2).to(next(self._module.parameters()).device)

    def _moved(self, batch: Any) -> Any:
        if self._copy is None:
            return batch
        batch, dtype = move_data_to_device(batch, next(self._copy.parameters()).device), self.options.torch_dtype()
        if dtype is None:
            return batch
        return apply_to_collection(batch, Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x)

    @contextmanager
    def _answering(self) -> Iterator[Any]:
        if self._copy is not None:
            yield self._copy
            return
        with undoing() as undo, self._in_place():
            undo.keep_modes(self._module)
            for module in self._module.modules():
                module.training = False
            yield self._module

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Put the dense layers and the original parameters in place of the student's inside the context."""
        with undoing() as undo:
            for slots, name, value in self._slots:
                undo.add(slots.__setitem__, name, slots[name])
                slots[name] = value
            yield


def _places(
    slots: Iterable[dict[str, Any]], student: object, teacher: object
) -> list[tuple[dict[str, Any], str, object]]:
    """Return the places of a student's module or parameter, each with the teacher's counterpart."""
    return [(each, name, teacher) for each in slots for name, found in each.items() if found is student]


def check_teacher_memory(
    module: nn.Module, dense: Mapping[str, nn.Module], options: Distillation, device: torch.device
) -> None:
    """Check that a teacher fits into memory.

    Raises:
        MemoryError: If it does not; the error gives the estimate.
    """
    needed, target = teacher_bytes(module, dense, options, device)
    free = available_memory(target)
    beside = {
        "Distillation(device='cpu')": target.type != "cpu",
        "dtype='bfloat16'": options.dtype is None,
        "cache=FOLDER, with which only the first fit needs the teacher, before training": not options.cache,
    }
    remedies = [remedy for remedy, is_left in beside.items() if is_left]
    if needed > free:
        raise MemoryError(
            f"Expected the teacher to fit but it needs {amount(needed, 'B')} and {amount(free, 'B')} is free on "
            f"{target}. HINT: {'; '.join(remedies) or 'teacher=None'}."
        )


def teacher_bytes(
    module: nn.Module, dense: Mapping[str, nn.Module], options: Distillation, device: torch.device
) -> tuple[int, torch.device]:
    """Return the additional memory of a teacher in bytes, and the device of that memory.

    Args:
        module: The compressed module.
        dense: The dense layers by name.
        options: Options with the teacher's device and type.
        device: Device of the module.
    """
    target = torch.empty(0, device=options.device or device).device  # with its index
    shares = options.device is None and options.dtype is None
    replaced = {id(p) for name in dense for p in module.get_submodule(name).parameters()}
    others = [] if shares else [p for p in module.parameters() if id(p) not in replaced]
    size = 0
    for p in [*(p for layer in dense.values() for p in layer.parameters()), *others]:
        dtype = options.torch_dtype() if p.is_floating_point() else None
        if p.device != target or dtype not in (None, p.dtype):
            size += p.numel() * (p.dtype if dtype is None else dtype).itemsize
    return size, target


class _BlockOutputs:
    """The outputs of a stack's blocks in the last forward, of the student or of the teacher."""

    def __init__(self) -> None:
        self._found: dict[int, Tensor] = {}
        self._undo = Undo()

    def watch(self, blocks: nn.ModuleList) -> None:
        """Keep the outputs of these blocks from now on."""
        for i, block in enumerate(blocks):
            self._undo.hook(block.register_forward_hook, ForwardHook(self._keep, str(i)))

    def _keep(self, number: str, module: nn.Module, args: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # gradient checkpointing runs blocks again in the backward
            return
        self._found[int(number)] = output[0] if isinstance(output, tuple) else output

    def take(self) -> list[Tensor]:
        """Return the outputs, and drop them."""
        found = [self._found[i] for i in sorted(self._found)]
        self._found = {}
        return found

    def remove(self) -> None:
        """Remove the hooks; safe at any time."""
        self._undo.close()
        self._found = {}


def block_error(student: list[Tensor], teacher: list[Tensor], counted: Tensor | None = None) -> Tensor:
    """Return the mean over blocks and counted tokens of |student - teacher|^2 / |teacher|^2.

    Args:
        student: Outputs of the student's blocks, shape (..., features).
        teacher: Outputs of the teacher's blocks, shape (..., features).
        counted: True for counted tokens, shape (...). All tokens count if it is None or has another shape, as for
            predictions of whole samples.
    """
    rows = None
    if counted is not None and counted.shape == student[0].shape[:-1]:
        rows = counted.flatten()
        if not rows.any():
            return student[-1].sum() * 0.0
    return torch.stack([relative_error(s, t.to(s.device), rows) for s, t in zip(student, teacher, strict=True)]).mean()


def weights_fingerprint(dense: Mapping[str, nn.Module]) -> str:
    """Return a hash of layers' names and weights."""
    parts: list[Any] = []
    for name in sorted(dense):
        weight = linear_weight(dense[name]).detach()
        # NumPy, which makes the bytes, has no bfloat16.
        parts += [name, weight.float() if weight.itemsize < 4 else weight]
    return fingerprint(*parts)
