"""The benchmark from its options to its tables and figure, on decoders made in a moment."""

from __future__ import annotations

import csv
import os
import shutil

import inference
import inference_models
import pytest
import torch
from inference import main
from inference_models import (
    Shape,
    Workload,
    compiled_action,
    compressed_twin,
    decoder_action,
    growth,
    layers_action,
    linear_layers,
    load_pair,
    uniform_ranks,
    weight_bytes,
)
from tiny import causal_model
from torch import nn

from fasc_lightning.layers import (
    CompressedLinear,
    Grid,
    PivotedLinear,
    compressed_layers,
    make_lowrank,
    quantization_of,
    swap_modules,
)
from fasc_lightning.models import attach_config

TINY = {"deep": Shape(32, 64, 2, 1, layers=2), "wide block": Shape(48, 64, 4, 2)}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(inference, "SHAPES", TINY)


@pytest.fixture
def options(tmp_path):
    sizes = ["--window", "8", "--past", "4", "--seconds", "0", "--keep", "0.8", "0.5", "--align", "4"]
    return ["--output", str(tmp_path / "out"), "--dtypes", "float32", "bfloat16", *sizes]


def rows_of(tmp_path):
    with (tmp_path / "out" / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_measures_every_cell_and_writes_tables_and_figure(options, tmp_path, capsys):
    main(options)
    rows = rows_of(tmp_path)
    cells = {(r["shape"], r["dtype"], r["part"], r["workload"]) for r in rows}
    # Two parts of the deep decoder and one of the block, in two types, at three workloads.
    assert len(cells) == (2 + 1) * 2 * 3
    assert len(rows) == len(cells) * (1 + 2 * 2)
    for row in rows:
        if row["layout"] == "dense":
            assert float(row["kept"]) == float(row["speed-up median"]) == 1
        else:
            assert 0.4 < float(row["kept"]) <= float(row["keep"])
        assert 0 < float(row["speed-up least"]) <= float(row["speed-up median"]) <= float(row["speed-up most"])
        assert float(row["tokens/s"]) > 0
        assert int(row["rounds"]) >= 5
    report = (tmp_path / "out" / "results.md").read_text()
    assert report.rstrip() in capsys.readouterr().out
    assert report.count("| dense |") == 3 * 2
    assert "deep, linear layers (1 threads, ranks in multiples of 4)" in report
    assert (tmp_path / "out" / "speed_ups.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_there_is_not_measured_again_unless_settings_change(options, tmp_path, monkeypatch):
    options = [*options, "--shapes", "wide block", "--dtypes", "float32"]
    main(options)
    before = rows_of(tmp_path)
    measured = []
    measure = inference.measure
    monkeypatch.setattr(inference, "measure", lambda *args: measured.append(args) or measure(*args))
    main(options)
    assert not measured
    assert rows_of(tmp_path) == before
    next((tmp_path / "out" / "cells").iterdir()).unlink()
    main(options)
    assert len(measured) == 1
    main([*options, "--past", "5"])
    assert len(measured) == 1 + 3


@pytest.mark.parametrize("quantization", ["int8", "int8-dynamic"])
def test_int8_rounds_every_variant(options, tmp_path, monkeypatch, quantization):
    measured = []
    measure = inference.measure
    monkeypatch.setattr(inference, "measure", lambda models, *args: measured.append(models) or measure(models, *args))
    main([*options, "--shapes", "wide block", "--dtypes", quantization])
    models = measured[0]
    assert len(models) == 5
    for model in models.values():
        assert {quantization_of(layer) for layer in inference.linear_layers(model).values()} == {quantization}
    assert {row["dtype"] for row in rows_of(tmp_path)} == {quantization}


def test_bits_are_measured_beside_dense_bfloat16(options, tmp_path, monkeypatch):
    measured = []
    measure = inference.measure
    monkeypatch.setattr(inference, "measure", lambda models, *args: measured.append(models) or measure(models, *args))
    monkeypatch.setattr(inference, "SHAPES", {"wide block": Shape(128, 256, 4, 2)})
    main([*options, "--shapes", "wide block", "--dtypes", "bits"])
    assert list(measured[0]) == ["dense", "int4", "int8"]
    for name, bits in (("int4", Grid(4, 64, symmetric=False)), ("int8", "int8")):
        layers = inference.linear_layers(measured[0][name]).values()
        assert {quantization_of(layer) for layer in layers} == {bits}
        assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    # 4 bits and, for each group of 64, a scale and an offset of 16 bits and a zero point of 4 bits.
    # 8 bits and, for each output, a scale of 32 bits.
    kept = {row["layout"]: float(row["kept"]) for row in rows_of(tmp_path)}
    assert kept == {"dense": 1, "int4": pytest.approx(4.5625 / 16, rel=0.01), "int8": pytest.approx(0.5, rel=0.03)}


@pytest.mark.exhaustive  # a minute of a C++ compiler
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own use
def test_decoders_are_measured_compiled_beside_eager(options, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    main([*options, "--shapes", "wide block", "--dtypes", "float32", "--keep", "0.5", "--compile"])
    rows = [row for row in rows_of(tmp_path) if row["workload"] == "decode, batch 1"]
    assert [row["layout"] for row in rows] == [
        *("dense", "pivot", "factors"),
        *("dense-compiled", "pivot-compiled", "factors-compiled"),
    ]
    assert [row["keep"] for row in rows] == ["1.0", "0.5", "0.5"] * 2
    assert all(float(row["speed-up median"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("layout", "workload"),
    [
        ("pivot", Workload(1, 8, 0)),
        ("factors", Workload(1, 1, 4)),
        pytest.param("factors", Workload(1, 8, 0), marks=pytest.mark.exhaustive),
        pytest.param("pivot", Workload(1, 1, 4), marks=pytest.mark.exhaustive),
    ],
)
def test_a_compiled_action_runs_one_graph_of_the_same_model(layout, workload, monkeypatch):
    model = compressed_twin(TINY["deep"].build(torch.float32), 0.5, layout, 4)
    outputs, compiler = [], torch.compile

    def kept(forward):
        def run(**inputs):
            outputs.append(forward(**inputs).last_hidden_state)

        return run

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: kept(compiler(*args, **kwargs, backend="eager")))
    with torch.inference_mode():
        compiled_action(model, workload)
        decoder_action(model, workload, kept(model))()
    torch.testing.assert_close(outputs[0], outputs[-1])
    torch.testing.assert_close(outputs[1], outputs[-1])
    torch._dynamo.reset()


def folder_of(tmp_path):
    model = causal_model()
    layers = {name: m for name, m in model.model.named_modules() if isinstance(m, nn.Linear)}
    new = {}
    for name, layer in layers.items():
        U, S, V = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
        new[f"model.{name}"] = make_lowrank(U[:, :8] * S[:8], V[:8], layout="pivot", dtype=torch.float32)
    swap_modules(model, new)
    attach_config(model, method="svd")
    model.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def test_a_compressed_folder_is_measured_against_itself_made_dense(options, tmp_path):
    folder = folder_of(tmp_path)
    main([*options, "--compressed", str(folder), "--dtypes", "float32"])
    rows = rows_of(tmp_path)
    assert {row["layout"] for row in rows} == {"dense", "compressed"}
    assert {row["part"] for row in rows} == {"decoder", "linear layers"}
    kept = next(float(row["kept"]) for row in rows if row["layout"] == "compressed")
    dense, compressed = load_pair(folder, torch.float32)
    sizes = [sum(p.numel() for m in linear_layers(x).values() for p in m.parameters()) for x in (dense, compressed)]
    assert kept == pytest.approx(sizes[1] / sizes[0])
    assert not compressed_layers(dense)
    x = torch.randn(1, 5, 32)
    torch.testing.assert_close(dense(inputs_embeds=x)[0], compressed(inputs_embeds=x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["pivot", "factors"])
def test_a_twin_keeps_the_budget_and_shares_the_rest(layout):
    dense = TINY["deep"].build(torch.float32)
    twin = compressed_twin(dense, 0.5, layout, 4)
    layers, twins = linear_layers(dense), linear_layers(twin)
    assert list(layers) == list(twins)
    assert len(layers) == 14
    ranks = uniform_ranks(layers, 0.5, layout, 4)
    total = sum(layer.weight.numel() for layer in layers.values())
    kept = sum(p.numel() for layer in twins.values() for p in layer.parameters())
    assert 0.4 * total < kept <= 0.5 * total
    for name, layer in twins.items():
        if ranks[name] is None:
            assert layer is layers[name]
        else:
            assert isinstance(layer, CompressedLinear)
            assert layer.layout == layout
            assert layer.rank == ranks[name]
            assert layer.rank % 4 == 0
            if isinstance(layer, PivotedLinear):
                assert layer.permutation.sort().values.tolist() == list(range(len(layer.permutation)))
    assert weight_bytes(twin) < weight_bytes(dense)


@pytest.mark.parametrize("part", [decoder_action, layers_action])
@pytest.mark.parametrize("workload", [Workload(1, 8, 0), Workload(1, 1, 4), Workload(3, 1, 4)])
def test_every_run_of_an_action_does_the_same_work(part, workload, monkeypatch):
    model = TINY["deep"].build(torch.float32)
    seen = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: seen.append(tuple(x.shape[:-1])) or forward(self, x))
    lengths = []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, *args, **kwargs: lengths.append(k.shape[-2]) or attention(q, k, *args, **kwargs),
    )
    with torch.inference_mode():
        action = part(model, workload)
        for _ in range(2):
            seen.clear()
            lengths.clear()
            action()
            assert seen == [(workload.batch, workload.tokens)] * 14
            assert set(lengths) == (set() if part is layers_action else {workload.past + workload.tokens})


def test_growth_is_what_an_action_allocates(monkeypatch):
    size = 1 << 26
    grown = growth(lambda: torch.ones(size // 4))
    if grown is not None:  # Linux
        assert 0.9 * size < grown < 1.5 * size
    monkeypatch.setattr(inference_models.Path, "write_text", lambda self, text: (_ for _ in ()).throw(OSError))
    assert growth(lambda: None) is None


@pytest.mark.parametrize(
    ("name", "weights"),
    [("SmolLM2-135M", 106_168_320), ("Llama-3.2-1B block", 60_817_408), ("Llama-3-8B block", 218_103_808)],
)
def test_shapes_are_those_of_the_models(name, weights):
    with torch.device("meta"):
        model = inference_models.SHAPES[name].build(torch.float32)
    assert sum(layer.weight.numel() for layer in linear_layers(model).values()) == weights
