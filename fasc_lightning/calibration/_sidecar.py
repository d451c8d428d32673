"""Sidecar files: statistics too large for a checkpoint, in a file beside it."""

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

#: Bytes of statistics above which a checkpoint gets a sidecar. Lightning makes a checkpoint in memory before it writes
#: it, reads it on every process and copies the states of callbacks: several copies of a 135M model's statistics (1 GB)
#: on each process. Below this size a single file is handier.
SIDECAR_BYTES = 64 * 2**20

SUFFIX = ".fasc.safetensors"

_CHECKPOINT = record({}, {"callbacks": mapping(anything), "state_dict": mapping(anything)}, extra=True)

_TOKEN = "fasc_lightning.calibration"

#: Characters of a token that name the run, characters of it in a file name, and the pattern of the latter's rest.
_RUN, _NAMED = 8, 16
_UNIQUE = f"[0-9a-f]{{{_NAMED - _RUN}}}"


class SidecarCheckpointIO(CheckpointIO):
    """Saves and removes checkpoints through another plugin, together with the sidecars of their calibrations.

    Every sidecar has a token, which its checkpoint names, so no checkpoint reads another's sidecar. Every sidecar has
    its own file name, so an older checkpoint of the same name keeps its sidecar until it is overwritten. Token and file
    name begin with the name of the run. A fit and the fits that continue its checkpoints are one run.

    Args:
        inner: The other plugin.
        find: Returns the part of a checkpoint that may hold large "tensors", or None.

    Attributes:
        run: Name of the run; a resumed fit takes it from its checkpoint.
        ending: Steps to run when Lightning tears down the plugin.
    """

    def __init__(self, inner: CheckpointIO, find: Callable[[Mapping[str, Any]], dict[str, Any] | None]) -> None:
        self.inner = inner
        self._find = find
        self.run = uuid.uuid4().hex[:_RUN]
        self.ending = Undo()
        self._kept: dict[Path, list[Path]] = {}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save a checkpoint; if its statistics cannot be written, it lacks them, records this and logs a warning."""
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
                    f"The statistics of the calibration could not be written beside {path}: {error}. A "
                    "fit that is resumed from this checkpoint has to start its calibration again."
                )
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)
        if is_local(path):
            self._tidy(Path(path), written)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint.

        Raises:
            ValueError: If the checkpoint or its callbacks' states are not mappings by name, which Lightning does not
                check.
        """
        checkpoint = self.inner.load_checkpoint(path, *args, **kwargs)
        if isinstance(checkpoint, dict):  # sharded checkpoints are read in other ways
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
        """Remove the sidecars of the run, including sidecars of killed processes.

        Args:
            folders: Folders to search, besides the folders of saved checkpoints.
        """
        for folder in {*folders, *(path.parent for path in self._kept)}:
            _remove(_matching(folder, rf".*\.{self.run}{_UNIQUE}"))
        self._kept = {}

    def _tidy(self, path: Path, written: Path | None) -> None:
        """Remove the sidecars of earlier checkpoints of the same name."""
        latest = [] if written is None else [written]
        if isinstance(self.inner, AsyncCheckpointIO):
            # A checkpoint written in the background may not exist yet, so the previous one keeps its sidecar.
            latest = [*self._kept.get(path, []), *latest][-2:]
        self._kept[path] = latest
        _remove(file for file in sidecars(path) if file not in latest)


def write_sidecar(tensors: Mapping[str, Tensor], path: Path, run: str) -> tuple[Path, str]:
    """Write tensors beside a checkpoint of a run, whole or not at all; return the file and its token.

    Raises:
        OSError: If the folder is read-only or the disk is full.
        SafetensorError: If safetensors finds the folder read-only or the disk full.
    """
    from safetensors.torch import save_file

    token = run + uuid.uuid4().hex
    file = path.parent / _name(path, token)
    with whole_file(file) as temporary:
        save_file(dict(tensors), temporary, metadata={_TOKEN: token})
    return file, token


@contextmanager
def open_sidecar(token: str, path: Path) -> Iterator[Any]:
    """Open the sidecar in the folder of a checkpoint, or of the file that the checkpoint links to, under any name.

    Args:
        token: Token that the checkpoint names.
        path: The checkpoint, or a link to it.

    Yields:
        safetensors' handle, whose ``get_tensor(name)`` reads one tensor.

    Raises:
        FileNotFoundError: If there is no such sidecar.
    """
    for folder in dict.fromkeys((path.parent, path.resolve().parent)):
        for file in sorted(folder.glob(f"*{SUFFIX}")):
            if read_token(file) == token:
                with safe_open(file, framework="pt") as handle:
                    yield handle
                return
    raise FileNotFoundError(f"there is no {_name(path, token)} beside {path}, or it is damaged")


def read_token(file: Path) -> str | None:
    """Return the token of a sidecar; None if the file is no sidecar, or is damaged."""
    try:
        with safe_open(file, framework="pt") as handle:
            return (handle.metadata() or {}).get(_TOKEN)
    except (OSError, SafetensorError):
        return None


def sidecars(path: Path) -> list[Path]:
    """Return the sidecars of checkpoints of a path, including unfinished files."""
    return _matching(path.parent, rf"{re.escape(_stem(path))}\.[0-9a-f]{{{_RUN}}}{_UNIQUE}")


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a folder whose names match a pattern and end like sidecars, finished or not."""
    name = re.compile(rf"{pattern}{re.escape(SUFFIX)}(\.tmp)?")
    return [file for file in folder.glob(f"*{SUFFIX}*") if name.fullmatch(file.name)]


def _name(path: Path, token: str) -> str:
    return f"{_stem(path)}.{token[:_NAMED]}{SUFFIX}"


def _stem(path: Path) -> str:
    # Lightning finds the newest checkpoint of a cluster job by the number after "hpc_ckpt_" in any file's name.
    return path.name.replace("hpc_ckpt_", "hpc-ckpt-")


def is_run(value: Any) -> bool:
    """Return whether a value is the name of a run, as in the file names of sidecars."""
    return isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{_RUN}}}", value) is not None


def is_local(path: Any) -> bool:
    """Return whether a path is a local file; checkpoints elsewhere hold their statistics themselves, of any size."""
    return "://" not in str(path)


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _remove(files: Iterable[Path]) -> None:
    for file in list(files):
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            rank_zero_warn(f"{file} is of no use any more but could not be removed: {error}.")
