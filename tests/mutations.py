"""Ways in which saved files get damaged or are edited, drawn by hypothesis."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

#: Values that do not belong where they are put.
WRONG = [None, [], {}, "x", "", -1, 10**9, 2**70, 0, 1.5, math.nan, True, [[1]], {"a": 1}, {3: 4}, torch.ones(2)]
JSON_WRONG = [value for value in WRONG if not isinstance(value, torch.Tensor) and value != {3: 4}]


def change_bytes(draw, content: bytes) -> bytes:
    """Flip bits, cut, or add bytes."""
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "add", "swap", "zeros"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "cut":
        return content[:at]
    if kind == "add":
        return content + b"\0" * draw(st.integers(1, 9))
    if kind == "zeros":
        return content[:at] + b"\0" * min(16, len(content) - at) + content[at + 16 :]
    if kind == "swap":
        other = draw(st.integers(0, max(0, len(content) - 1)))
        first, second = sorted((at, other))
        return content[:first] + content[second : second + 1] + content[first + 1 :]
    return content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]


# safetensors: eight bytes of length, a JSON header, and the numbers.

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: dict[str, Any], numbers: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + numbers


def change_safetensors(draw, content: bytes) -> bytes:
    """Let a header lie, swap tensors, put other numbers in, take some away; or change bytes."""
    header, numbers = split(content)
    names = [name for name in header if name != "__metadata__"]
    kind = draw(
        st.sampled_from(["bytes", "dtype", "shape", "names", "numbers", "remove", "add", "metadata", "offsets", "size"])
    )
    name = draw(st.sampled_from(sorted(names)))
    spec = header[name]
    start, stop = spec["data_offsets"]
    if kind == "bytes":
        return change_bytes(draw, content)
    if kind == "dtype":  # the size stays, so that the header is consistent
        same = [dtype for dtype, size in _SIZES.items() if size == _SIZES[spec["dtype"]] and dtype != spec["dtype"]]
        spec["dtype"] = draw(st.sampled_from(same or ["F64"]))
    elif kind == "size":
        spec["dtype"] = draw(st.sampled_from(sorted(_SIZES)))
    elif kind == "shape":
        shape = spec["shape"]
        total = math.prod(shape)
        spec["shape"] = draw(
            st.sampled_from([shape[::-1], [total], [1, total], [total, 1], [*shape, 1], [2**40], [-1]])
        )
    elif kind == "names":
        other = draw(st.sampled_from(sorted(names)))
        header[name], header[other] = header[other], header[name]
    elif kind == "numbers" and stop > start:
        at = draw(st.integers(start, stop - 1)) // 8 * 8
        bad = {"F32": [math.nan, math.inf, 1e30, -1.0, 0.125], "F64": [math.nan, -1.0, 1e18, 7.5]}
        value = draw(st.sampled_from(bad.get(spec["dtype"], [0])))
        dtype = {"F32": torch.float32, "F64": torch.float64}.get(spec["dtype"], torch.int32)
        put = torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes()
        at = min(max(start, at), stop - len(put)) if stop - start >= len(put) else start
        numbers = numbers[:at] + put[: stop - at] + numbers[at + len(put) :]
    elif kind == "remove":
        del header[name]
    elif kind == "add":
        header[name + draw(st.sampled_from(["x", ".count", ".0"]))] = dict(spec)
    elif kind == "offsets":
        spec["data_offsets"] = draw(
            st.sampled_from([[0, 0], [start, stop + 4], [stop, start], [2**40, 2**41], [start]])
        )
    elif kind == "metadata":
        metadata = header.get("__metadata__", {})
        if metadata:
            key = draw(st.sampled_from(sorted(metadata)))
            try:
                inner = json.loads(metadata[key])
            except ValueError:
                inner = metadata[key]
            inner = change_tree(draw, inner, JSON_WRONG) if isinstance(inner, dict) else "other"
            metadata[key] = inner if isinstance(inner, str) else json.dumps(inner)
            header["__metadata__"] = metadata
    return join(header, numbers)


# Trees of plain data and tensors.


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Return the paths to all that a tree holds."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    found = [path] if path else []
    for i, (key, value) in enumerate(items):
        if i < 40:
            found += places(value, (*path, key))
    return found


def change_tree(draw, tree: Any, wrong=WRONG) -> Any:
    """Put something else somewhere in a tree, take it away, or add to it; lists become tuples on the way."""
    by_depth: dict[int, list[tuple]] = {}
    for path in places(tree):
        by_depth.setdefault(len(path), []).append(path)
    depth = draw(st.sampled_from(sorted(by_depth)))  # else the many leaves would be all that is drawn
    path = draw(st.sampled_from(by_depth[depth]))
    tree = _copied(tree)
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    key, value = path[-1], holder[path[-1]]
    kind = draw(st.sampled_from(["replace", "replace", "alter", "alter", "remove", "add"]))
    if kind == "remove":
        del holder[key]
    elif kind == "add" and isinstance(holder, dict):
        holder[draw(st.sampled_from(["extra", "" if wrong is JSON_WRONG else 7]))] = draw(st.sampled_from(wrong))
    elif kind == "alter":
        holder[key] = _altered(draw, value)
    else:
        holder[key] = draw(st.sampled_from(wrong))
    return tree


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_copied(value) for value in tree]
    return copy.deepcopy(tree)


def _altered(draw, value: Any) -> Any:
    """Return a value of the same kind that is another."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.sampled_from([value + 1, -value - 1, 10**9, value * 2 + 3]))
    if isinstance(value, float):
        return draw(st.sampled_from([value + 1.0, -value - 1, math.nan, math.inf]))
    if isinstance(value, str):
        return draw(st.sampled_from([value + "x", value[1:], ""]))
    if isinstance(value, torch.Tensor):
        return draw(st.sampled_from(_others(value)))
    if isinstance(value, dict):
        return [*value.values()]
    if isinstance(value, list):
        return draw(st.sampled_from([value[:-1], [*value, *value[:1]], value[::-1], dict(enumerate(value))]))
    return "other"


def _others(value: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of another type, shape or other numbers."""
    others = [
        value.reshape(-1)[:-1],
        value[None],
        value.bool(),
        value.long(),
        torch.zeros_like(value),
        value.to("meta"),
    ]
    if value.numel():
        raised = value.clone().reshape(-1)
        raised[0] = 1 - raised[0] if value.dtype == torch.uint8 else raised[0] + 1
        others.append(raised.view(value.shape))
    if value.is_floating_point():
        others += [value.half(), -value - 1, torch.full_like(value, math.nan), torch.full_like(value, 1e9)]
    else:
        others += [value.float(), -value.long() - 1, value * 0 + 100]
    return others


def write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # a mapped file that changes would crash its reader
    path.write_bytes(content)
