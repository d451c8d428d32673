"""Atomic writes: files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from fasc_lightning._utils._undo import undoing


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it becomes ``path`` when the block succeeds.

    The folder is made if needed. A block that fails leaves an earlier file at ``path`` and no temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with undoing() as undo:
        undo.add(temporary.unlink, missing_ok=True)
        yield temporary
        temporary.replace(path)


@contextmanager
def whole_folder(path: str | Path, stale: Callable[[str], bool]) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; it becomes ``path`` when the block succeeds.

    Other entries of an earlier folder stay in it, as if the files were written one by one. A block that fails leaves
    the earlier folder as it was, and no temporary folder. Between two renames there is no folder at ``path``. A process
    killed at that moment leaves the earlier folder beside it, with a name ending in ".old".

    Args:
        path: Path of the folder; links are followed.
        stale: Tells by its name whether an entry of the earlier folder must go.

    Raises:
        NotADirectoryError: If there is a file at ``path``.
        OSError: If writing fails, or the folder is a mount point.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"Expected {path} to be a folder, or not to exist, but it is a file.")
    if os.path.ismount(path):
        raise OSError(f"Expected a folder that can be renamed but {path} is a mount point. Use a folder inside of it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    temporary, old = unique.with_suffix(".tmp"), unique.with_suffix(".old")
    with undoing() as undo:
        undo.add(shutil.rmtree, temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        if path.exists():
            _carry_over(path, temporary, stale)
            shutil.copymode(path, temporary)
            undo.add(_settle, path, temporary, old)
            path.rename(old)
        temporary.rename(path)


def _settle(path: Path, temporary: Path, old: Path) -> None:
    """Put the earlier folder back if the new one is not in place yet; otherwise delete the earlier one."""
    if not temporary.exists():
        shutil.rmtree(old, ignore_errors=True)  # the new folder is in place: an error would say otherwise
    elif old.exists():
        old.rename(path)


def _carry_over(old: Path, new: Path, stale: Callable[[str], bool]) -> None:
    """Copy the entries that only the old folder has; files are linked, which costs no time and no space."""
    for entry in old.iterdir():
        target = new / entry.name
        if target.exists() or stale(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True, copy_function=_link)
        else:
            _link(entry, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)
