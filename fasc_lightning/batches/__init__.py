"""Batches: their counted tokens, the scale of their losses, and kept batches that run again."""

from fasc_lightning.batches._backwards import Backwards, skips_backward
from fasc_lightning.batches._codec import UnsavableBatchError, pack_batch, tensor_names, unpack_batch
from fasc_lightning.batches._contents import count_tokens, identifying_tensor
from fasc_lightning.batches._first_process import on_first_process
from fasc_lightning.batches._kept import KeptBatch, KeptBatches, Place
from fasc_lightning.batches._loader_state import (
    LOOPS_BEFORE,
    begin_epoch,
    check_position,
    go_back,
    is_stateful,
    loops_before,
    obstacle,
    position,
    restore_position,
    train_loaders,
)
from fasc_lightning.batches._loss_graph import graph_alone
from fasc_lightning.batches._masks import TokenMask, batch_mask
from fasc_lightning.batches._resumable_loader import ResumableLoader, restore_loaders
from fasc_lightning.batches._rows import (
    backwards_of,
    batch_label,
    calibration_rows,
    observed_rows,
    replayed_rows,
    sampled_rows,
)
from fasc_lightning.batches._sampling import MAX_SEQUENCES, MIN_SEQUENCES, sample_seeds
from fasc_lightning.batches._scaling import LossScales, LossTerms, loss_terms_of, reads_loss
from fasc_lightning.batches._silence import silent
from fasc_lightning.batches._token_batches import as_token_batch, check_token_ids, is_hf_dataset, token_batches
from fasc_lightning.batches._tokens import TokenRows
from fasc_lightning.batches._training_step import (
    NoLossError,
    TrainingStep,
    as_trained_on,
    brought,
    check_automatic,
    takes_iterator,
)
from fasc_lightning.batches._untouched import untouched

__all__ = [
    "LOOPS_BEFORE",
    "MAX_SEQUENCES",
    "MIN_SEQUENCES",
    "Backwards",
    "KeptBatch",
    "KeptBatches",
    "LossScales",
    "LossTerms",
    "NoLossError",
    "Place",
    "ResumableLoader",
    "TokenMask",
    "TokenRows",
    "TrainingStep",
    "UnsavableBatchError",
    "as_token_batch",
    "check_token_ids",
    "as_trained_on",
    "backwards_of",
    "batch_label",
    "batch_mask",
    "begin_epoch",
    "brought",
    "calibration_rows",
    "check_automatic",
    "check_position",
    "count_tokens",
    "go_back",
    "graph_alone",
    "identifying_tensor",
    "is_hf_dataset",
    "is_stateful",
    "loops_before",
    "loss_terms_of",
    "observed_rows",
    "obstacle",
    "on_first_process",
    "pack_batch",
    "position",
    "reads_loss",
    "replayed_rows",
    "restore_loaders",
    "restore_position",
    "sample_seeds",
    "sampled_rows",
    "silent",
    "skips_backward",
    "takes_iterator",
    "tensor_names",
    "token_batches",
    "train_loaders",
    "unpack_batch",
    "untouched",
]
