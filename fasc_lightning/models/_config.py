"""The description of a compressed model in its ``config.json``: the file format "fasc"."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from fasc_lightning._utils import check, mapping, text
from fasc_lightning.layers import Grid, check_layers, form_from_plain
from fasc_lightning.models._folder_checks import FILES

QUANT_METHOD = "fasc"

#: The newest format that this version reads. Layers with matrices of few bits are written in it.
FORMAT_VERSION = 2

#: The format of all other folders, which earlier versions of this package read, too.
_FORMAT_WITHOUT_GRIDS = 1


class FascConfig(QuantizationConfigMixin):
    """The description of a compressed model in its ``config.json``, under ``quantization_config``.

    Args:
        layers: For each compressed layer, by its dotted name in the model: "rank" (int), "layout" ("pivot" or
            "factors"), "bias" (bool) and, for the pivot layout, "side" ("in" or "out"). A quantised layer also has
            "quantize": "int8", "int8-dynamic" or {"bits": int, "group": int or None, "symmetric": bool}. Its layout can
            be "dense" or, on a grid, "residual", whose "rank" is that of the residual.
        format_version: The format of the folder that is read. The attribute is the oldest format that has such layers.
        provenance: How the model was made (method, budget, ...), in JSON types. Loading does not use it.
        quant_method: "fasc".
        **more: More provenance; "files" holds the checksums of the weights that :func:`save_compressed` wrote.

    Raises:
        ValueError: If the folder was written by a newer format, or a layer's description is not valid.
        TypeError: If the provenance has other types than JSON's (a ValueError if it holds NaN or infinity).
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = _FORMAT_WITHOUT_GRIDS,
        provenance: Mapping[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        **more: Any,
    ) -> None:
        # First, because nothing else in a newer format can be checked.
        _check_version(format_version)
        if quant_method != QUANT_METHOD:
            raise ValueError(f"Expected quant_method {QUANT_METHOD!r}, got {quant_method!r}.")
        self.quant_method = quant_method  # type: ignore[assignment] # its own methods are an enum, others' are strings
        self.layers = check_layers(layers)
        self.format_version = _oldest_version(self.layers)
        # Through JSON, so that it is the same now as after a reload.
        if (files := more.pop(FILES, None)) is not None:
            check(files, mapping(text), "The entry 'files' of quantization_config")
            self.files = dict(files)  # they hold for the folder that is read alone
        self.provenance: dict[str, Any] = json.loads(json.dumps({**(provenance or {}), **more}, allow_nan=False))


def _oldest_version(layers: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the oldest format that can describe layers."""
    forms = [form_from_plain(spec["quantize"]) for spec in layers.values() if "quantize" in spec]
    return FORMAT_VERSION if any(isinstance(form, Grid) for form in forms) else _FORMAT_WITHOUT_GRIDS


def _check_version(version: Any) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"Expected format_version to be an integer from 1 to {FORMAT_VERSION}, got {version!r}.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"Expected format_version {FORMAT_VERSION} or older, got {version}: the model was saved by a newer "
            "fasc-lightning. Upgrade it to load this model."
        )


def method_of(config: Any) -> Any:
    """Return quant_method of a configuration, which is an object or JSON."""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return getattr(method, "value", method)


def is_fasc(config: Any) -> bool:
    return method_of(config) == QUANT_METHOD
