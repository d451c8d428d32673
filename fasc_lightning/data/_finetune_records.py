"""Records of fine-tuning data: documents, and instructions with their answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fasc_lightning.data._sources import hub_rows, is_file
from fasc_lightning.data._text_files import json_rows, read_text, text_ending

#: Field names of an instruction, its input (may be missing or empty) and its answer, for each kind of row. A row has
#: the first kind whose first field it contains.
_INSTRUCTION_FIELDS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("instruction", ("input", "context"), ("output", "response")),
    ("prompt", (), ("completion", "response")),
    ("question", ("context",), ("answer",)),
)


@dataclass(frozen=True)
class Document:
    """A plain text, every token of which is learnt; ``where`` names it in messages."""

    text: str
    where: str


@dataclass(frozen=True)
class Instruction:
    """A request and its answer, which alone is learnt.

    Attributes:
        instruction: The request to the model.
        input: The text that the instruction refers to; may be empty.
        answer: The answer to learn. It may be blank; null in a data set is "" here.
        where: Names the row in messages.
    """

    instruction: str
    input: str
    answer: str
    where: str

    @property
    def request(self) -> str:
        """The instruction, and after a blank line its input if there is one."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


Record = Document | Instruction


def read_records(source: str, streaming: bool = True, characters: int | None = None) -> Iterator[Record]:
    """Yield the records of a source in its order, without blank documents.

    Args:
        source: A ``.txt`` file (one document), a ``.jsonl`` file (a row is a document or an instruction), one of them
            as ``.xz``, or a hub data set as in ``hub_rows``.
        streaming: Whether a hub data set is read row by row, as far as needed, or downloaded whole.
        characters: Number of characters to read from the start of a ``.txt`` file; None for all.

    Raises:
        FileNotFoundError: If the source looks like a file and does not exist.
        ValueError: If a row has an unknown kind or lacks a field (the message begins with its file and line), or the
            file cannot be read.
    """
    if is_file(source):
        if text_ending(source) == ".txt":
            records: Iterator[Record] = iter([Document(read_text(source, characters), source)])
        else:
            records = (parse_row(row, where) for where, row in json_rows(source))
    else:
        records = (parse_row(row, where) for where, row in hub_rows(source, streaming))
    return (record for record in records if not isinstance(record, Document) or record.text.strip())


def parse_row(row: Mapping[str, Any], where: str) -> Record:
    """Return the instruction or the document in a row.

    Args:
        row: A row with ``instruction``, ``input`` (may be missing or empty) and ``output``; or with ``prompt`` and
            ``completion``, or ``question`` and ``answer``; or, without any of these, with ``text``.
        where: File and line, for messages.

    Raises:
        ValueError: If a field is missing or no text, or the question is blank.
    """
    for request, inputs, answers in _INSTRUCTION_FIELDS:
        if request in row:
            if not (instruction := _text(row, request, where)).strip():
                raise ValueError(f"{where}: expected a text in {request!r} but it is empty.")
            present = next((name for name in inputs if row.get(name)), None)
            return Instruction(
                instruction=instruction,
                input=_text(row, present, where) if present else "",
                answer=_answer(row, next((name for name in answers if name in row), answers[0]), where),
                where=where,
            )
    if "text" in row:
        if not isinstance(row["text"], str):
            raise ValueError(f"{where}: expected a text in 'text' but got a {type(row['text']).__name__}.")
        return Document(row["text"], where)
    kinds = ", ".join("/".join((request, *answers)) for request, _, answers in _INSTRUCTION_FIELDS)
    raise ValueError(f"{where}: expected the fields text, or {kinds}, but got {sorted(row)}.")


def _answer(row: Mapping[str, Any], name: str, where: str) -> str:
    # Some data sets write a missing answer as null.
    return "" if name in row and row[name] is None else _text(row, name, where)


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise ValueError(f"{where}: expected the field {name!r} but got only {sorted(row)}.")
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a text in {name!r} but got a {type(value).__name__}.")
    return value
