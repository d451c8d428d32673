"""Everything by which a training step tells the world of itself, silenced: it runs again, but nothing happened."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyExperiment, DummyLogger

from fasc_lightning._utils import undoing

#: Methods of a LightningModule that report; those that log are errors outside of the training loop.
_REPORTS = ("log", "log_dict", "print")


@contextmanager
def silent(module: pl.LightningModule) -> Iterator[None]:
    """Let a training step run outside of the training loop: what it logs and prints through Lightning goes nowhere.

    That is by ``self.log``, ``self.log_dict`` and ``self.print``, by the Trainer's loggers, which keep their names and
    folders, and by loggers and tensorboard writers that the module holds as attributes.

    Args:
        module: Of the step; LightningModules in it are silenced, too.
    """
    with undoing() as undo:
        for part in module.modules():
            if isinstance(part, pl.LightningModule):
                for name in _REPORTS:
                    undo.set(part, name, _say_nothing)
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
    """A logger that only has another one's name, version and folders; and, for those who ask, its class.

    Args:
        logger: The other one.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # a step may log nothing, or fail, where its logger is of another class
        return type(self._logger)

    @property
    def name(self) -> str | None:  # type: ignore[override]
        """Of the other one."""
        return self._logger.name

    @property
    def version(self) -> int | str | None:  # type: ignore[override]
        """Of the other one."""
        return self._logger.version

    @property
    def save_dir(self) -> str | None:
        """Of the other one."""
        return self._logger.save_dir

    @property
    def log_dir(self) -> str | None:
        """Of the other one, where it has one."""
        return getattr(self._logger, "log_dir", None)

    @property
    def root_dir(self) -> str | None:
        """Of the other one, where it has one."""
        return getattr(self._logger, "root_dir", None)


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a method that reports."""
    del args, kwargs


def _writers() -> tuple[type, ...]:
    """Return the classes of tensorboard's writers, of packages that have been imported."""
    names = ("torch.utils.tensorboard.writer", "tensorboardX")
    return tuple(sys.modules[name].SummaryWriter for name in names if name in sys.modules)
