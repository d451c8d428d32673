"""Calibration moments on disk: a safetensors file that appears whole or not at all, and refuses what it is not for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasc_lightning._files import whole_file
from fasc_lightning.moments import CalibrationMoments
from fasc_lightning.streams import StreamedSums

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

    tensors: dict[str, Tensor] = {}
    groups: dict[str, list[Any]] = {}
    for group, streams in _groups(moments).items():
        groups[group] = list(streams)
        for i, stream in enumerate(streams.values()):
            for state in stream.metric_state:
                tensors[f"{group}.{i}.{state}"] = getattr(stream, state).contiguous()
    header = {
        "format": _FORMAT,
        "source": source,
        "shapes": moments.shapes,
        "dtype": str(moments.dtype).removeprefix("torch."),
        "needs": sorted(moments.needs),
        "groups": groups,
    }
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})


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
            moments = CalibrationMoments(
                {name: (m, n) for name, (m, n) in header["shapes"].items()},
                getattr(torch, header["dtype"]),
                device,
                header["needs"],
            )
            for group, streams in _groups(moments).items():
                for i, key in enumerate(header["groups"][group]):
                    _restore(_stream(moments, streams, key), file, f"{group}.{i}.")
    except SafetensorError as error:
        raise ValueError(
            f"Expected a whole safetensors file of moments but {path} is damaged ({error}). Delete it and gather again."
        ) from error
    return moments


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


def _groups(moments: CalibrationMoments) -> dict[str, dict[Any, StreamedSums]]:
    """Return all streams by attribute and key; taken from the attributes, so that none can be forgotten."""
    return {
        name: value
        for name, value in vars(moments).items()
        if isinstance(value, dict) and all(isinstance(stream, StreamedSums) for stream in value.values())
    }


def _stream(moments: CalibrationMoments, streams: dict[Any, StreamedSums], key: Any) -> StreamedSums:
    # Inputs are made when a batch tells which layers share them; all others with the layers.
    return moments._input(key) if isinstance(key, list) else streams[key]


def _restore(stream: StreamedSums, file: Any, prefix: str) -> None:
    for state in stream.metric_state:
        setattr(stream, state, file.get_tensor(prefix + state))
    stream._update_count = int(stream.count > 0)


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
