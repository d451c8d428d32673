"""Second moments of inputs and gradients: accumulated, packed, sketched, projected, offloaded, on disk."""

from fasc_lightning.statistics._accumulators import Accumulator, CoupledMoments, Moments
from fasc_lightning.statistics._collector import CalibrationMoments
from fasc_lightning.statistics._cpu_offload import MomentsDevice, MomentSums, RowsRefusedError, offloaded
from fasc_lightning.statistics._expert_pooling import BorrowedMoments, borrows, tokens_behind
from fasc_lightning.statistics._file import (
    MOMENTS_HEADER,
    empty_moments,
    load_moments,
    moments_entries,
    moments_needs,
    pack_moments,
    save_moments,
    unpack_moments,
)
from fasc_lightning.statistics._fisher import SequenceFisher
from fasc_lightning.statistics._layer_moments import NEEDS, LayerMoments, check_needs, not_gathered
from fasc_lightning.statistics._layer_sketches import LayerSketches
from fasc_lightning.statistics._packed import add_gram_, packed_size, unpack
from fasc_lightning.statistics._projected import ProjectedMoment, Projection
from fasc_lightning.statistics._reduction import Reduction
from fasc_lightning.statistics._second_moments import SecondMoment, apply, congruence, dense, diagonal_moment
from fasc_lightning.statistics._size import moment_dtype, moments_bytes
from fasc_lightning.statistics._sketch import Sketch
from fasc_lightning.statistics._sketch_error import SketchFigures, sketch_figures

__all__ = [
    "MOMENTS_HEADER",
    "NEEDS",
    "Accumulator",
    "BorrowedMoments",
    "CalibrationMoments",
    "CoupledMoments",
    "LayerMoments",
    "LayerSketches",
    "MomentSums",
    "Moments",
    "MomentsDevice",
    "ProjectedMoment",
    "Projection",
    "Reduction",
    "RowsRefusedError",
    "SecondMoment",
    "SequenceFisher",
    "Sketch",
    "SketchFigures",
    "add_gram_",
    "apply",
    "borrows",
    "check_needs",
    "congruence",
    "dense",
    "diagonal_moment",
    "empty_moments",
    "load_moments",
    "moment_dtype",
    "moments_bytes",
    "moments_entries",
    "moments_needs",
    "not_gathered",
    "offloaded",
    "pack_moments",
    "packed_size",
    "save_moments",
    "sketch_figures",
    "tokens_behind",
    "unpack",
    "unpack_moments",
]
