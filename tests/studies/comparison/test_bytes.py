from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch
from comparison_cases import BEST, HARDNESS, failed, outcome
from tiny import byte_tokenizer, causal_model

from fasc_lightning.cli._comparison import cell_line
from fasc_lightning.compression import round_layers
from fasc_lightning.dependence import save_figure
from fasc_lightning.evaluation import log_probabilities, window_divergences
from fasc_lightning.layers import compressed_layers, layer_sizes, select_layers
from fasc_lightning.options import Quantize
from fasc_lightning.studies.comparison import (
    DENSE,
    FOLDER,
    Budget,
    Cell,
    CellStore,
    Comparison,
    Evaluation,
    GatheredStatistics,
    metrics_of,
    read_peer,
)
from fasc_lightning.studies.comparison import _comparison as comparison
from fasc_lightning.studies.comparison import _questions as questions
from fasc_lightning.studies.comparison import _speed as speed
from fasc_lightning.studies.comparison._bytes import (
    at_equal_bytes,
    bytes_numbers,
    bytes_table,
    comparison_table,
    kind_of,
    name_of,
)
from fasc_lightning.studies.comparison._bytes_figure import bytes_figure
from fasc_lightning.studies.comparison._cells import PUT_BACK
from fasc_lightning.studies.comparison._speed import speed as measured_speed
from fasc_lightning.studies.comparison._tables import budget_rows, rank_cells, results_rows, shown_nats

PEER = {"name": "absmax", "version": "1", "settings": {}, "bits": 4, "group": 64}
PEER |= {"layer_bytes": 4321, "seconds": 12.5, "threads": 2}


def windows(seed, count=6):
    return torch.randint(3, 200, (count, 24), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calibration(tmp_path):
    tokenizer = byte_tokenizer()
    model = causal_model(vocab_size=len(tokenizer), initializer_range=0.2).eval().requires_grad_(False)
    return GatheredStatistics(model, tokenizer, select_layers(model), windows(1), tmp_path / "statistics")


@pytest.fixture
def running(calibration):
    return Comparison(calibration, ["fasc"])


@pytest.fixture
def evaluation():
    return Evaluation({"noise": windows(2, 3)}, [], compared=2)


def rounded_cell(text, **settings):
    return Cell("fasc", Budget.parse(text), BEST, **settings)


@pytest.fixture
def folder(tmp_path, calibration):
    """A folder as another program leaves it."""
    model = copy.deepcopy(calibration.model)
    for layer in select_layers(model).values():
        layer.weight.data = (layer.weight.data * 8).round() / 8
    model.save_pretrained(tmp_path / "absmax-4")
    calibration.tokenizer.save_pretrained(tmp_path / "absmax-4")
    (tmp_path / "absmax-4" / "peer.json").write_text(json.dumps(PEER))
    return tmp_path / "absmax-4"


# Budgets.


def test_budgets_are_read_from_text():
    assert Budget.parse("0.27") == Budget(size=0.27)
    assert Budget.parse("int4") == Budget(quantize="int4")
    assert Budget.parse("int4/32").quantize == Quantize(4, 32)
    assert Budget.parse("nearest-int3").quantize == Quantize(3, 64, rounding="nearest")
    assert Budget.parse("nearest-int8").quantize == Quantize(8, None, symmetric=True, rounding="nearest")
    assert [str(Budget.parse(text)) for text in ("0.27", "int4", "int4/32", "nearest-int3", "nearest-int8")] == [
        "size 0.27", "int4", "int4 groups of 32", "int3 groups of 64 to the nearest", "int8 to the nearest",
    ]  # fmt: skip
    assert [Budget.parse(text).rounds_to_nearest for text in ("0.27", "int4", "nearest-int4")] == [False, False, True]


def test_shares_of_the_parameters_may_be_rounded_to_int8():
    assert Budget.parse_keep("0.8") == Budget(keep=0.8)
    both = Budget.parse_keep("0.8+int8")
    assert (both, str(both)) == (Budget(keep=0.8, quantize="int8"), "keep 0.8, int8")
    assert [budget.rounds_factors for budget in (both, Budget(keep=0.8), Budget(quantize="int8"))] == [
        True,
        False,
        False,
    ]
    for text in ("0.8+int4", "0.8+", "x", "2"):
        with pytest.raises(ValueError, match=r"a share as 0\.8, or 0\.8\+int8"):
            Budget.parse_keep(text)


def test_factors_are_rounded_after_their_refit_and_the_model_is_put_back(tmp_path, running, evaluation):
    before = copy.deepcopy(running.model.state_dict())
    cells = [Cell("fasc", Budget.parse_keep(text), BEST, refit=True) for text in ("0.6", "0.6+int8")]
    plain, both = [found for _, found, _ in running.run(cells, evaluation, CellStore(tmp_path, "context"))]
    # Half of the bytes, and a scale for each output of two matrices.
    assert 0.5 < both.bytes / plain.bytes < 0.6
    assert both.measured.losses["noise"] != plain.measured.losses["noise"]
    assert both.measured.losses["noise"] == pytest.approx(plain.measured.losses["noise"], rel=0.01)
    assert [kind_of(cell) for cell in cells] == ["low rank", "low rank in int8"]
    assert all(torch.equal(value, before[name]) for name, value in running.model.state_dict().items())


@pytest.mark.parametrize("text", ["", "int5", "int8-dynamic", "0", "nan", "int4/", "int4/x", "nearest-0.27"])
def test_budgets_that_cannot_be_read_are_refused(text):
    with pytest.raises(ValueError, match=r"a size as 0\.27, or bits as int8, int4, int3, int2"):
        Budget.parse(text)


# The divergence.


def test_answers_hold_the_divergence_of_the_first_windows(running, evaluation):
    model = running.model
    with pytest.raises(RuntimeError, match="compared_with"):
        evaluation.measure(model, running.calibration.tokenizer)
    other = copy.deepcopy(model)
    other.lm_head.weight.data *= 1.5
    answers = evaluation.compared_with(model).measure(other, running.calibration.tokenizer)
    expected = window_divergences(other, windows(2, 3)[:2], log_probabilities(model, windows(2, 3)[:2]))
    assert answers.divergence == {"noise": expected.tolist()}
    assert len(answers.losses["noise"]) == 3


def test_the_dense_model_is_read_once_and_only_if_a_cell_runs(tmp_path, running, evaluation, monkeypatch):
    read = []
    monkeypatch.setattr(questions, "log_probabilities", lambda *a: read.append(1) or log_probabilities(*a))
    store = CellStore(tmp_path / "cells", "context")
    cells = [Cell(DENSE), rounded_cell("int2"), rounded_cell("int8")]
    first = [found.measured for _, found, _ in running.run(cells, evaluation, store)]
    assert len(read) == 1
    low, high = first[1].divergence["noise"], first[2].divergence["noise"]
    assert max(first[0].divergence["noise"]) < 1e-6 < max(high) < min(low)
    assert [found.measured for _, found, _ in running.run(cells, evaluation, store)] == first
    assert len(read) == 1


def test_questions_without_a_divergence_keep_their_hash(evaluation):
    plain = dataclasses.replace(evaluation, compared=0)
    others = [plain, evaluation, dataclasses.replace(evaluation, compared=1)]
    others.append(dataclasses.replace(plain, prompt=windows(1, 1)))
    assert len({other.fingerprint() for other in others}) == 4
    # Of the version before there was a divergence.
    assert plain.fingerprint() == questions.fingerprint(["noise"], windows(2, 3), [], [], "highest")


def test_cells_of_before_there_was_a_divergence_are_read(tmp_path):
    store, cell = CellStore(tmp_path, "context"), Cell("fasc", Budget(keep=0.8), BEST)
    store.save(cell, outcome())
    kept = json.loads(store.path(cell).read_text())
    for name in ("divergence", "speed"):
        del kept["outcome"]["measured"][name]
    del kept["outcome"]["bytes"]
    store.path(cell).write_text(json.dumps(kept))
    assert store.load(cell) == outcome()


def diverging(mean, noise=0.0, share=0.27, **settings):
    """An outcome with a divergence: so many nats on average, give or take."""
    found = outcome(mean, **settings)
    divergence = [mean * (1 + (noise if i % 2 else -noise)) for i in range(8)]
    return dataclasses.replace(
        found, bytes=round(1000 * share), measured=dataclasses.replace(found.measured, divergence={"news": divergence})
    )


def test_a_divergence_is_ranked_in_pairs_and_has_no_ratio_to_dense():
    dense = diverging(0.0, share=1)
    cells = {
        rounded_cell("int4"): diverging(0.1, 0.3),
        rounded_cell("int4/32"): diverging(0.1),
        rounded_cell("int3"): diverging(0.2),
    }
    perplexity, divergence, facts = metrics_of(dense.measured)
    assert [m.name for m in (perplexity, divergence, facts)] == ["perplexity of news", "KL on news", "facts %"]
    ranking = rank_cells(cells, divergence)
    assert {ranking.best, *ranking.ties} == set(list(cells)[:2])
    rows = budget_rows(dense, cells, [divergence])
    assert [row["KL on news"] for row in rows] == ["0.0000", "**0.100**", "0.100 ≈", "0.200"]
    numbers = results_rows(dense, cells, [])
    assert numbers[3]["KL on news"] == pytest.approx(0.2)
    assert "KL on news / dense" not in numbers[0]
    assert [shown_nats(value) for value in (0.00012, 0.084, 1.234)] == ["0.0001", "0.084", "1.23"]


# Rounded models.


def test_sizes_share_one_rounding_and_are_what_they_are_alone(running, calibration, evaluation, monkeypatch):
    calls = []

    def counted(layers, moments, grids, **options):
        calls.append(len(grids))
        return round_layers(layers, moments, grids, **options)

    monkeypatch.setattr(comparison, "round_layers", counted)
    evaluation = evaluation.compared_with(calibration.model)
    cells = [rounded_cell("0.4", refit=True), rounded_cell("0.54", refit=True), rounded_cell("int4")]
    found = [running.measure(cell, evaluation) for cell in cells]
    assert [outcome.error for outcome in found] == [""] * 3
    assert calls == [4, 1]
    alone = Comparison(calibration, ["fasc"]).measure(cells[1], evaluation)
    assert (alone.plan, alone.measured, alone.bytes) == (found[1].plan, found[1].measured, found[1].bytes)
    assert found[1].seconds["factorize"] > 0.5 * alone.seconds["factorize"]
    assert found[0].zeros == 0


def test_bytes_are_those_of_the_stored_layers(running, calibration, evaluation, monkeypatch):
    seen = {}
    measure = Evaluation.measure

    def spy(self, model, tokenizer):
        seen["layers"] = compressed_layers(model)
        return measure(self, model, tokenizer)

    monkeypatch.setattr(Evaluation, "measure", spy)
    dense = layer_sizes(calibration.layers)
    found = running.measure(rounded_cell("int4/32"), evaluation.compared_with(calibration.model))
    assert seen["layers"] == {}  # dense stand-ins answer the questions
    # Codes of 4 bits; a scale of 16 bits and a zero point of 4 bits for each of 32 inputs, in words of 32 bits.
    expected = sum(
        m * n // 2 + math.ceil(n / 32) * (2 * m + 4 * math.ceil(m / 8))
        for m, n in (layer.weight.shape for layer in calibration.layers.values())
    )
    assert found.bytes == expected
    assert found.parameters == dense.parameters
    assert running.measure(Cell(DENSE), evaluation.compared_with(calibration.model)).bytes == 2 * dense.parameters


# Other programs' models.


def test_a_folder_is_measured_with_its_own_bytes_and_seconds(running, calibration, evaluation, folder, monkeypatch):
    monkeypatch.setattr(calibration, "moments", None)  # nothing is gathered for it
    evaluation = evaluation.compared_with(calibration.model)
    found = running.measure(Cell(FOLDER, label=str(folder)), evaluation)
    assert found.error == ""
    assert (found.bytes, found.seconds["compress"], found.kept) == (4321, 12.5, 1)
    model = copy.deepcopy(calibration.model)
    for layer in select_layers(model).values():
        layer.weight.data = (layer.weight.data * 8).round() / 8
    assert found.measured == evaluation.measure(model, calibration.tokenizer)
    assert Cell(FOLDER, label=str(folder)).name == "folder absmax-4"


def test_a_changed_folder_is_another_cell(tmp_path, folder):
    store, cell = CellStore(tmp_path / "cells", "context"), Cell(FOLDER, label=str(folder))
    store.save(cell, outcome())
    assert store.load(cell) == outcome()
    (folder / "peer.json").write_text(json.dumps({**PEER, "layer_bytes": 5}))
    assert store.load(cell) is None


def test_a_model_that_differs_elsewhere_is_refused(running, calibration, evaluation, folder, tmp_path):
    evaluation = evaluation.compared_with(calibration.model)
    tokenizer = calibration.tokenizer
    wide = causal_model(vocab_size=len(tokenizer), intermediate_size=64)
    other = copy.deepcopy(calibration.model)
    other.model.embed_tokens.weight.data += 0.1
    for i, (model, reason) in enumerate(((wide, "mlp.down_proj.weight"), (other, "model.embed_tokens.weight"))):
        model.save_pretrained(tmp_path / f"other{i}")
        tokenizer.save_pretrained(tmp_path / f"other{i}")
        (tmp_path / f"other{i}" / "peer.json").write_text(json.dumps(PEER))
        found = running.measure(Cell(FOLDER, label=str(tmp_path / f"other{i}")), evaluation)
        assert "in its 14 targeted layers alone" in found.error
        assert reason in found.error


def test_what_a_folder_states_is_read(folder, tmp_path):
    assert vars(read_peer(folder)) == PEER
    with pytest.raises(FileNotFoundError, match=r"absmax-5.peer\.json is none"):
        read_peer(tmp_path / "absmax-5")
    (folder / "peer.json").write_text(json.dumps({**PEER, "layer_bytes": "many"}))
    with pytest.raises(ValueError, match="layer_bytes"):
        read_peer(folder)


# Speed.


def test_speed_is_of_a_copy_in_bfloat16_and_the_median_counts(running, monkeypatch):
    seen, clock = [], iter(range(10**6))
    monkeypatch.setattr(speed, "DECODED", 3)
    monkeypatch.setattr(speed, "_now", lambda device: next(clock))
    running.model.lm_head.register_forward_hook(lambda layer, *_: seen.append(layer.weight.dtype))
    found = measured_speed(running.model, windows(1, 1))
    assert found == {"prefill": 24, "decode": 3}  # one tick each
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == (1 + speed.ROUNDS) * (1 + 1 + 3)
    assert running.model.lm_head.weight.dtype == torch.float32


def test_speed_is_a_question_of_its_own(running, monkeypatch):
    monkeypatch.setattr(speed, "DECODED", 2)
    found = running.measure(rounded_cell("int4"), Evaluation({}, [], prompt=windows(1, 1)))
    assert found.error == ""
    assert found.measured.losses == {}
    assert set(found.measured.speed) == {"prefill", "decode"}
    assert min(found.measured.speed.values()) > 0


# Tables.

OURS, WORSE, RANKS = (
    rounded_cell("0.27", refit=True),
    rounded_cell("nearest-int4"),
    Cell("fasc", Budget(keep=0.8), BEST),
)
THEIRS, EIGHT = Cell(FOLDER, label="somewhere/absmax-4"), Cell(FOLDER, label="somewhere/absmax-8")
REFERENCE = diverging(0.0, share=1, recalled=40)
CELLS = {
    RANKS: diverging(0.3, share=0.8, recalled=30),
    OURS: diverging(0.1, share=0.27, recalled=38),
    WORSE: diverging(0.4, share=0.27, recalled=20),
    THEIRS: diverging(0.1, 0.2, share=0.28, recalled=38),
    EIGHT: failed("ValueError: Expected another model.\nmore"),
}


def test_kinds_and_names():
    assert [kind_of(cell) for cell in (Cell(DENSE), *CELLS)] == [
        "dense", "low rank", "one budget", "to the nearest", "another program", "another program",
    ]  # fmt: skip
    assert kind_of(rounded_cell("int4")) == "same bits"
    assert [name_of(cell) for cell in (Cell(DENSE), *CELLS)] == [
        "dense", "keep 0.8", "size 0.27, refitted", "int4 groups of 64 to the nearest", "absmax-4", "absmax-8",
    ]  # fmt: skip


def test_the_table_of_bytes():
    speeds = {Cell(DENSE): {"prefill": 200.0, "decode": 10.0}, OURS: {"prefill": 190.0, "decode": 15.0}}
    numbers = bytes_numbers(REFERENCE, CELLS, 500, 60.0, speeds)
    assert [row["model"] for row in numbers] == [
        "dense", "keep 0.8", "absmax-4", "size 0.27, refitted", "int4 groups of 64 to the nearest", "absmax-8",
    ]  # fmt: skip
    assert [row["bytes of the model"] for row in numbers[:4]] == [1500, 1300, 780, 770]
    assert [row["seconds to compress"] for row in numbers[1:5]] == [63, 3, 63, 3]
    assert all(list(row) == list(numbers[0]) for row in numbers)
    rows = {row["model"]: row for row in bytes_table(numbers, metrics_of(REFERENCE.measured))}
    ours, dense = rows["size 0.27, refitted"], rows["dense"]
    assert (dense["bytes"], ours["bytes"], rows["absmax-8"]["bytes"]) == ("100.0 %", "27.0 %", "failed")
    assert ours["perplexity of news"] == f"{math.exp(sum(HARDNESS) / 20 + 0.1):.2f} ({math.exp(0.1):.3f}x)"
    assert (dense["KL on news"], ours["KL on news"]) == ("", "0.100")
    assert (dense["facts %"], ours["facts %"]) == ("100.0", "95.0 (95 %)")
    assert (dense["decode tokens/s"], ours["decode tokens/s"]) == ("10", "15 (1.50x)")
    assert rows["keep 0.8"]["decode tokens/s"] == ""
    assert all(list(row) == list(dense) for row in rows.values())


def test_models_of_equal_bytes_are_compared_in_pairs():
    assert at_equal_bytes(CELLS, THEIRS) == at_equal_bytes(CELLS, WORSE) == OURS
    assert at_equal_bytes(CELLS, RANKS) is None  # of far more bytes
    rows = {row["beside"]: row for row in comparison_table(REFERENCE, CELLS)}
    assert list(rows) == ["absmax-4", "int4 groups of 64 to the nearest"]
    worse, tied = rows["int4 groups of 64 to the nearest"], rows["absmax-4"]
    assert (worse["model"], worse["bytes"], tied["its bytes"]) == ("size 0.27, refitted", "27.0 %", "28.0 %")
    times = f"{math.exp(-0.3):.3f}"
    assert worse["perplexity of news, ratio"] == f"**{times}** ({times} to {times})"
    assert worse["KL on news, ratio"] == "**0.250** (0.250 to 0.250)"
    assert worse["facts %, points"].startswith("**+45.0** (")
    assert tied["KL on news, ratio"].startswith("1.000 (")
    assert tied["KL on news, ratio"].endswith(" ≈")
    assert tied["facts %, points"] == "+0.0 (+0.0 to +0.0) ≈"


def test_the_figure_joins_models_of_one_kind_and_names_programs(tmp_path):
    cells = {
        **CELLS,
        EIGHT: diverging(0.0, share=0.51, recalled=40),
        Cell(FOLDER, label="nf4"): diverging(9.0, share=0.28, recalled=1),
        rounded_cell("0.21", refit=True): diverging(0.3, share=0.21, recalled=33),
    }
    figure = bytes_figure(REFERENCE, cells, 10.0)
    save_figure(figure, Path(os.environ.get("FASC_FIGURES", tmp_path)) / "bytes.png")
    perplexity, facts = figure.axes
    assert (perplexity.get_yscale(), perplexity.get_xscale(), facts.get_yscale()) == ("log", "log", "linear")
    lines = {line.get_label(): line for line in perplexity.lines}
    assert list(lines) == ["one budget (size)", "low rank (keep)", "rounded to the nearest", "absmax", "nf4"]
    assert lines["one budget (size)"].get_xdata() == pytest.approx([21, 27])
    assert lines["one budget (size)"].get_ydata() == pytest.approx([math.exp(0.3) - 1, math.exp(0.1) - 1])
    assert lines["absmax"].get_linestyle() == "None"
    assert lines["absmax"].get_ydata()[-1] == pytest.approx(0.001)  # as good as dense: on the border
    assert lines["nf4"].get_ydata() == pytest.approx([99])  # 8,000 times
    names = [label.get_text() for label in perplexity.get_yticklabels()]
    assert (names[0], names[-1]) == ("≤ 1.001", "≥ 100")
    assert len({(line.get_color(), line.get_marker()) for line in lines.values()}) == 5
    assert {line.get_label() for line in facts.lines} >= {"dense", "guessing"}


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="none to draw"):
        bytes_figure(REFERENCE, {EIGHT: CELLS[EIGHT]})


def test_a_refit_that_was_put_back_is_named_in_the_tables():
    refit = {"layers": 0, "loss": {"before": 3.0, "after": 3.1, "error": 0.01}, "reverted": True}
    cell = Cell("fasc", Budget(size=0.21), BEST, refit=True)
    outcomes = {cell: dataclasses.replace(outcome(), bytes=400, refit=refit)}
    dense = dataclasses.replace(outcome(), bytes=1000)
    assert cell_line(cell, outcomes[cell], dense, lambda *_: "half").endswith(f"{PUT_BACK}, 4 s")
    assert results_rows(dense, outcomes, [])[1]["refit verdict"] == PUT_BACK
    numbers = bytes_numbers(dense, outcomes, 0, 0.0, {})
    assert numbers[1]["refit"] == PUT_BACK
    assert bytes_table(numbers, metrics_of(dense.measured))[1]["model"] == "size 0.21, refitted (put back)"
