"""Exceptions raised at single lines of a package while it works, and what they leave behind.

Nothing here knows how the package is built: lines are those that a run executes, and what is compared is what a user
sees of modules, Trainers, files, threads and the process.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from snapshots import equal, fingerprint, likeness, parts_of, process, trainer_of, unfinished, values_of
from torch import Tensor, nn

import fasc_lightning

PACKAGE = str(Path(fasc_lightning.__file__).parent) + os.sep

#: What an injected exception says.
MARK = "injected fault"

EXCEPTIONS = (RuntimeError, OSError, MemoryError, KeyboardInterrupt, SystemExit)

Line = tuple[str, int]


class Lines:
    """Counts the lines of the package that are executed in all threads, or raises at one of them.

    Args:
        at: File and line to raise at; None only counts.
        occurrence: How often it is executed before that.
        error: To raise.

    Attributes:
        note: What it returns is in ``noted`` once the exception has been raised.
    """

    def __init__(self, at: Line | None = None, occurrence: int = 0, error: BaseException | None = None) -> None:
        self.counts: Counter[Line] = Counter()
        self.raised = False
        self.note: Callable[[], Any] = lambda: None
        self.noted: Any = None
        self._entered: Any = None
        self._at, self._left, self._error = at, occurrence, error

    def __enter__(self) -> Lines:
        self._before = sys.gettrace(), threading.gettrace()
        threading.settrace(self._enter)
        sys.settrace(self._enter)
        return self

    def __exit__(self, *unused: object) -> None:
        sys.settrace(self._before[0])
        threading.settrace(self._before[1])

    def _enter(self, frame: Any, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if self._at is None:
            return self._count if file.startswith(PACKAGE) else None
        if frame.f_code.co_name == "on_exception":
            self._entered = frame
        return self._raise if file == self._at[0] and not self.raised else None

    def _count(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.counts[frame.f_code.co_filename, frame.f_lineno] += 1
        return self._count

    def _raise(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line" and frame is self._entered:
            # Before that line a callback can do nothing of what it is told to do, and nobody tells it once more.
            self._entered = None
            return self._raise
        if event == "line" and frame.f_lineno == self._at[1] and not self.raised:
            if self._left == 0:
                self.raised, self.noted = True, self.note()
                raise self._error
            self._left -= 1
        return self._raise


@dataclass
class World:
    """A run and all that it must leave as it was.

    Attributes:
        run: Does it.
        module: That it changes.
        trainer: That it uses, if it is not its own.
        callback: Whose report says what was done.
        folder: In which it writes.
        known: Optimizers and schedulers as the fit had them when it began to train.
    """

    run: Callable[[], Any]
    module: nn.Module
    trainer: Any = None
    callback: Any = None
    folder: Path | None = None
    known: dict[str, Any] = field(default_factory=dict)


@dataclass
class Before:
    """A world as it was: the parts keep their objects alive, so that no id is used again."""

    parts: dict[tuple[str, str], Any]
    values: dict[str, Tensor]
    trainer: dict[tuple[str, str], Any]
    process: dict[str, Any]
    reported: bool
    alive: list[Any]

    @classmethod
    def of(cls, world: World) -> Before:
        alive: list[Any] = []

        def look(value: Any) -> Any:
            alive.append(value)
            if isinstance(value, dict):
                alive.extend(value.values())
            return fingerprint(value)

        return cls(
            parts_of(world.module, look),
            values_of(world.module),
            {} if world.trainer is None else trainer_of(world.trainer, look),
            process(),
            _reported(world),
            alive,
        )


def _reported(world: World) -> bool:
    report = getattr(world.callback, "report", None)
    return report is not None and (world.callback.recovery is None or report.recovery is not None)


@dataclass
class Done:
    """A world once a run has succeeded, as another run of it can be compared with."""

    parts: dict[tuple[str, str], Any]
    values: dict[str, Tensor]

    @classmethod
    def of(cls, world: World) -> Done:
        return cls(parts_of(world.module, likeness), values_of(world.module))


def differences(before: dict[Any, Any], after: dict[Any, Any], ignored: frozenset[Any] = frozenset()) -> list[Any]:
    keys = [*before, *(key for key in after if key not in before)]
    none = object()
    return [k for k in keys if k not in ignored and before.get(k, none) != after.get(k, none)]


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Collect what a run says: warnings, log messages, exceptions that Python could only print.

    What Lightning does to the process when it is interrupted is undone.

    Yields:
        The messages.
    """
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, loggers = Keep(), [logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric")]
    usual = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    unraisable, hook = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = lambda args: said.append(f"unraisable: {args.exc_value!r}")
    threading.excepthook = lambda args: said.append(f"thread: {args.exc_value!r}")
    signals = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    scratch, tempfile.tempdir = tempfile.tempdir, str(folder / "scratch")
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    filters, gradients = list(warnings.filters), torch.is_grad_enabled()
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        said += [str(w.message) for w in caught]
    finally:
        warnings.filters[:] = filters
        torch.set_grad_enabled(gradients)
        for logger, handlers, propagates in usual:
            logger.handlers, logger.propagate = handlers, propagates
        sys.unraisablehook, threading.excepthook = unraisable, hook
        tempfile.tempdir = scratch
        for number, kept in signals.items():
            signal.signal(number, kept)


def chain(error: BaseException | None, context: bool) -> Iterator[BaseException]:
    """Yield an exception and what it was raised from; also what it was raised after, if that is asked for."""
    while error is not None:
        yield error
        error = error.__cause__ or (error.__context__ if context else None)


@dataclass
class Trial:
    """What became of a run with an exception in it.

    Attributes:
        reached: Whether the line was executed.
        outcome: "old" or "new" state, or "broken".
        leaks: What was left, by kind.
    """

    reached: bool = False
    outcome: str = ""
    leaks: list[str] = field(default_factory=list)


def attempt(
    make: Callable[[Path], World],
    folder: Path,
    done: Sequence[Done],
    ordinary: frozenset[Any],
    at: Line,
    occurrence: int,
    kind: type[BaseException],
) -> Trial:
    """Run a world with an exception raised at a line, and tell what it leaves.

    Args:
        make: Makes the world.
        folder: In which it may write.
        done: Of runs that ended as they may.
        ordinary: Attributes that fits without the package change as well.
        at: Where to raise.
        occurrence: How often the line is executed before.
        kind: Of the exception.
    """
    trial = Trial()
    error = kind(MARK)
    arrived: BaseException | None = None
    lines = Lines(at, occurrence, error)
    with watched(folder) as said:
        world = make(folder)
        before = Before.of(world)
        lines.note = lambda: world.trainer is not None and world.trainer.validating
        within = process()
        try:
            with lines:
                world.run()
        except BaseException as caught:
            arrived = caught
        after = process()
    trial.reached = lines.raised
    if not lines.raised:
        return trial
    leaks = trial.leaks
    leaks += [f"process: {key}" for key in differences(within, after)]
    leaks += [f"{message}" for message in said if message.startswith(("unraisable", "thread"))]
    # What arrives.
    if arrived is None:
        if not any(MARK in message for message in [*said, *_reasons(world)]):
            leaks.append("swallowed")
    elif not _arrives(error, arrived):
        leaks.append(f"replaced by {type(arrived).__name__}: {str(arrived)[:80]}")
    # The module: what it was, or what it was to become.
    parts = parts_of(world.module, fingerprint)
    old = [f"{name}.{key}" for name, key in differences(before.parts, parts, ordinary)]
    if lines.noted:  # Lightning leaves modules in eval mode when a validation fails
        old = [key for key in old if not key.endswith(".training")]
    if not equal(before.values, values_of(world.module)):
        old.append("values")
    is_new = bool(old) and any(_is(world.module, state, ordinary) for state in done)
    trial.outcome = "new" if is_new else "old" if not old else "broken"
    if trial.outcome == "broken":
        leaks += [f"module: {'.'.join(kinds)}" for kinds in {tuple(o.rsplit(".", 1)[1:]) or (o,) for o in old}]
    elif world.callback is not None and _reported(world) != (is_new or before.reported):
        leaks.append(f"report: {_reported(world)} of a module that is {trial.outcome}")
    if world.trainer is not None:
        now = trainer_of(world.trainer)
        leaks += [f"{name}: {key}" for name, key in differences(before.trainer, now, ordinary)]
        leaks += _lost(world, is_new)
    if world.folder is not None:
        leaks += [f"file: {Path(name).suffix or name}" for name in unfinished(world.folder)]
    del arrived
    return trial


def _is(module: nn.Module, state: Done, ordinary: frozenset[Any]) -> bool:
    """Tell whether a module is in a state in which a run left another one."""
    return not differences(state.parts, parts_of(module, likeness), ordinary) and equal(state.values, values_of(module))


def _reasons(world: World) -> list[str]:
    history = getattr(world.callback, "rho_history", None)
    return [] if not history else [row["reason"] for row in history if row["reason"]]


def _arrives(error: BaseException, arrived: BaseException) -> bool:
    """Tell whether the first exception arrives, itself or as the cause of one; Lightning exits in place of Ctrl-C."""
    if any(found is error for found in chain(arrived, context=False)):
        return True
    if isinstance(arrived, InterruptedError):  # with which a scenario has failed before
        return True
    exits = isinstance(error, KeyboardInterrupt) and isinstance(arrived, SystemExit)
    return exits and any(found is error for found in chain(arrived, context=True))


def _lost(world: World, is_new: bool) -> list[str]:
    """Return what a Trainer lacks of what it had when it began to train, or has of another kind."""
    strategy, lost = world.trainer.strategy, []
    if not world.known:
        return lost
    optimizers, schedulers, kinds = (world.known[key] for key in ("optimizers", "schedulers", "kinds"))
    if strategy.optimizers != optimizers and not (is_new and strategy.optimizers == []):
        lost.append("trainer: optimizers")
    if strategy.lr_scheduler_configs != schedulers and not (is_new and strategy.lr_scheduler_configs == []):
        lost.append("trainer: schedulers")
    if [type(config.scheduler) for config in schedulers] != kinds:
        lost.append("trainer: class of a scheduler")
    if any("step" in vars(config.scheduler) for config in schedulers):
        lost.append("trainer: step of a scheduler")
    return lost


def record(make: Callable[[Path], World], folder: Path, warm: bool = True) -> tuple[Counter[Line], Done]:
    """Return the lines that a run executes, and what it leaves when it succeeds, or fails as it is meant to.

    Args:
        make: Makes the world.
        folder: In which it may write.
        warm: Whether to run it once before, so that what only a first run does (imports, caches) is not counted.
    """
    for number in range(1 + warm):
        lines = Lines()
        with watched(folder):
            world = make(folder / f"run{number}")
            with lines if number == warm else nullcontext(), suppress(InterruptedError):
                world.run()
    return lines.counts, Done.of(world)


@dataclass(frozen=True)
class Case:
    """One trial to be made: a scenario's name and the arguments of :func:`attempt`."""

    scenario: str
    at: Line
    occurrence: int
    kind: type[BaseException]

    def __str__(self) -> str:
        file = self.at[0].removeprefix(PACKAGE)
        return f"{self.kind.__name__} at {file}:{self.at[1]}, execution {self.occurrence + 1}, in {self.scenario!r}"


def plan(executed: Mapping[str, Counter[Line]], each: int, seed: int = 0) -> list[Case]:
    """Return trials of all lines: of each line some, in scenarios and at executions drawn at random.

    Args:
        executed: The lines of each scenario, and how often they are executed.
        each: How many trials of a line.
        seed: Of what is drawn.
    """
    draw = random.Random(seed)
    cases = []
    for line in sorted(set().union(*executed.values())):
        names = [name for name, counts in executed.items() if line in counts]
        for _ in range(each):
            name = draw.choice(names)
            last = executed[name][line] - 1
            occurrence = draw.choice((0, last, draw.randint(0, last)))
            cases.append(Case(name, line, occurrence, draw.choice(EXCEPTIONS)))
    draw.shuffle(cases)
    return cases
