"""Calibration moments in a safetensors file, written atomically and checked against the model that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasc_lightning._utils import (
    Entry,
    SchemaError,
    anything,
    check_names,
    check_sum,
    checksum,
    integer,
    listed,
    mapping,
    naming,
    one_of,
    open_tensors,
    optional,
    parse_json,
    record,
    row,
    tensor_checksums,
    text,
    whole_file,
)
from fasc_lightning.statistics._accumulators import Accumulator
from fasc_lightning.statistics._collector import CalibrationMoments
from fasc_lightning.statistics._layer_moments import NEEDS
from fasc_lightning.statistics._layer_sketches import LayerSketches
from fasc_lightning.statistics._projected import Projection
from fasc_lightning.statistics._reduction import Reduction
from fasc_lightning.statistics._sketch import SKETCH_KINDS, Sketch

#: Format of the files that this version writes. Format 1, which has no checksums, can be read, too.
_FORMAT = 2
_HEADER = "fasc_lightning.moments"

#: Widest side of a layer that a header may name, and largest count of tokens.
_MAX_WIDTH, _MAX_COUNT = 2**31, 2**53

_WIDTH = integer(1, _MAX_WIDTH)
_SIDE = record({"features": _WIDTH, "size": _WIDTH}, {"seed": integer(-(2**63), 2**63), "kind": one_of(*SKETCH_KINDS)})

#: Schema of the header that :func:`pack_moments` returns.
MOMENTS_HEADER = record(
    {
        "shapes": mapping(row(_WIDTH, _WIDTH)),
        "dtype": one_of("float32", "float64"),
        "needs": listed(one_of(*NEEDS), distinct=True),
        "groups": mapping(listed(anything)),  # checked against the moments that the rest describes
    },
    {"sketches": mapping(record({"inputs": optional(_SIDE), "outputs": optional(_SIDE)}))},
)

_FILE_HEADER = record(
    {"format": integer(1, _FORMAT), "source": text}, {"checksum": text, "checksums": mapping(text)}, extra=True
)


def save_moments(moments: CalibrationMoments, path: str | Path, source: str = "") -> None:
    """Write moments bit by bit; inputs that layers share are written once.

    Args:
        moments: Moments with any needs.
        path: Path of the file; its folder is made.
        source: Fingerprint of the model, data and settings behind the moments; :func:`load_moments` can compare it.
    """
    from safetensors.torch import save_file

    tensors, header = pack_moments(moments)
    header |= {"format": _FORMAT, "source": source, "checksums": tensor_checksums(tensors)}
    header["checksum"] = checksum(header)
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})


def pack_moments(moments: CalibrationMoments) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the sums by name, and a header of plain data that describes them.

    Args:
        moments: Moments with any needs; they are not changed, and the tensors are not copied.
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


def moments_entries(header: Mapping[str, Any]) -> dict[str, Entry]:
    """Return the schema of each tensor that belongs to a header, without allocating the tensors.

    Args:
        header: Header as read, not checked yet.

    Raises:
        SchemaError: If it is not a header of :func:`pack_moments`.
    """
    MOMENTS_HEADER(header, "")
    try:
        moments = empty_moments(header)
    except ValueError as error:
        raise SchemaError(str(error)) from error
    groups = _groups(moments)
    if unknown := [name for name, keys in header["groups"].items() if keys and name not in groups]:
        raise SchemaError(f"Expected no group {unknown[0]!r} but there is one.")
    entries: dict[str, Entry] = {}
    for group, streams in groups.items():
        keys = header["groups"].get(group, [])
        _check_keys(group, keys, moments, streams)
        for i, key in enumerate(keys):
            stream = _stream(moments, streams, key)
            # States without any row are scalars.
            for state, shape in stream.state_shapes.items():
                entries[f"{group}.{i}.{state}"] = Entry((moments.dtype,), ((), shape))
            entries[f"{group}.{i}.count"] = Entry((torch.float64,), ((),), 0, _MAX_COUNT)
    return entries


def unpack_moments(
    header: Mapping[str, Any], tensor: Callable[[str], Tensor], device: torch.device | str = "cpu"
) -> CalibrationMoments:
    """Return the moments of a header and tensors from :func:`pack_moments`.

    Args:
        header: Plain data that :func:`moments_entries` accepts.
        tensor: Returns a tensor by its name, on the device.
        device: Device of the moments.

    Raises:
        SchemaError: If the tensors of a stream do not fit together.
    """
    moments = empty_moments(header, device)
    for group, streams in _groups(moments).items():
        for i, key in enumerate(header["groups"].get(group, [])):
            stream = _stream(moments, streams, key)
            for state in stream.sums:
                setattr(stream, state, tensor(f"{group}.{i}.{state}"))
            _check_stream(f"{group}.{i}", stream)
    reached = {name for key, stream in moments.inputs.items() if stream.count > 0 for name in key}
    if lost := [name for name, stream in moments.gradients.items() if stream.count > 0 and name not in reached]:
        raise SchemaError(f"Expected inputs of the layer {lost[0]!r}, which has gradients, but there are none.")
    return moments


def empty_moments(header: Mapping[str, Any], device: torch.device | str = "cpu") -> CalibrationMoments:
    """Return empty moments to which moments with a header of :func:`pack_moments` can be added.

    Args:
        header: Plain data.
        device: Device of the moments.
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
    """Read moments that :func:`save_moments` wrote.

    Args:
        path: Path of the file.
        shapes: (m, n) of each layer of the model, to be compared; None compares nothing.
        source: Expected source, to be compared; None compares nothing.
        device: Device of the moments.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, of another kind, or from another model or source.
    """
    path = Path(path)
    with open_tensors(path, "file of moments") as (tensors, metadata):
        with naming(_damaged(path)):
            header, checksums = _header(metadata, path)
        _check(header, path, shapes, source)
        with naming(_damaged(path)):
            tensors.expect(moments_entries(_own(header)), checksums)
            return unpack_moments(header, lambda name: tensors.read(name).to(device), device)


def moments_needs(path: str | Path) -> frozenset[str]:
    """Return the needs of the moments in a file; only its header is read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or of another kind.
    """
    with open_tensors(path, "file of moments") as (_, metadata), naming(_damaged(Path(path))):
        return frozenset(_header(metadata, Path(path))[0]["needs"])


def _damaged(path: Path) -> str:
    return f"Delete the moments in {path} and gather again: the file"


def _sketches(sides: Mapping[str, Mapping[str, Any] | None]) -> LayerSketches:
    def made(options: Mapping[str, Any]) -> Reduction:
        return Sketch(**options) if "kind" in options else Projection(**options)

    return LayerSketches(**{side: None if options is None else made(options) for side, options in sides.items()})


def _groups(moments: CalibrationMoments) -> dict[str, dict[Any, Accumulator]]:
    """Return all streams by attribute and key, collected from the attributes so that none is forgotten."""
    return {
        name: value
        for name, value in vars(moments).items()
        if isinstance(value, dict) and all(isinstance(stream, Accumulator) for stream in value.values())
    }


def _stream(moments: CalibrationMoments, streams: dict[Any, Accumulator], key: Any) -> Accumulator:
    # Input streams are made when a batch shows which layers share them; all others exist from the start.
    return moments._input(key) if isinstance(key, list | tuple) else streams[key]


def _check_keys(group: str, keys: Any, moments: CalibrationMoments, streams: Mapping[Any, Accumulator]) -> None:
    """Refuse keys of a group that are not the moments' layers."""
    path = f"groups.{group}"
    if group != "inputs":
        listed(text, len(streams), distinct=True)(keys, path)
        check_names(keys, streams, f"layer in {path}")
        return
    listed(listed(one_of(*moments.shapes), distinct=True))(keys, path)
    for i, members in enumerate(keys):
        if len({moments.shapes[name][1] for name in members}) != 1:
            raise SchemaError(f"Expected layers of one width at '{path}[{i}]' but got none, or several widths.")
    if len({tuple(sorted(members)) for members in keys}) < len(keys):
        raise SchemaError(f"Expected distinct sets of layers at {path!r} but one comes twice.")


def _check_stream(name: str, stream: Accumulator) -> None:
    """Refuse a stream with a count and without sums."""
    whole = [getattr(stream, state).shape == shape for state, shape in stream.state_shapes.items()]
    if stream.count > 0 and not all(whole):
        raise SchemaError(f"Expected sums of {float(stream.count):g} vectors at {name!r} but they are missing.")


def _own(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a file's header that describes the moments."""
    return {k: v for k, v in header.items() if k not in ("format", "source", "checksum", "checksums")}


def _header(metadata: Mapping[str, str], path: Path) -> tuple[dict[str, Any], Mapping[str, str] | None]:
    """Return the header of a file and the checksums of its tensors; None for a format without checksums."""
    if _HEADER not in metadata:
        raise ValueError(f"Expected a file of moments but {path} is a safetensors file of something else.")
    header = parse_json(metadata[_HEADER], f"The header of {path}")
    found = header.get("format") if isinstance(header, Mapping) else None
    if type(found) is not int or found not in (1, _FORMAT):
        raise ValueError(
            f"Expected moments of format {_FORMAT} but {path} is of format {found!r:.40}, written by another "
            "version. Delete it and gather again."
        )
    _FILE_HEADER(header, "")
    if found > 1:
        record({"checksum": text, "checksums": mapping(text)}, extra=True)(header, "")
        check_sum(checksum({k: v for k, v in header.items() if k != "checksum"}), header["checksum"], "a header")
    MOMENTS_HEADER(_own(header), "")
    return header, header["checksums"] if found > 1 else None


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
