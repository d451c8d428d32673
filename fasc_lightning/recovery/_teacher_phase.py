"""The teacher in the course of a recovery fit: its check, its start, its cache and its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from fasc_lightning._utils import same_rng
from fasc_lightning.batches import ResumableLoader, TokenMask, as_trained_on, batch_mask, silent, untouched
from fasc_lightning.layers import compressed_layers, is_plain_linear, linear_shape
from fasc_lightning.options import Distillation
from fasc_lightning.recovery._logit_cache import LogitCache, teacher_of
from fasc_lightning.recovery._teacher import Teacher, weights_fingerprint


class TeacherPhase:
    """Gives a module its teacher for the length of a fit.

    Args:
        pl_module: The compressed module.
        dense: The dense layers by name, possibly with others; emptied once a cache replaces them.
        options: Options of the distillation.
        token_mask: Function that returns the mask of real tokens, as for :class:`~fasc_lightning.FascCallback`.

    Attributes:
        fingerprint: Fingerprint of the dense layers; None if some are missing.
    """

    def __init__(
        self,
        pl_module: pl.LightningModule,
        dense: MutableMapping[str, nn.Module],
        options: Distillation,
        token_mask: TokenMask | None,
    ) -> None:
        layers = compressed_layers(pl_module)
        self._module: Any = pl_module
        self._options = options
        self._token_mask = token_mask
        self._given = dense
        self._dense = {
            name: layer
            for name, layer in dense.items()
            if name in layers and is_plain_linear(layer) and linear_shape(layer) == linear_shape(layers[name])
        }
        self._complete = len(self._dense) == len(layers)
        self.fingerprint = weights_fingerprint(self._dense) if self._complete else None

    def check(self, expected: str | None, found: bool) -> None:
        """Check that the dense layers, or a cache, are the ones that the compression replaced.

        Args:
            expected: Fingerprint of the replaced layers, if known.
            found: Whether the dense layers come from the module of a resumed fit, which may hold any weights.

        Raises:
            MisconfigurationException: If the dense layers are missing or others, and no cache replaces them.
        """
        if self._complete and (expected == self.fingerprint or (expected is None and not found)):
            return
        cached = None if self._options.cache is None else teacher_of(self._options.cache)
        if cached is not None and expected in (None, cached):
            self._dense, self.fingerprint = {}, cached
            return
        if self._complete:
            raise MisconfigurationException(
                "Expected the dense layers that were replaced, as the teacher, but the module's are "
                f"{'not known to be the same' if expected is None else 'others'}. HINT: resume with a module that has "
                "the weights from which it was compressed, or use recover(..., dense=...)."
            )
        raise MisconfigurationException(
            "Expected the dense layers that were replaced, as the teacher, but they are not at hand: the module was "
            "compressed by another callback or in another process. HINT: recover with the callback that compressed, "
            "resume with the dense module (a checkpoint makes it compressed again), or use recover(..., dense=...)."
        )

    def start(self, trainer: pl.Trainer, pl_module: Any, initial: Mapping[str, Tensor]) -> None:
        """Make the teacher, once the module is on its device.

        Args:
            trainer: Trainer of the fit.
            pl_module: Module of the fit.
            initial: Initial values of the trained parameters, by name.
        """
        layers = compressed_layers(pl_module)
        originals = {
            name: value for name, value in initial.items() if not any(name.startswith(f"{layer}.") for layer in layers)
        }
        cache = self._cache(trainer)
        pl_module.teacher = Teacher(pl_module, self._dense, self._options, originals=originals, cache=cache)

    def _cache(self, trainer: pl.Trainer) -> LogitCache | None:
        if self._options.cache is None:
            return None

        def mask(batch: Any) -> Tensor | None:
            return batch_mask(self._module, batch, self._token_mask)

        assert self.fingerprint is not None
        description = {"teacher": self.fingerprint, "temperature": self._options.temperature}

        def opened() -> LogitCache:
            return LogitCache(self._options.cache or "", description, mask, self._options.top_k)

        cache = opened() if trainer.is_global_zero else None  # one process makes the folder
        trainer.strategy.barrier()
        return cache or opened()

    def fill(self, trainer: pl.Trainer, pl_module: Any, held: Iterable[Any]) -> None:
        """Fill the cache, if there is one, with the predictions of every sample, and drop the teacher's model.

        If the samples are not known, or the fit does not use all of them, the model stays and predicts each new batch.

        Args:
            trainer: Trainer of the fit.
            pl_module: Module of the fit.
            held: The held-out batches of this process.
        """
        teacher: Teacher | None = pl_module.teacher
        if teacher is None or teacher.cache is None or not teacher.present:
            return
        samples = _all_samples(trainer)
        if samples is None:
            return
        with same_rng(), untouched(pl_module), silent(pl_module), trainer.precision_plugin.forward_context():
            for batches in (samples, held):
                for batch in batches:
                    teacher.fill(as_trained_on(trainer, batch))
        teacher.cache.flush()
        trainer.strategy.barrier()
        teacher.cache.refresh()
        teacher.release()
        self._dense = {}
        self._given.clear()  # so that the caller does not hold them either
        rank_zero_info(
            f"FascCallback: the teacher's predictions are in {self._options.cache!r}, and its model has been dropped."
        )

    def release(self) -> None:
        """Remove the teacher from the module; safe at any time."""
        teacher: Teacher | None = getattr(self._module, "teacher", None)
        if teacher is not None:
            if teacher.cache is not None:
                teacher.cache.flush()
            teacher.release()
            self._module.teacher = None


def _all_samples(trainer: pl.Trainer) -> DataLoader[Any] | None:
    """Return a new loader of this process's share of all training samples.

    Every sample is in one share. The fit's own loader may give other samples in each epoch (``drop_last``, sampling).

    Returns:
        The loader; None if the samples are not known, or the fit does not use all of them.
    """
    combined: Any = trainer.fit_loop._combined_loader
    loader = combined.iterables
    if type(loader) not in (DataLoader, ResumableLoader) or (loader.batch_size is None and loader.batch_sampler):
        return None
    dataset = loader.dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return None
    if trainer.estimated_stepping_batches * trainer.accumulate_grad_batches < len(loader):
        return None
    return DataLoader(
        Subset(dataset, range(trainer.global_rank, len(dataset), trainer.world_size)),
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
