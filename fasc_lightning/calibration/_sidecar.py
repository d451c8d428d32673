"""Statistics too large for a checkpoint, in a file of their own beside it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from fasc_lightning._utils import Undo, anything, check, mapping, record, whole_file

#: Bytes of statistics above which a checkpoint gets a sidecar. Lightning makes a checkpoint in memory before it is
#: written, reads it on every process and copies what it hands to a callback: of a 135M model's statistics (1 GB) that
#: would be several on each. Below it a single file is handier.
SIDECAR_BYTES = 64 * 2**20

SUFFIX = ".fasc.safetensors"

_CHECKPOINT = record({}, {"callbacks": mapping(anything), "state_dict": mapping(anything)}, extra=True)

_TOKEN = "fasc_lightning.calibration"

#: Characters of a token that name the run, those that a file name has, and what the name has after the run.
_RUN, _NAMED = 8, 16
_UNIQUE = f"[0-9a-f]{{{_NAMED - _RUN}}}"


class SidecarCheckpointIO(CheckpointIO):
    """Saves and removes checkpoints as another plugin does, and with them the sidecars of their calibrations.

    Every sidecar has a token that its checkpoint names, so that no checkpoint is ever taken for another's, and a file
    name of its own, so that an older checkpoint of the same name keeps the one that it has until it is overwritten.
    Both begin with the run, of which a fit and those that go on from its checkpoints are parts.

    Args:
        inner: The plugin.
        find: Returns the part of a checkpoint that may hold large "tensors", or None.

    Attributes:
        run: Of this fit; that of the checkpoint where it goes on from one.
        ending: Steps for when Lightning tears the plugin down.
    """

    def __init__(self, inner: CheckpointIO, find: Callable[[Mapping[str, Any]], dict[str, Any] | None]) -> None:
        self.inner = inner
        self._find = find
        self.run = uuid.uuid4().hex[:_RUN]
        self.ending = Undo()
        self._kept: dict[Path, list[Path]] = {}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save a checkpoint; statistics that cannot be written are left out, which it and a warning say."""
        state = self._find(checkpoint)
        written = None
        if state is not None:
            state["run"] = self.run
        if state is not None and is_local(path) and _nbytes(state["tensors"]) > SIDECAR_BYTES:
            tensors, state["tensors"] = state["tensors"], {}
            try:
                written, state["token"] = write_sidecar(tensors, Path(path), self.run)
            except (OSError, SafetensorError) as error:
                state["obstacle"] = f"its sidecar file could not be written ({error})"
                rank_zero_warn(
                    f"FascCallback: the statistics of the calibration could not be written beside {path}: {error}. A "
                    "fit that is resumed from this checkpoint has to start its calibration again."
                )
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)
        if is_local(path):
            self._tidy(Path(path), written)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint.

        Raises:
            ValueError: If it is no mapping of names, or its callbacks' states are none; Lightning takes that on trust.
        """
        checkpoint = self.inner.load_checkpoint(path, *args, **kwargs)
        if isinstance(checkpoint, dict):  # sharded ones are read in other ways
            check(checkpoint, _CHECKPOINT, f"The checkpoint {path}")
        return checkpoint

    @override
    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)
        if is_local(path):
            _remove(sidecars(Path(path)))
            self._kept.pop(Path(path), None)

    @override
    def teardown(self) -> None:
        with self.ending:
            self.inner.teardown()

    def clean(self, folders: Iterable[Path]) -> None:
        """Remove the sidecars of the run, those of killed processes included.

        Args:
            folders: Where to look for them, beside those of the checkpoints that were saved.
        """
        for folder in {*folders, *(path.parent for path in self._kept)}:
            _remove(_matching(folder, rf".*\.{self.run}{_UNIQUE}"))
        self._kept = {}

    def _tidy(self, path: Path, written: Path | None) -> None:
        """Remove the sidecars of earlier checkpoints of the same name."""
        latest = [] if written is None else [written]
        if isinstance(self.inner, AsyncCheckpointIO):
            # Written in the background, the checkpoint may not be there yet: the one before it keeps its sidecar.
            latest = [*self._kept.get(path, []), *latest][-2:]
        self._kept[path] = latest
        _remove(file for file in sidecars(path) if file not in latest)


def write_sidecar(tensors: Mapping[str, Tensor], path: Path, run: str) -> tuple[Path, str]:
    """Write tensors beside a checkpoint of a run, whole or not at all; return the file and its token.

    Raises:
        OSError: If the folder is read-only or the disk is full.
        SafetensorError: Likewise.
    """
    from safetensors.torch import save_file

    token = run + uuid.uuid4().hex
    file = path.parent / _name(path, token)
    with whole_file(file) as temporary:
        save_file(dict(tensors), temporary, metadata={_TOKEN: token})
    return file, token


@contextmanager
def open_sidecar(token: str, path: Path) -> Iterator[Any]:
    """Open the sidecar of a checkpoint wherever it lies beside it, whatever it is called.

    Args:
        token: That the checkpoint names.
        path: Of the checkpoint, or a link to it.

    Yields:
        safetensors' handle, whose ``get_tensor(name)`` reads one tensor.

    Raises:
        FileNotFoundError: If it is not there.
    """
    for folder in dict.fromkeys((path.parent, path.resolve().parent)):
        for file in sorted(folder.glob(f"*{SUFFIX}")):
            if read_token(file) == token:
                with safe_open(file, framework="pt") as handle:
                    yield handle
                return
    raise FileNotFoundError(f"there is no {_name(path, token)} beside {path}, or it is damaged")


def read_token(file: Path) -> str | None:
    """Return the token of a sidecar; None of a file that is none, or is damaged."""
    try:
        with safe_open(file, framework="pt") as handle:
            return (handle.metadata() or {}).get(_TOKEN)
    except (OSError, SafetensorError):
        return None


def sidecars(path: Path) -> list[Path]:
    """Return the sidecars that were written for checkpoints of a path, and what is left of unfinished ones."""
    return _matching(path.parent, rf"{re.escape(_stem(path))}\.[0-9a-f]{{{_RUN}}}{_UNIQUE}")


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a folder whose names are a pattern and what ends sidecars, whole or half written."""
    name = re.compile(rf"{pattern}{re.escape(SUFFIX)}(\.tmp)?")
    return [file for file in folder.glob(f"*{SUFFIX}*") if name.fullmatch(file.name)]


def _name(path: Path, token: str) -> str:
    return f"{_stem(path)}.{token[:_NAMED]}{SUFFIX}"


def _stem(path: Path) -> str:
    # Lightning finds the newest checkpoint of a cluster job by what follows this in any file's name.
    return path.name.replace("hpc_ckpt_", "hpc-ckpt-")


def is_run(value: Any) -> bool:
    """Whether a value is the name of a run: file names begin with it."""
    return isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{_RUN}}}", value) is not None


def is_local(path: Any) -> bool:
    """Whether a path is of this machine's files: checkpoints elsewhere keep their statistics, of any size."""
    return "://" not in str(path)


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _remove(files: Iterable[Path]) -> None:
    for file in list(files):
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            rank_zero_warn(f"FascCallback: {file} is of no use any more but could not be removed: {error}.")
