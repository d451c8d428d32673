"""Sources of text and data by name: files, hub data sets, or the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fasc_lightning._utils import require
from fasc_lightning.data._text_files import text_ending

SELF = "self"


def named_files(arguments: Iterable[str], option: str = "--eval-text") -> dict[str, str]:
    """Return the files of a command line's NAME=FILE arguments by name.

    Raises:
        ValueError: If an argument has another form.
        FileNotFoundError: If a file is missing.
    """
    files = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not (name and separator and path):
            raise ValueError(f"Expected {option} NAME=FILE but got {argument!r}.")
        check_file(path)
        files[name] = path
    return files


def check_file(path: str) -> None:
    """Refuse an evaluation file that does not exist.

    Raises:
        FileNotFoundError: If the file does not exist.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected a file to evaluate on but {path} is none.")


def is_file(source: str, use: str = "data") -> bool:
    """Return whether a source is a file, and not a hub data set; ``use`` names it in the error.

    Raises:
        FileNotFoundError: If it looks like a file and does not exist.
    """
    path = Path(source)
    if not path.is_file() and path.suffix in (".txt", ".jsonl", ".xz"):
        raise FileNotFoundError(f"Expected a {use} file at {source}, but there is none.")
    return path.is_file()


def check_sources(sources: Iterable[str], use: str = "data") -> None:
    """Refuse missing files and unknown kinds of files before anything is loaded; ``use`` names them in the error.

    Raises:
        FileNotFoundError: If a source looks like a file and does not exist.
        ModuleNotFoundError: If a source is a hub data set and ``datasets`` is not installed.
        ValueError: If a file name has an unknown ending.
    """
    for source in sources:
        if source == SELF:
            continue
        if is_file(source, use):
            text_ending(source)
        else:
            _check_reader(source)


def _check_reader(source: str) -> None:
    require(f"{source!r} is no file; reading a hub data set needs", "eval", "datasets")


def hub_rows(source: str, streaming: bool = True) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a data set on the hub or in a local folder, each after its name for messages.

    Args:
        source: ``ID``, ``ID:CONFIG`` or ``ID:CONFIG:SPLIT``; the split is ``train`` if not named.
        streaming: Whether rows are yielded while they are read; otherwise the whole data set is first downloaded to the
            cache of ``datasets``.

    Raises:
        ModuleNotFoundError: If ``datasets`` is not installed.
        OSError: If the data set cannot be found or downloaded.
        ValueError: If it cannot be read; the message names the source.
    """
    name, config, split = [*source.split(":"), None, None][:3]
    _check_reader(source)
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=streaming)
        for number, row in enumerate(rows):
            yield f"{source}, row {number}", row
    except OSError:
        raise  # the message names the missing data set
    except Exception as error:  # from the reader of the data set's format
        raise ValueError(f"{source}: the data set cannot be read: {type(error).__name__}: {error}") from error
