"""A cache of the teacher's largest logits on disk, by sample, which replaces the teacher's model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fasc_lightning._utils import (
    Entry,
    NamedTensors,
    SchemaError,
    integer,
    mapping,
    naming,
    parse_json,
    read_json,
    record,
    tensor_checksums,
    text,
    whole_file,
)
from fasc_lightning.batches import identifying_tensor

#: Format of the folder that this version writes and reads.
FORMAT = 1

#: The file that describes the teacher of a folder.
DESCRIPTION = "teacher.json"

_DESCRIPTION = record({"format": integer(1), "teacher": text, "top_k": integer(1)}, extra=True)

#: Entry of a file's metadata with the checksum of each tensor. Files without it are read, too.
_CHECKSUMS = "fasc_lightning.checksums"

#: Largest log probability that rounding may leave above zero.
_ROUNDING = 1e-4

#: Bytes that are kept in memory before they are written.
BUFFER_BYTES = 64_000_000


class LogitCache:
    """A folder of log probabilities (n, k) and their classes for the n counted predictions of each sample.

    A sample is found in every batch and with any padding. Each process writes its own files and reads all of them.

    Args:
        folder: The folder, made if it does not exist.
        description: Description of the teacher and its predictions in plain data; an existing folder must have the
            same.
        mask: Function that returns True for a batch's real tokens, shape (samples, length), or None if all are real.
        top_k: Number k of classes for each prediction.

    Raises:
        ValueError: If the folder holds other predictions or is damaged. Reading predictions may raise it, too.
    """

    def __init__(
        self,
        folder: str | Path,
        description: dict[str, Any],
        mask: Callable[[Any], Tensor | None],
        top_k: int,
    ) -> None:
        self.folder = Path(folder)
        self._mask = mask
        self._k = top_k
        self._new: dict[str, Tensor] = {}
        self._files: dict[str, NamedTensors] = {}
        self._opened: set[Path] = set()
        self._check({"format": FORMAT, "top_k": top_k, **description})
        self.refresh()

    def _check(self, description: dict[str, Any]) -> None:
        path = self.folder / DESCRIPTION
        if path.is_file():
            found = read_json(path, _DESCRIPTION)
            if found != description:
                other = [key for key in description if found.get(key) != description[key]]
                raise ValueError(
                    f"Expected a folder of this teacher's predictions but {str(self.folder)!r} holds others: "
                    f"{', '.join(other)} of them differ. HINT: another folder as `cache`."
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(description, indent=2) + "\n")

    def refresh(self) -> None:
        """Open new files of other processes."""
        for path in sorted(self.folder.glob("logits-*.safetensors")):
            if path not in self._opened:
                named = self._open(path)
                self._opened.add(path)
                self._files.update(dict.fromkeys((name for name in named.forms if name.endswith(".index")), named))

    def _open(self, path: Path) -> NamedTensors:
        """Open a file of another run or process. Its tensors are checked when they are read.

        Raises:
            ValueError: If the file is damaged or does not belong to this cache.
        """
        try:
            handle = safe_open(path, framework="pt")
            named = NamedTensors.in_file(handle, str(path))
        except SafetensorError as error:
            raise ValueError(f"{_damaged(path)} is truncated or damaged ({error}).") from error
        with naming(_damaged(path)):
            saved = (handle.metadata() or {}).get(_CHECKSUMS)
            checksums = None if saved is None else parse_json(saved, "The list of checksums")
            if checksums is not None:
                mapping(text)(checksums, "checksums")
            index = Entry((torch.int32,), ((None, None),), 0, 2**31)
            values = Entry((torch.float32,), ((None, None),), None, _ROUNDING)
            samples = {name.rpartition(".")[0] for name in named.forms}
            wanted = {f"{key}.index": index for key in samples} | {f"{key}.values": values for key in samples}
            named.expect(wanted, checksums)
            for key in samples:
                (_, shape), (_, other) = (named.forms[f"{key}.{part}"] for part in ("index", "values"))
                if shape != other or shape[1] > self._k:
                    raise SchemaError(
                        f"Expected at most {self._k} classes of each prediction of {key!r}, with a value for each."
                    )
        return named

    def has(self, batch: Any) -> bool:
        """Return whether the cache has predictions of every sample of a batch."""
        return all(key in self for key in sample_keys(batch, self._mask(batch)))

    def put(self, batch: Any, counted: Tensor | None, logits: Tensor, temperature: float) -> None:
        """Add the predictions of a batch.

        Args:
            batch: The batch.
            counted: True for counted predictions, shape (samples, ...); None counts all.
            logits: The teacher's logits of all predictions, sample after sample, shape (N, classes).
            temperature: Temperature of the probabilities.
        """
        keys = sample_keys(batch, self._mask(batch))
        each = len(logits) // max(1, len(keys))
        for i, key in enumerate(keys):
            mine = logits[i * each : (i + 1) * each]
            mine = mine if counted is None else mine[counted[i].reshape(-1)]
            log_p = torch.log_softmax(mine.float() / temperature, 1)
            values, index = log_p.topk(min(self._k, log_p.shape[1]), 1)
            self._new[f"{key}.index"] = index.int().cpu().contiguous()
            self._new[f"{key}.values"] = values.cpu().contiguous()
        if sum(t.numel() * t.element_size() for t in self._new.values()) > BUFFER_BYTES:
            self.flush()

    def get(self, batch: Any, counted: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Return log probabilities and classes of the n counted predictions, both (n, k); None if some are missing.

        Args:
            batch: The batch.
            counted: True for counted predictions, shape (samples, ...); None counts all.
        """
        values, indices = [], []
        for i, key in enumerate(sample_keys(batch, self._mask(batch))):
            if key not in self:
                return None
            values.append(self._read(key, "values"))
            indices.append(self._read(key, "index"))
            if counted is not None and len(values[-1]) != int(counted[i].sum()):
                return None  # cached from a sample that was padded on the other side
        return torch.cat(values), torch.cat(indices)

    def __contains__(self, key: str) -> bool:
        return f"{key}.index" in self._new or f"{key}.index" in self._files

    def _read(self, key: str, part: str) -> Tensor:
        name = f"{key}.{part}"
        if name in self._new:
            return self._new[name]
        named = self._files[f"{key}.index"]
        with naming(_damaged(named.where)):
            return named.read(name)

    def flush(self) -> None:
        """Write the predictions in memory to a file."""
        if not self._new:
            return
        digest = hashlib.blake2b("".join(sorted(self._new)).encode(), digest_size=8).hexdigest()
        with whole_file(self.folder / f"logits-{digest}.safetensors") as temporary:
            sums = json.dumps(tensor_checksums(self._new))
            save_file(self._new, temporary, metadata={_CHECKSUMS: sums})
        self._new = {}
        self.refresh()


def sample_keys(batch: Any, mask: Tensor | None) -> list[str]:
    """Return a key for each sample of a batch, a hash of its whole content (inputs, labels and others).

    Args:
        batch: A tensor, or any nesting of mappings and sequences of tensors, with a row for each sample.
        mask: True for real tokens, shape (samples, length), or None; padding does not enter the keys.

    Raises:
        ValueError: If the batch holds no tensor.
    """
    first = identifying_tensor(batch)
    if first is None:
        raise ValueError(f"Expected a batch that holds a tensor but got {type(batch).__name__}.")
    real = None if mask is None else mask.bool().cpu()
    columns = [t.detach().cpu() for t in _tensors(batch) if t.ndim and len(t) == len(first)]
    keys = []
    for i in range(len(first)):
        digest = hashlib.blake2b(digest_size=16)
        for column in columns:
            row = column[i]
            if real is not None and column.shape[:2] == real.shape:
                row = row[real[i]]
            digest.update(str(row.dtype).encode())
            digest.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        keys.append(digest.hexdigest())
    return keys


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key in sorted(batch):
            yield from _tensors(batch[key])
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        for item in batch:
            yield from _tensors(item)


def teacher_of(folder: str | Path) -> str | None:
    """Return the fingerprint of a folder's teacher; None if the folder has no predictions.

    Raises:
        ValueError: If the folder's description is damaged.
    """
    path = Path(folder) / DESCRIPTION
    return read_json(path, _DESCRIPTION)["teacher"] if path.is_file() else None


def _damaged(path: str | Path) -> str:
    return f"Delete the folder of the teacher's predictions with {path}, which"
