from __future__ import annotations

import copy
import dataclasses
import json
import math
import random

import pytest
import torch
from comparison_cases import outcome
from tiny import byte_tokenizer, causal_model

from fasc_lightning._utils import fingerprint
from fasc_lightning.compression import _factorize as factorized
from fasc_lightning.compression import measure_losses
from fasc_lightning.evaluation import Fact, MinimalPair, perplexity
from fasc_lightning.layers import LowRankLinear, PivotedLinear, compressed_layers, layer_sizes, select_layers
from fasc_lightning.solvers import available_methods
from fasc_lightning.studies.comparison import (
    Budget,
    Cell,
    CellStore,
    Comparison,
    Evaluation,
    GatheredStatistics,
    Outcome,
    Setting,
    gate_cells,
    group_cells,
    sensitivity_cells,
    some_facts,
    some_layers,
)
from fasc_lightning.studies.comparison import _comparison as comparison
from fasc_lightning.studies.comparison import _questions as comparison_evaluation
from fasc_lightning.studies.comparison import _statistics as comparison_statistics
from fasc_lightning.studies.comparison._cells import PUT_BACK
from fasc_lightning.studies.comparison._comparison import budget_share
from fasc_lightning.studies.comparison._layers import correlation_rows, fifths_rows, labelled_rows, layer_rows
from fasc_lightning.studies.comparison._statistics import gather_moments

FACTORS = Setting("uniform", "factors")
BEST = Setting("fisher", "pivot")
KEEP = Budget(keep=0.8)
FACTS = [
    Fact(subject, relation, "[X] is in [Y] .", place, kind)
    for relation, kind in (("a", "geographic"), ("b", "temporal"), ("c", "geographic"))
    for subject, place in (("one", "ab"), ("two", "cd"), ("six", "ef"))
]
PAIRS = [MinimalPair("agreement", "subject", "he is", "he are"), MinimalPair("agreement", "verb", "we are", "we is")]


def windows(seed, count=6):
    return torch.randint(3, 200, (count, 24), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calibration(tmp_path):
    tokenizer = byte_tokenizer()
    model = causal_model(vocab_size=len(tokenizer)).eval().requires_grad_(False)
    return GatheredStatistics(model, tokenizer, select_layers(model), windows(1), tmp_path / "statistics")


@pytest.fixture
def evaluation():
    return Evaluation({"noise": windows(2, 3)}, FACTS, PAIRS)


def comparing(calibration, methods=("fasc", "svd")):
    return Comparison(calibration, methods)


# Names and keys.


def test_names():
    assert [str(b) for b in (KEEP, Budget(rank=0.5), Budget(rank=256))] == ["keep 0.8", "rank 0.5", "rank 256"]
    assert str(Setting.parse("fisher-pivot")) == "fisher-pivot"
    assert Setting.parse("uniform-factors") == FACTORS
    assert (BEST.unit, FACTORS.unit) == ("fisher", "own")
    assert Cell("fasc", KEEP, BEST, refit=True, label="x").name == "fasc keep 0.8 fisher-pivot refit x"
    assert Cell("gfwsvd", KEEP, BEST, kronecker_steps=2).name == "gfwsvd 2 steps keep 0.8 fisher-pivot"


@pytest.mark.parametrize("text", ["fisher", "pivot-fisher", "greedy-pivot", "fisher-pivots", ""])
def test_settings_that_there_are_not(text):
    with pytest.raises(ValueError, match="ALLOCATION-LAYOUT"):
        Setting.parse(text)


def test_budgets_that_there_are_not():
    with pytest.raises(ValueError, match="neither"):
        Budget()
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        Budget(keep=1.5)


def test_a_rank_is_the_share_of_its_degrees_of_freedom():
    layers = {"a": torch.nn.Linear(8, 4, bias=False)}
    assert budget_share(layers, Budget(rank=2)) == 2 * (8 + 4 - 2) / 32
    assert budget_share(layers, KEEP) == 0.8


def test_outcomes_are_kept_whole(tmp_path, calibration, evaluation):
    store = CellStore(tmp_path, "context")
    cell = Cell("dense")
    measured = comparing(calibration).measure(cell, evaluation)
    store.save(cell, measured)
    assert store.load(cell) == measured
    failure = Outcome(error="ValueError: no\nmore")
    store.save(cell, failure)
    loaded = store.load(cell)
    assert (loaded.error, loaded.reason, loaded.measured) == (failure.error, "ValueError: no", None)
    assert math.isnan(loaded.kept)


def test_outcomes_serve_only_their_own_cell_and_context(tmp_path):
    store = CellStore(tmp_path, "context")
    cell = Cell("fasc", KEEP, BEST)
    assert store.load(cell) is None
    store.save(cell, Outcome())
    assert store.load(cell) is not None
    assert CellStore(tmp_path, "other").load(cell) is None
    other = Cell("fasc", KEEP, BEST, layers=("a",))  # of the same name
    assert store.path(other) == store.path(cell)
    assert store.load(other) is None


def test_failures_that_may_go_away_are_tried_again(tmp_path):
    store = CellStore(tmp_path, "context")
    cell = Cell("fasc", KEEP, BEST)
    store.save(cell, Outcome(error="MemoryError: no", lasting=False))
    assert store.load(cell) is None
    assert json.loads(store.path(cell).read_text())["outcome"]["error"] == "MemoryError: no"


# Questions.


def test_questions_are_told_apart(evaluation):
    same = Evaluation({"noise": windows(2, 3)}, FACTS, PAIRS)
    others = [
        Evaluation({"noise": windows(3, 3)}, FACTS, PAIRS),
        Evaluation({"other": windows(2, 3)}, FACTS, PAIRS),
        Evaluation({"noise": windows(2, 3)}, FACTS[1:], PAIRS),
        Evaluation({"noise": windows(2, 3)}, FACTS, PAIRS[1:]),
        Evaluation({"noise": windows(2, 3)}, FACTS, PAIRS, "medium"),
    ]
    assert same.fingerprint() == evaluation.fingerprint()
    assert len({e.fingerprint() for e in (same, *others)}) == 6
    with pytest.raises(ValueError, match="Expected texts, facts or minimal pairs"):
        Evaluation({}, [])


def test_answers_are_those_of_the_evaluation(calibration, evaluation):
    measured = evaluation.measure(calibration.model, calibration.tokenizer)
    assert measured.perplexity("noise") == pytest.approx(perplexity(calibration.model, windows(2, 3)), rel=1e-6)
    assert (len(measured.losses["noise"]), len(measured.recalled), len(measured.preferred)) == (3, 9, 2)
    assert evaluation.chance == pytest.approx(100 / 3)
    assert evaluation.kinds.count("geographic") == 6


def test_the_precision_holds_while_texts_are_read_and_no_longer(calibration, evaluation, monkeypatch):
    seen = []

    def spy(model, *arguments, **options):
        seen.append(torch.get_float32_matmul_precision())
        return torch.zeros(1)

    for name in ("token_losses", "recalled_facts", "correct_pairs"):
        monkeypatch.setattr(comparison_evaluation, name, spy)
    dataclasses.replace(evaluation, precision="medium").measure(calibration.model, calibration.tokenizer)
    assert seen == ["medium", "highest", "highest"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_some_facts_are_whole_relations_of_all_kinds():
    for count, expected in ((1, 3), (3, 3), (4, 6), (100, 9)):
        chosen = some_facts(FACTS, count, random.Random(0))
        assert len(chosen) == expected
        assert chosen == [fact for fact in FACTS if fact in chosen]
        if expected >= 6:
            assert {fact.kind for fact in chosen} == {"geographic", "temporal"}
    assert some_facts([], 5, random.Random(0)) == []


# Cells.


@pytest.mark.parametrize("method", [*available_methods(), *comparison.PRUNERS])
def test_every_method_is_measured_and_taken_back(calibration, evaluation, method):
    model = calibration.model
    before = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    setting = None if method in comparison.PRUNERS else BEST
    methods = [] if method in comparison.PRUNERS else [method]
    found = comparing(calibration, methods).measure(Cell(method, KEEP, setting), evaluation)
    assert found.error == ""
    assert found.kept == (1.0 if method == "magnitude" else pytest.approx(0.8, abs=0.03))
    assert found.zeros == (pytest.approx(0.2, abs=0.01) if method == "magnitude" else 0)
    assert {"evaluate"} < set(found.seconds)
    assert dict(model.named_modules()) == modules
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(p.requires_grad for p in model.parameters())


def test_a_setting_decides_allocation_and_storage(calibration, evaluation, monkeypatch):
    seen = {}
    measure = Evaluation.measure

    def spy(self, model, tokenizer):
        seen["layers"] = compressed_layers(model)
        return measure(self, model, tokenizer)

    monkeypatch.setattr(Evaluation, "measure", spy)
    for setting, kind in ((FACTORS, LowRankLinear), (BEST, PivotedLinear)):
        found = comparing(calibration).measure(Cell("fasc", KEEP, setting), evaluation)
        assert {type(layer) for layer in seen["layers"].values()} == {kind}
        ranks = {plan["rank"] / min(plan["shape"]) for plan in found.plan if plan["layout"] != "dense"}
        assert len(seen["layers"]) == sum(plan["layout"] != "dense" for plan in found.plan)
        built = {**calibration.layers, **seen["layers"]}
        assert found.parameters == layer_sizes(built).parameters
        assert len(ranks) > 1 if setting is BEST else len(ranks) <= 4  # one for each shape


def test_a_measured_setting_looks_at_the_calibration_windows(calibration, evaluation, monkeypatch):
    seen = []

    def watched(model, layers, factors, batches, rows, loss):
        seen.append((len(batches), set(factors)))
        return measure_losses(model, layers, factors, batches, rows, loss)

    monkeypatch.setattr(comparison, "measure_losses", watched)
    outcome = comparing(calibration).measure(Cell("fasc", KEEP, Setting("measured", "pivot")), evaluation)
    assert outcome.error == ""
    ((count, measured),) = seen
    assert count == 4
    assert {layer["name"] for layer in outcome.plan if layer["layout"] != "dense"} & measured
    before = comparing(calibration).measure(Cell("fasc", KEEP, BEST), evaluation)
    assert [layer["loss"] for layer in before.plan] != [layer["loss"] for layer in outcome.plan]


def test_cells_that_differ_in_their_budget_share_factorisations(calibration, evaluation, monkeypatch):
    made = []
    solve = factorized._factorize

    def counted(module, *arguments):
        made.append(module)
        return solve(module, *arguments)

    monkeypatch.setattr(factorized, "_factorize", counted)
    running = comparing(calibration)
    cells = [Cell("fasc", Budget(keep=keep), BEST) for keep in (0.8, 0.6)]
    outcomes = [running.measure(cell, evaluation) for cell in [*cells, Cell("svd", KEEP, BEST)]]
    assert len(made) == 2 * len(calibration.layers)
    assert outcomes[1].seconds["factorize"] > outcomes[0].seconds["factorize"]
    alone = comparing(calibration).measure(cells[1], evaluation)
    assert (alone.plan, alone.measured) == (outcomes[1].plan, outcomes[1].measured)


def test_a_single_layer(calibration, evaluation):
    name = next(iter(calibration.layers))
    found = comparing(calibration).measure(Cell("fasc", Budget(rank=4), FACTORS, layers=(name,)), evaluation)
    assert [plan["name"] for plan in found.plan] == [name]
    assert found.kept < 0.6


@pytest.mark.parametrize("lasting", [True, False])
def test_whatever_a_method_does_is_an_outcome_and_the_model_is_as_before(
    calibration, evaluation, monkeypatch, lasting, caplog
):
    error = FloatingPointError("overflow") if lasting else MemoryError("too much")

    def fail(self, model, tokenizer):
        assert compressed_layers(model)
        raise error

    before = dict(calibration.model.named_modules())
    monkeypatch.setattr(Evaluation, "measure", fail)
    found = comparing(calibration).measure(Cell("fasc", KEEP, BEST), evaluation)
    assert found.error == f"{type(error).__name__}: {error}"
    assert found.lasting == lasting
    assert dict(calibration.model.named_modules()) == before
    assert ("will be tried again" in caplog.text) != lasting  # with its traceback


def test_an_interrupt_is_no_outcome_but_leaves_the_model_as_before(calibration, evaluation, monkeypatch):
    def interrupt(self, model, tokenizer):
        raise KeyboardInterrupt

    before = dict(calibration.model.named_modules())
    monkeypatch.setattr(Evaluation, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        comparing(calibration).measure(Cell("fasc", KEEP, BEST), evaluation)
    assert dict(calibration.model.named_modules()) == before


def test_a_budget_too_small_says_so(calibration, evaluation):
    found = comparing(calibration).measure(Cell("fasc", Budget(keep=0.001), FACTORS), evaluation)
    assert found.reason.startswith("ValueError: Expected a budget of at least")
    assert found.lasting


def test_numbers_that_overflow_are_a_failure(calibration, evaluation):
    calibration.model.lm_head.weight.data.fill_(math.inf)
    found = comparing(calibration).measure(Cell("dense"), evaluation)
    assert found.reason.startswith("FloatingPointError: The loss of window 0 is not finite")


def test_a_refit_is_timed_and_says_whether_it_was_kept(tmp_path, calibration, evaluation):
    store, cell, plain = CellStore(tmp_path, "context"), Cell("fasc", KEEP, BEST, refit=True), Cell("fasc", KEEP, BEST)
    outcomes = {found: outcome for found, outcome, _ in comparing(calibration).run([plain, cell], evaluation, store)}
    found, unfitted = outcomes[cell], outcomes[plain]
    assert (found.error, unfitted.refit, unfitted.refit_verdict) == ("", None, "")
    assert found.seconds["refit"] > 0
    kept = found.measured.losses != unfitted.measured.losses
    assert found.refit["reverted"] is not kept
    assert found.refit_verdict == (f"refit of {found.refit['layers']} layers" if kept else PUT_BACK)
    assert store.load(cell).refit == found.refit


def test_cells_that_are_there_are_not_run_again(tmp_path, calibration, evaluation, monkeypatch):
    store = CellStore(tmp_path, "context")
    cells = [Cell("dense"), Cell("fasc", KEEP, BEST), Cell("svd", KEEP, BEST)]
    first = list(comparing(calibration).run(cells, evaluation, store))
    assert [found for *_, found in first] == [False] * 3
    store.path(cells[1]).unlink()

    def no_pass(*arguments):
        raise AssertionError("gathered again")

    monkeypatch.setattr(comparison_statistics, "gather_moments", no_pass)
    second = list(comparing(calibration).run(cells, evaluation, store))
    assert [found for *_, found in second] == [True, False, True]
    for (cell, before, _), (other, after, _) in zip(first, second, strict=True):
        assert cell == other
        assert before.measured == after.measured
        assert before.plan == after.plan


# Statistics.


def test_a_cell_kept_by_an_earlier_version_is_run_again(tmp_path):
    store, cell = CellStore(tmp_path, "context"), Cell("gfwsvd", KEEP, BEST)
    store.save(cell, outcome())
    kept = json.loads(store.path(cell).read_text())
    kept["cell"]["passes"] = kept["cell"].pop("kronecker_steps")
    kept["key"] = fingerprint("context", kept["cell"])
    assert store.load(cell) is not None
    store.path(cell).write_text(json.dumps(kept))
    assert store.load(cell) is None


def test_statistics_are_kept_and_only_grow(calibration, monkeypatch):
    passes = []
    real = gather_moments

    def counted(model, layers, tokens, needs, progress):
        passes.append(set(needs))
        return real(model, layers, tokens, needs, progress)

    monkeypatch.setattr(comparison_statistics, "gather_moments", counted)
    first = calibration.moments(["svd"]).needs
    assert first == calibration.moments(["fasc", "svd-llm"]).needs == comparison_statistics.ALWAYS
    assert calibration.moments(["asvd"]).needs == first | {"abs_x"}
    assert calibration.moments(["grad-svd"]).needs == first | {"abs_x", "saliency"}
    assert calibration.moments(["fasc", "asvd"]).needs == first | {"abs_x", "saliency"}
    assert passes == [first, first | {"abs_x"}, first | {"abs_x", "saliency"}]


def test_no_cell_depends_on_which_others_there_are(calibration, evaluation, tmp_path):
    cell = Cell("svd", KEEP, BEST)
    alone = comparing(calibration, ["svd"]).measure(cell, evaluation)
    calibration.folder = tmp_path / "elsewhere"
    among = comparing(calibration, available_methods()).measure(cell, evaluation)
    assert alone.plan == among.plan
    assert alone.measured == among.measured


def test_statistics_of_other_tokens_are_others(calibration):
    first = calibration.moments(["fasc"])
    calibration.windows = windows(5)
    name = next(iter(calibration.layers))
    assert not torch.equal(calibration.moments(["fasc"]).layer(name).G, first.layer(name).G)
    assert len(list(calibration.folder.glob("*.safetensors"))) == 2


def test_needs_tell_their_seconds(calibration):
    _, seconds = gather_moments(
        calibration.model, calibration.layers, calibration.windows, ["C", "saliency", "kronecker"]
    )
    assert set(seconds) == {"pass", "need C", "need saliency", "need kronecker"}  # and no more than was asked for
    assert sum(seconds.values()) - seconds["pass"] < seconds["pass"]
    calibration.moments(["gfwsvd"])
    before = dict(calibration.seconds)
    calibration.seconds.clear()
    calibration.moments(["gfwsvd"])
    assert calibration.seconds == before  # of the pass that made them


def test_further_steps_change_gfwsvd_alone(calibration):
    one = calibration.moments(["gfwsvd"])
    calibration.kronecker_steps = 2
    more = calibration.moments(["gfwsvd"])
    assert calibration.seconds["2 further kronecker steps"] > 0
    name = next(iter(calibration.layers))
    assert torch.equal(one.layer(name).A, more.layer(name).A)
    assert not torch.equal(one.layer(name).kronecker[0], more.layer(name).kronecker[0])
    assert calibration.seconds_of(["gfwsvd"]) == calibration.seconds
    again = calibration.moments(["gfwsvd"])
    assert torch.equal(again.layer(name).kronecker[0], more.layer(name).kronecker[0])


def test_scores_are_kept(calibration, monkeypatch):
    first = calibration.scores()
    monkeypatch.setattr(comparison_statistics, "backward_windows", None)
    assert repr(calibration.scores()) == repr(first)


# Studies of layers.


def test_gates_that_choose_alike_are_one_cell():
    rho = {"a": 0.1, "b": 0.3, "c": math.nan}
    cells = gate_cells(rho, [0.05, 0.2, 0.25, 0.5], "fasc", "svd", KEEP, BEST)
    chosen = {cell.label: dict(cell.methods) for cell in cells}
    assert chosen == {
        "all fasc": {"a": "fasc", "b": "fasc", "c": "fasc"},
        "rho above 0.2": {"a": "svd", "b": "fasc", "c": "fasc"},
        "rho above 0.5": {"a": "svd", "b": "svd", "c": "fasc"},
        "all svd": {"a": "svd", "b": "svd", "c": "svd"},
    }
    assert list(chosen) == [cell.label for cell in cells]
    labels = [cell.label for cell in gate_cells({"a": 0.1}, [0.05, 0.5], "fasc", "svd", KEEP, BEST)]
    assert labels == ["all fasc", "all svd"]


def test_groups_are_the_outer_fifths():
    rho = {f"layer{i:02}": i / 10 for i in range(10)}
    cells = group_cells(rho, ["fasc", "svd"], 0.5)
    assert [(cell.method, cell.label) for cell in cells] == [
        ("fasc", "critical layers"), ("svd", "critical layers"), ("fasc", "safe layers"), ("svd", "safe layers"),
    ]  # fmt: skip
    assert cells[0].layers == ("layer08", "layer09")
    assert cells[2].layers == ("layer00", "layer01")


def test_layers_one_by_one(tmp_path, calibration, evaluation):
    layers = list(calibration.layers)[:6]
    cells = sensitivity_cells(layers, ["fasc", "svd"], 0.25)
    run = comparing(calibration).run([Cell("dense"), *cells], evaluation, CellStore(tmp_path, "c"))
    outcomes = {cell: found for cell, found, _ in run}
    dense = outcomes.pop(Cell("dense"))
    scores = {name: {"rho": 0.5, "null": 0.1, "debiased": -i / 10} for i, name in enumerate(layers)}
    scores[layers[0]]["debiased"] = math.nan
    rows = layer_rows(dense, outcomes, scores)
    assert [row["layer"] for row in rows] == [*layers[1:], layers[0]]
    for method in ("fasc", "svd"):
        assert sum(row[f"share of predicted loss, {method}"] for row in rows) == pytest.approx(1)
    row, measured = rows[0], outcomes[cells[1]].measured
    change = math.log(measured.perplexity("noise") / dense.measured.perplexity("noise"))
    assert row["loss change, fasc"] == pytest.approx(change)
    assert row["facts change, fasc"] == pytest.approx(100 * (sum(measured.recalled) - sum(dense.measured.recalled)) / 9)
    fifths = fifths_rows(rows)
    assert [row["count"] for row in fifths] == [1, 4, 1]
    assert fifths[0]["loss change, svd (median)"] == rows[0]["loss change, svd"]
    assert {row["layers"] for row in correlation_rows(rows) if row["score"] == "debiased"} == {5}
    assert [row["layer"] for row in layer_rows(dense, outcomes)] == layers


def test_labelled_cells_say_how_many_layers():
    cells = {
        Cell("fasc", KEEP, BEST, label="some", layers=("a", "b")): Outcome(kept=0.5),
        Cell("fasc", KEEP, BEST, label="gate", methods=(("a", "fasc"), ("b", "svd"))): Outcome(error="no"),
    }
    rows = labelled_rows(outcome(), cells)
    assert [(row["cell"], row["method"], row["layers"]) for row in rows] == [
        ("dense", "dense", "-"), ("some", "fasc", 2), ("gate", "fasc and svd", 1),
    ]  # fmt: skip
    assert rows[2]["error"] == "no"


def test_some_layers_are_of_all_kinds_in_all_depths():
    layers = [f"blocks.{block}.{kind}" for block in range(30) for kind in "qkvoudg"]
    chosen = some_layers(layers, 42)
    assert len(chosen) == 42
    for kind in "qkvoudg":
        blocks = [int(name.split(".")[1]) for name in chosen if name.endswith(kind)]
        assert len(blocks) == 6
        assert blocks[0] < 5
        assert blocks[-1] >= 25
    assert len(some_layers(layers, 30)) >= 30  # a step of 7 would be one kind in all blocks
    assert {name[-1] for name in some_layers(layers, 30)} == set("qkvoudg")
    assert some_layers(layers, None) == some_layers(layers, 500) == layers
