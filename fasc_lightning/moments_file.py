"""Calibration moments on disk: a safetensors file that appears whole or not at all, and refuses what it is not for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasc_lightning._files import whole_file
from fasc_lightning.moments import CalibrationMoments, LayerSketches
from fasc_lightning.projection import Projection
from fasc_lightning.sketch import Sketch
from fasc_lightning.streams import Reduction, StreamedSums

_FORMAT = 1
_HEADER = "fasc_lightning.moments"


def save_moments(moments: CalibrationMoments, path: str | Path, source: str = "") -> None:
    """Write moments: every sum bit by bit, inputs that layers share once.

    Args:
        moments: Of any needs.
        path: Of the file; its folder is made.
        source: What they were gathered from, as a fingerprint of model, data and settings; :func:`load_moments` can
            ask for it.
    """
    from safetensors.torch import save_file

    tensors, header = pack_moments(moments)
    header |= {"format": _FORMAT, "source": source}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})


def pack_moments(moments: CalibrationMoments) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the sums by name, and in plain data what they are sums of.

    Args:
        moments: Of any needs; they stay what they are, and the tensors are theirs.
    """
    tensors: dict[str, Tensor] = {}
    groups: dict[str, list[Any]] = {}
    for group, streams in _groups(moments).items():
        groups[group] = list(streams)
        for i, stream in enumerate(streams.values()):
            tensors.update({f"{group}.{i}.{state}": value.contiguous() for state, value in stream.sums.items()})
    header = {
        "shapes": moments.shapes,
        "dtype": str(moments.dtype).removeprefix("torch."),
        "needs": sorted(moments.needs),
        "groups": groups,
    }
    if moments.sketches:
        header["sketches"] = {name: asdict(sketch) for name, sketch in moments.sketches.items()}
    return tensors, header


def unpack_moments(
    header: Mapping[str, Any], tensor: Callable[[str], Tensor], device: torch.device | str = "cpu"
) -> CalibrationMoments:
    """Return the moments of which :func:`pack_moments` made a header and tensors.

    Args:
        header: In plain data.
        tensor: Returns a tensor by its name, on the device.
        device: Where the moments shall live.
    """
    moments = empty_moments(header, device)
    for group, streams in _groups(moments).items():
        for i, key in enumerate(header["groups"][group]):
            stream = _stream(moments, streams, key)
            for state in stream.sums:
                setattr(stream, state, tensor(f"{group}.{i}.{state}"))
            stream._update_count = int(stream.count > 0)
    return moments


def empty_moments(header: Mapping[str, Any], device: torch.device | str = "cpu") -> CalibrationMoments:
    """Return moments of nothing that add up with those of a header of :func:`pack_moments`.

    Args:
        header: In plain data.
        device: Where they shall live.
    """
    return CalibrationMoments(
        {name: (m, n) for name, (m, n) in header["shapes"].items()},
        getattr(torch, header["dtype"]),
        device,
        header["needs"],
        {name: _sketches(sides) for name, sides in header.get("sketches", {}).items()},
    )


def load_moments(
    path: str | Path,
    *,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    source: str | None = None,
    device: torch.device | str = "cpu",
) -> CalibrationMoments:
    """Read moments as :func:`save_moments` wrote them.

    Args:
        path: Of the file.
        shapes: (m, n) of each layer of the model that they are for, if that is to be checked.
        source: What they must have been gathered from, if that is to be checked.
        device: Where they shall live.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is of another kind, or is of another model or source.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of moments at {path}, but there is none.")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = _header(file.metadata(), path)
            _check(header, path, shapes, source)
            return unpack_moments(header, file.get_tensor, device)
    except SafetensorError as error:
        raise ValueError(
            f"Expected a whole safetensors file of moments but {path} is damaged ({error}). Delete it and gather again."
        ) from error


def moments_needs(path: str | Path) -> frozenset[str]:
    """Return the needs of the moments in a file, without reading them.

    Raises:
        ValueError: If the file is damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(_header(file.metadata(), Path(path))["needs"])
    except SafetensorError as error:
        raise ValueError(f"Expected a whole safetensors file of moments but {path} is damaged ({error}).") from error


def _sketches(sides: Mapping[str, Mapping[str, Any] | None]) -> LayerSketches:
    def made(options: Mapping[str, Any]) -> Reduction:
        return Sketch(**options) if "kind" in options else Projection(**options)

    return LayerSketches(**{side: None if options is None else made(options) for side, options in sides.items()})


def _groups(moments: CalibrationMoments) -> dict[str, dict[Any, StreamedSums]]:
    """Return all streams by attribute and key; taken from the attributes, so that none can be forgotten."""
    return {
        name: value
        for name, value in vars(moments).items()
        if isinstance(value, dict) and all(isinstance(stream, StreamedSums) for stream in value.values())
    }


def _stream(moments: CalibrationMoments, streams: dict[Any, StreamedSums], key: Any) -> StreamedSums:
    # Inputs are made when a batch tells which layers share them; all others with the layers.
    return moments._input(key) if isinstance(key, list | tuple) else streams[key]


def _header(metadata: Mapping[str, str] | None, path: Path) -> dict[str, Any]:
    if not metadata or _HEADER not in metadata:
        raise ValueError(f"Expected a file of moments but {path} is a safetensors file of something else.")
    header = json.loads(metadata[_HEADER])
    if header["format"] != _FORMAT:
        raise ValueError(
            f"Expected moments of format {_FORMAT} but {path} is of format {header['format']}, written by another "
            "version. Delete it and gather again."
        )
    return header


def _check(
    header: Mapping[str, Any], path: Path, shapes: Mapping[str, tuple[int, int]] | None, source: str | None
) -> None:
    found = {name: tuple(shape) for name, shape in header["shapes"].items()}
    if shapes is not None and found != dict(shapes):
        differing = next(name for name in [*shapes, *found] if found.get(name) != shapes.get(name))
        raise ValueError(
            f"Expected moments of the model's {len(shapes)} layers but {path} is of another model: layer "
            f"{differing!r} is {found.get(differing, 'not there')} in the file and "
            f"{shapes.get(differing, 'not there')} in the model. Gather again, or name another file."
        )
    if source is not None and header["source"] != source:
        raise ValueError(
            f"Expected moments gathered from the source {source!r} but those in {path} are from {header['source']!r}: "
            "another model, tokenizer, text or setting. Gather again, or name another file."
        )
