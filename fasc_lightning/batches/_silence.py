"""Silence for a training step that runs again: nothing is logged or printed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyExperiment, DummyLogger

from fasc_lightning._utils import undoing

#: Methods of a LightningModule that log or print. Logging is an error outside of the training loop.
_REPORTS = ("log", "log_dict", "print")


@contextmanager
def silent(module: pl.LightningModule) -> Iterator[None]:
    """Silence a training step, so that it can run outside of the training loop.

    ``self.log``, ``self.log_dict`` and ``self.print`` do nothing. The Trainer's loggers, which keep their names and
    folders, drop their input, as do loggers and tensorboard writers that are attributes of the module.

    Args:
        module: Module of the step; LightningModules inside of it are silenced, too.
    """
    with undoing() as undo:
        for part in module.modules():
            if isinstance(part, pl.LightningModule):
                for name in _REPORTS:
                    undo.set(part, name, _do_nothing)
            for name, value in list(vars(part).items()):
                if isinstance(value, Logger):
                    undo.set(part, name, MutedLogger(value))
                elif isinstance(value, _writers()):
                    undo.set(part, name, DummyExperiment())
        trainer: Any = module._trainer  # the property raises where there is none
        if trainer is not None:
            undo.add(setattr, trainer, "loggers", trainer.loggers)
            trainer.loggers = [MutedLogger(logger) for logger in trainer.loggers]
        yield


class MutedLogger(DummyLogger):
    """A logger that drops its input. It has another logger's name, version, folders and apparent class.

    Args:
        logger: The other logger.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # a step may check its logger's class
        return type(self._logger)

    @property
    def name(self) -> str | None:  # type: ignore[override]
        """Name of the other logger."""
        return self._logger.name

    @property
    def version(self) -> int | str | None:  # type: ignore[override]
        """Version of the other logger."""
        return self._logger.version

    @property
    def save_dir(self) -> str | None:
        """Save folder of the other logger."""
        return self._logger.save_dir

    @property
    def log_dir(self) -> str | None:
        """Log folder of the other logger, or None."""
        return getattr(self._logger, "log_dir", None)

    @property
    def root_dir(self) -> str | None:
        """Root folder of the other logger, or None."""
        return getattr(self._logger, "root_dir", None)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a method that logs or prints."""
    del args, kwargs


def _writers() -> tuple[type, ...]:
    """Return the classes of tensorboard's writers in packages that have been imported."""
    names = ("torch.utils.tensorboard.writer", "tensorboardX")
    return tuple(sys.modules[name].SummaryWriter for name in names if name in sys.modules)
