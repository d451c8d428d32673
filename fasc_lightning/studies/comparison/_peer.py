"""Models that another program compressed, as folders of transformers with dequantised weights and a peer.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fasc_lightning._utils import (
    anything,
    file_checksum,
    fingerprint,
    integer,
    mapping,
    number,
    optional,
    read_json,
    record,
    text,
)
from fasc_lightning.data import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The file of a folder that describes its compression.
PEER_FILE = "peer.json"

_PEER = record(
    {
        "name": text,
        "version": text,
        "settings": mapping(anything),
        "bits": number(0),
        "group": optional(integer()),
        "layer_bytes": integer(0),
        "seconds": number(0),
        "threads": integer(1),
    },
    extra=True,
)


@dataclass(frozen=True)
class Peer:
    """The compression that another program did, as its folder's peer.json states it.

    Attributes:
        name: The program.
        version: Its version.
        settings: Its settings, by its own names.
        bits: Bits of a weight.
        group: Weights that share a scale; None or a number below 1 for all of a row.
        layer_bytes: Bytes of the compressed layers, every code at exactly its bits.
        seconds: Seconds that it took, its own calibration included.
        threads: Threads that it had.
    """

    name: str
    version: str
    settings: Mapping[str, Any]
    bits: float
    group: int | None
    layer_bytes: int
    seconds: float
    threads: int


def read_peer(folder: str | Path) -> Peer:
    """Return what a folder says about its compression.

    Raises:
        FileNotFoundError: If the folder has no peer.json.
        ValueError: If it lacks an entry or an entry has another type.
    """
    path = Path(folder) / PEER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"Expected the folder of a model that another program compressed, but {path} is none.")
    content = read_json(path, _PEER)
    return Peer(**{name: content[name] for name in Peer.__dataclass_fields__})


def folder_fingerprint(folder: str | Path) -> str:
    """Return a hash of a folder's weights, configuration and peer.json."""
    files = sorted(path for path in Path(folder).glob("*") if path.suffix in (".json", ".safetensors"))
    return fingerprint(*((path.name, file_checksum(path)) for path in files))


def load_peer(folder: str | Path, dense: PreTrainedModel, layers: Iterable[str]) -> PreTrainedModel:
    """Return a folder's model, on the device and in the type of the dense one.

    Args:
        folder: The folder.
        dense: The model that was compressed.
        layers: Names of its targeted layers, in which alone the models may differ.

    Raises:
        ValueError: If the models differ elsewhere, so that they do not compare at the bytes of these layers.
    """
    model, _ = load_model(str(folder), dtype=dense.dtype)
    own, other = dense.state_dict(), model.state_dict()
    targeted = {f"{name}.weight" for name in layers}
    unlike = [
        name
        for name in own.keys() | other.keys()
        if name not in own
        or name not in other
        or own[name].shape != other[name].shape
        or (name not in targeted and not torch.equal(own[name].to(other[name].device), other[name]))
    ]
    if unlike:
        raise ValueError(
            f"Expected a model that differs from the dense one in its {len(targeted)} targeted layers alone, but "
            f"{folder} differs in {', '.join(sorted(unlike)[:3])}{' ...' if len(unlike) > 3 else ''}."
        )
    return model.eval().requires_grad_(False).to(dense.device)
