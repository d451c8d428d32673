"""The parser and the entry of a program: options, errors in one line, exit codes, Ctrl-C."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import ArgumentParser
from safetensors import SafetensorError
from typing_extensions import override

from fasc_lightning._utils import did_you_mean

#: Exit codes: bad input, and Ctrl-C as a shell reports it.
BAD_INPUT, INTERRUPTED = 2, 130

#: Characters of the longest message.
LONGEST = 1000

#: Shows the traceback of an error.
DEBUG = "--debug"

#: Errors that a user can mend. Others are faults of the program, whose traceback is always shown.
USER_ERRORS = (
    OSError,
    ValueError,
    MemoryError,
    ModuleNotFoundError,
    FloatingPointError,
    SafetensorError,
    torch.OutOfMemoryError,
)


class CommandParser(ArgumentParser):
    """Parser of a program's options, whose errors are one line.

    Args:
        text: Docstring of the program; its first line describes it.
    """

    def __init__(self, text: str | None) -> None:
        super().__init__(
            prog=program_name(),
            description=(text or "").split("\n")[0],
            epilog=f"{DEBUG} shows the traceback of an error.",
        )

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message, re.IGNORECASE)
        near = did_you_mean(unknown[1], self._option_string_actions) if unknown else ""
        self.exit(BAD_INPUT, f"{self.prog}: {one_line(message)}{near} Options: {self.prog} --help\n")
        raise AssertionError  # exit does not return


def program_name() -> str:
    """Return the name of the running program: "compress.py", or "fasc compress"."""
    return Path(sys.argv[0]).name


def one_line(error: object) -> str:
    """Return a message in one line that ends in a full stop; libraries' lists of names are cut."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return text if text.endswith((".", "!", "?")) else f"{text}."


def run_program(main: Callable[[list[str]], Any], arguments: Sequence[str] | None = None) -> None:
    """Run a program for a person: an error of the input is one line and exit code 2, Ctrl-C is exit code 130.

    ``--debug`` among the arguments shows the traceback of an error instead.

    Args:
        main: The program; its result is ignored.
        arguments: Its arguments; by default the process's.

    Raises:
        SystemExit: After an error, or if the program exits by itself.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    kept = [argument for argument in given if argument != DEBUG]
    if arguments is None:
        sys.argv[1:] = kept  # for programs whose parser reads it by itself
    try:
        main(kept)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # a Trainer turns Ctrl-C into exit code 1
            _interrupted()
        raise
    except Exception as error:
        if DEBUG in given or not is_user_error(error):
            raise
        print(f"{program_name()}: {one_line(error)}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def is_user_error(error: Exception) -> bool:
    """Tell whether an error comes from the input: by its type, or by this package's form of a message on types."""
    return isinstance(error, USER_ERRORS) or (isinstance(error, TypeError) and str(error).startswith("Expected"))


def _interrupted() -> NoReturn:
    print(f"\n{program_name()}: interrupted. No file is half-written.", file=sys.stderr)
    sys.exit(INTERRUPTED)
