"""Readers of text and jsonl files, compressed or not, in bounded memory."""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from typing_extensions import override

#: Characters of the longest line of a jsonl file; a line is one row, which is parsed and tokenised as a whole.
MAX_LINE = 2**24

#: Characters of the longest text that is read whole. Tokenising takes some sixty bytes per character.
MAX_TEXT = 2**26

#: Most blank lines in a row; more mean a damaged file.
MAX_BLANK = 2**20

#: Once a compressed file has unpacked to ``FREE_BYTES``, it may unpack to at most ``MAX_RATIO`` times its size. Texts
#: reach ten or twenty times; files made to fill the memory reach thousands.
MAX_RATIO, FREE_BYTES = 100, 2**24

#: Memory of the decompressor; ``xz -9`` needs a quarter of it.
UNPACKING_BYTES = 2**28

_BLOCK = 2**20

# The fields that hold a jsonl row's text, in reading order. The first group whose first field exists is used; its other
# fields may be missing or empty.
_TEXT_FIELDS = (
    ("text",),
    ("prompt", "completion", "response"),
    ("instruction", "input", "context", "output", "response"),
    ("question", "context", "answer"),
)


def open_text(path: str | Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, decompressed if its name ends in ``.xz``, with their line ends.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not UTF-8, is damaged, unpacks to far more than its size, has a line of more than
            :data:`MAX_LINE` characters, or has more than :data:`MAX_BLANK` blank lines in a row.
    """
    with _opened(path) as lines:
        number = blank = 0
        while line := lines.readline(MAX_LINE + 1):
            number += 1
            blank = blank + 1 if line.isspace() else 0
            if blank > MAX_BLANK:
                raise ValueError(f"Expected a text or rows in {path} but it has {blank:,} blank lines in a row.")
            if len(line) > MAX_LINE:
                raise ValueError(
                    f"Expected lines of at most {MAX_LINE:,} characters in {path} but line {number} is longer. Split "
                    "the row into several."
                )
            yield line


def read_text(path: str | Path, limit: int | None = None) -> str:
    """Read the text of a ``.txt`` or ``.jsonl`` file, or one of them as ``.xz``.

    The documents of a jsonl file are joined by a blank line. A row's text is its ``text``, or the parts of a
    question and its answer (``prompt``/``completion``, ``instruction``/``input``/``output``, ...) on lines of
    their own.

    Args:
        path: The file.
        limit: Number of characters to read from its start; None for all.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file name has another ending, a row is no JSON object with a known text field, the file is
            damaged, or the whole text is asked for and has more than :data:`MAX_TEXT` characters.
    """
    path = Path(path)
    parts: list[str] = []
    length, most = 0, MAX_TEXT + 1 if limit is None else limit
    for part in _blocks(path) if text_ending(path) == ".txt" else _documents(path):
        parts.append(part)
        length += len(part)
        if length >= most:
            break
    if limit is None and length > MAX_TEXT:
        raise ValueError(
            f"Expected a text of at most {MAX_TEXT:,} characters to read as a whole but {path} has more. Ask for a "
            "number of windows or tokens of it, or give a part of it."
        )
    return "".join(parts)[:most]


def text_ending(path: str | Path) -> str:
    """Return ``".txt"`` or ``".jsonl"``, the ending of a file after decompression.

    Raises:
        ValueError: If the file name has another ending.
    """
    path = Path(path)
    ending = Path(path.stem).suffix if path.suffix == ".xz" else path.suffix
    if ending not in (".txt", ".jsonl"):
        raise ValueError(f"Expected a file name ending in .txt, .jsonl, .txt.xz or .jsonl.xz, but got {path.name!r}.")
    return ending


def json_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a jsonl file (also ``.xz``), each after its file and line for messages, without blank lines.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line is no JSON object; or as for :func:`open_text`.
    """
    for number, line in enumerate(open_text(path), start=1):
        if line.strip():
            where = f"{Path(path).name}, line {number}"
            yield where, json_row(line, where)


def json_row(line: str, where: str) -> dict[str, Any]:
    """Parse one line of a jsonl file.

    Raises:
        ValueError: If the line is no JSON object, or holds half a surrogate pair; the message begins with ``where``.
    """
    try:
        row = json.loads(line)
        if "\\u" in line:  # only an escape can be half a surrogate pair
            json.dumps(row, ensure_ascii=False).encode()
    except (RecursionError, ValueError) as error:
        reason = "one nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{where}: expected one JSON object a line, but got {reason}.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, but got a {type(row).__name__}.")
    return row


def row_text(row: Mapping[str, Any], where: str) -> str:
    """Return the text of a row; see :func:`read_text`.

    Raises:
        ValueError: If it has none; the message begins with ``where``.
    """
    for fields in _TEXT_FIELDS:
        if isinstance(row.get(fields[0]), str):
            return "\n".join(row[field] for field in fields if isinstance(row.get(field), str) and row[field])
    expected = ", ".join("/".join(fields) for fields in _TEXT_FIELDS)
    found = sorted(map(str, row))
    raise ValueError(f"{where}: expected a text in one of the fields {expected}, but got the fields {found}.")


def _documents(path: Path) -> Iterator[str]:
    """Yield the texts of rows and the separators between them."""
    for number, (where, row) in enumerate(json_rows(path)):
        if number:
            yield "\n\n"
        yield row_text(row, where)


def _blocks(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        while block := file.read(_BLOCK):
            yield block


@contextmanager
def _opened(path: str | Path) -> Iterator[IO[str]]:
    """Open a text file; errors of encoding and compression name the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a text file at {path}, but there is none.")
    try:
        with path.open("rb") as file:
            raw: Any = io.BufferedReader(_Unpacked(file, path), _BLOCK) if path.suffix == ".xz" else file
            yield io.TextIOWrapper(raw, encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected a text file in UTF-8 but {path} is none: {error.reason} ({error.object[error.start]:#04x})."
        ) from error


class _Unpacked(io.RawIOBase):
    """The bytes of an ``.xz`` file, in bounded memory.

    Args:
        file: The open file.
        path: Its path, for messages.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._limit = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)
        self._new()
        self._unpacked = 0
        self._rest = b""

    def _new(self) -> None:
        self._decompressor = lzma.LZMADecompressor(memlimit=UNPACKING_BYTES)

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        try:
            data = self._next(len(buffer))
        except lzma.LZMAError as error:
            raise ValueError(f"Expected a whole .xz file but {self._path} is damaged ({error}).") from error
        self._unpacked += len(data)
        if self._unpacked > self._limit:
            raise ValueError(
                f"Expected a compressed text but {self._path} unpacks to more than {MAX_RATIO:,} times its size. It is "
                "no text, or is made to fill the memory. HINT: if the size is intended, unpack it yourself."
            )
        buffer[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> bytes:
        """Return up to ``size`` bytes; none after the last of the file's streams."""
        while True:
            if self._decompressor.eof:
                self._rest = (self._decompressor.unused_data or self._file.read(_BLOCK)).lstrip(b"\0")
                if not self._rest:
                    if self._file.peek(1) if hasattr(self._file, "peek") else False:
                        continue
                    return b""
                self._new()
            if self._decompressor.needs_input and not self._rest:
                self._rest = self._file.read(_BLOCK)
                if not self._rest:
                    raise lzma.LZMAError("it ends before its end mark")
            block, self._rest = self._rest, b""
            if data := self._decompressor.decompress(block, size):
                return data
