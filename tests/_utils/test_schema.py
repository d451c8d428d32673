from __future__ import annotations

import json
import math

import pytest
import torch

from fasc_lightning._utils import (
    Entry,
    SchemaError,
    boolean,
    check,
    check_names,
    integer,
    is_permutation,
    listed,
    mapping,
    number,
    one_of,
    optional,
    plain,
    read_json,
    record,
    row,
    text,
)

LAYER = record({"rank": integer(1, 9), "bias": boolean}, {"side": one_of("in", "out"), "scale": optional(number(0))})
LAYERS = record({"layers": mapping(LAYER), "sizes": listed(row(integer(0), text), distinct=True)})


def good():
    return {"layers": {"a": {"rank": 3, "bias": True}, "b": {"rank": 9, "bias": False, "scale": None}}, "sizes": ()}


def test_what_is_declared_is_accepted_lists_and_tuples_alike():
    check(good(), LAYERS, "file.json")
    check({**good(), "sizes": [(1, "x"), (0, "x")]}, LAYERS, "file.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("sizes"), r"Expected the entry 'sizes' but it is missing"),
        (lambda c: c.update(extra=1), r"Expected no entry 'extra' but there is one"),
        (lambda c: c.update(layers=[]), r"Expected a mapping of names at 'layers' but got a list"),
        (lambda c: c["layers"].update({3: {}}), r"Expected names as keys at 'layers' but got 3"),
        (lambda c: c["layers"]["a"].update(rank=True), r"an integer from 1 to 9 at 'layers\.a\.rank' but got True"),
        (lambda c: c["layers"]["a"].update(rank=3.0), r"an integer from 1 to 9 at 'layers\.a\.rank' but got 3\.0"),
        (lambda c: c["layers"]["a"].update(rank=0), r"at 'layers\.a\.rank' but got 0"),
        (lambda c: c["layers"]["a"].update(rank=10**5000), r"at 'layers\.a\.rank' but got a huge number"),
        (lambda c: c["layers"]["a"].update(bias=1), r"True or False at 'layers\.a\.bias' but got 1"),
        (lambda c: c["layers"]["a"].update(side="up"), r"one of 'in', 'out' at 'layers\.a\.side' but got 'up'"),
        (lambda c: c["layers"]["a"].update(scale=math.nan), r"a finite number of at least 0 at 'layers\.a\.scale'"),
        (lambda c: c["layers"]["a"].update(scale=-0.5), r"a finite number of at least 0 at 'layers\.a\.scale'"),
        (lambda c: c.update(sizes=[[1]]), r"a list of 2 at 'sizes\[0\]' but got a list"),
        (
            lambda c: c.update(sizes=[[1, torch.ones(2)]]),
            r"a text at 'sizes\[0\]\[1\]' but got a tensor of torch\.float32",
        ),
        (lambda c: c.update(sizes=((1, "a"), (1, "a"))), r"no value twice at 'sizes'"),
    ],
)
def test_anything_else_is_refused_with_file_and_entry(change, message):
    content = good()
    change(content)
    with pytest.raises(SchemaError, match=rf"^file\.json is damaged or was edited\. .*{message}"):
        check(content, LAYERS, "file.json")


def test_plain_data_has_a_bounded_depth():
    deep = []
    for _ in range(60):
        deep = [deep]
    with pytest.raises(SchemaError, match="at most 50 levels"):
        check(deep, plain, "f")
    with pytest.raises(SchemaError, match=r"plain data at 'a\[0\]' but got a tensor"):
        check({"a": [torch.ones(1)]}, plain, "f")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, 3).long(), r"float32 and shape \(2, any\) at 'x' but got one of int64 and shape \(2, 3\)"),
        (torch.ones(3, 2), r"shape \(2, any\) at 'x' but got one of float32 and shape \(3, 2\)"),
        (torch.full((2, 1), math.inf), "finite numbers at 'x'"),
        (torch.full((2, 1), -1.0), r"numbers from 0 to 5 at 'x' but got some from -1 to -1"),
        (torch.ones(2, 3, device="meta"), r"a tensor in memory at 'x' but got a tensor of .* \(meta\)"),
        (torch.ones(2, 3).to_sparse(), r"a tensor in memory at 'x' but got a tensor of .* \(sparse_coo\)"),
        ([1.0], "a tensor in memory at 'x' but got a list"),
    ],
)
def test_tensors_are_of_their_type_shape_and_range(tensor, message):
    entry = Entry((torch.float32,), ((2, None),), 0, 5)
    entry(torch.zeros(2, 7), "x")
    entry(torch.zeros(2, 0), "x")
    with pytest.raises(SchemaError, match=message):
        entry(tensor, "x")


def test_sets_of_names_are_compared_both_ways():
    check_names(["a", "b"], ["b", "a"])
    with pytest.raises(SchemaError, match="Expected the tensor 'b' but it is missing"):
        check_names(["a"], ["a", "b"])
    with pytest.raises(SchemaError, match="Expected no tensor 'c' but there is one"):
        check_names(["a", "c"], ["a"])


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (torch.tensor([2, 0, 1], dtype=torch.int32), True),
        (torch.tensor([2, 0, 1], dtype=torch.uint8), True),
        (torch.tensor([2, 0, 2]), False),
        (torch.tensor([2, 0, -1]), False),
        (torch.tensor([3, 0, 1]), False),
        (torch.tensor([2.0, 0.0, 1.0]), False),
        (torch.tensor([True, False]), False),
        (torch.tensor([[1, 0]]), False),
    ],
)
def test_a_permutation_names_each_position_once(index, expected):
    assert is_permutation(index) is expected


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_json_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(SchemaError, match=r"settings\.json is not valid JSON"):
        read_json(path)


def test_a_json_file_is_checked_and_of_bounded_size(tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(good()))
    assert read_json(path, LAYERS) == {**good(), "sizes": []}
    path.write_text("[1]")
    with pytest.raises(SchemaError, match=r"settings\.json is damaged or was edited\. Expected a mapping"):
        read_json(path, LAYERS)
    monkeypatch.setattr("fasc_lightning._utils._json_files.MAX_JSON_BYTES", 2)
    with pytest.raises(SchemaError, match=r"settings\.json has 3 bytes"):
        read_json(path, LAYERS)
