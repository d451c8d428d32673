"""Compressed models as a whole: saving, loading, plans, dense models, int8, checkpoints."""

from fasc_lightning.models._attach import attach_config
from fasc_lightning.models._card import model_card
from fasc_lightning.models._checkpoints import match_checkpoint, match_on_load, say_loading
from fasc_lightning.models._decoding import prepare_decoding
from fasc_lightning.models._densify import to_dense
from fasc_lightning.models._layer_plan import apply_plan, compression_plan
from fasc_lightning.models._load import is_compressed_config, load_compressed
from fasc_lightning.models._quantize import quantize, quantize_layers
from fasc_lightning.models._save import check_folder, save_compressed

__all__ = [
    "apply_plan",
    "attach_config",
    "check_folder",
    "compression_plan",
    "is_compressed_config",
    "load_compressed",
    "match_checkpoint",
    "match_on_load",
    "model_card",
    "prepare_decoding",
    "quantize",
    "quantize_layers",
    "save_compressed",
    "say_loading",
    "to_dense",
]
