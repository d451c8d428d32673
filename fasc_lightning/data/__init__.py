"""Texts, windows of tokens, fine-tuning data, and models by name."""

from fasc_lightning._utils import model_fingerprint
from fasc_lightning.data._finetune import EMPTY, FinetuneData, check_data_options, finetune_data
from fasc_lightning.data._finetune_encoding import OVERLONG
from fasc_lightning.data._pretrained import (
    SMOLLM2,
    SMOLLM2_LICENCE,
    SMOLLM2_SOURCE,
    check_model,
    load_config,
    load_model,
    load_tokenizer,
    model_folder,
)
from fasc_lightning.data._sources import SELF, check_file, check_sources, named_files
from fasc_lightning.data._text_files import json_row, open_text, read_text
from fasc_lightning.data._windows import calibration_windows, check_window, file_windows, text_windows, window_loader

__all__ = [
    "EMPTY",
    "OVERLONG",
    "SELF",
    "SMOLLM2",
    "SMOLLM2_LICENCE",
    "SMOLLM2_SOURCE",
    "FinetuneData",
    "calibration_windows",
    "check_data_options",
    "check_file",
    "check_model",
    "check_sources",
    "check_window",
    "file_windows",
    "finetune_data",
    "json_row",
    "load_config",
    "load_model",
    "load_tokenizer",
    "model_folder",
    "model_fingerprint",
    "named_files",
    "open_text",
    "read_text",
    "text_windows",
    "window_loader",
]
