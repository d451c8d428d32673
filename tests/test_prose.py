"""Docstrings and comments without the phrases that slow a reader down."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Phrases that hide an object or turn a sentence around, each with its remedy.
PHRASES = {
    r"likewise": "write the description again, or 'As `x`.'",
    r"hence": "so, therefore",
    r"(is|are|was|were|be) (said|told)|as (was )?said|said (of|to)|told of": "logs, warns, reports, states",
    r"to be had": "is available, is possible",
    r"by what": "name the means",
    r"(of|from|to|with) what": "name the object",
    r"those (of|that|which)": "repeat the noun",
    r"(let|lets|letting) go of|let go": "free, release, discard",
    r"no one's|nobody's|not ours|of ours|(is|are) theirs": "name the owner",
    r"has (its|a|no) say|have (a|any|no) say": "affects, decides",
    r"no more is|nor is there|nor are there": "put the subject first",
    r"(is|are) none of (its|these|those)|as there is none": "name the object",
    r"be it|were it|were there": "if",
}
PATTERN = re.compile("|".join(rf"\b(?:{phrase})\b" for phrase in PHRASES), re.IGNORECASE)


def rooms() -> dict[str, list[Path]]:
    """The Python files of each room: a folder under fasc_lightning/, its root, recipes/ and benchmarks/."""
    package = ROOT / "fasc_lightning"
    found = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in ("benchmarks", "recipes")}
    found["fasc_lightning"] = sorted(package.glob("*.py"))
    for folder in sorted(path for path in package.iterdir() if path.is_dir()):
        found[f"fasc_lightning/{folder.name}"] = sorted(folder.rglob("*.py"))
    return {room: files for room, files in found.items() if files}


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield each docstring and each block of comments with its first line."""
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (text := ast.get_docstring(node)) is not None:
            yield node.body[0].lineno, text
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, text = token.start[0], token.string.lstrip("#: ")
        if block and line == last + 1:
            block.append(text)
        else:
            if block:
                yield first, " ".join(block)
            block, first = [text], line
        last = line
    if block:
        yield first, " ".join(block)


def found_phrases(source: str) -> list[tuple[int, str]]:
    """Return the line of each text with a phrase of the list, and the phrase; lines may break inside a phrase."""
    texts = ((line, " ".join(text.split())) for line, text in prose(source))
    return [(line, match.group()) for line, text in texts for match in PATTERN.finditer(text)]


@pytest.mark.parametrize(("room", "files"), rooms().items(), ids=list(rooms()))
def test_docstrings_and_comments_have_no_phrase_of_the_list(room, files):
    found = [
        f"{file.relative_to(ROOT)}:{line}: {phrase!r}"
        for file in files
        for line, phrase in found_phrases(file.read_text(encoding="utf-8"))
    ]
    assert not found, f"Reword in {room} (PHRASES names a remedy for each):\n" + "\n".join(found)


def test_docstrings_and_comments_are_read_and_code_is_not():
    source = '"""Title.\n\nWhich is\nsaid."""\nx = "hence"  # let\n# go of\n'
    assert found_phrases(source) == [(1, "is said"), (5, "let go of")]
