from __future__ import annotations

import io
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasc_lightning import DependenceScore
from fasc_lightning.dependence import COLUMNS, RhoHistory, emergence
from fasc_lightning.dependence._summary import describe

NAN = math.nan


def row(step, layer, rho=0.5, null=0.1, **others):
    defaults = {
        "debiased": rho - 0.05, "low": rho - 0.1, "high": rho + 0.1, "iid_floor": 0.08, "tokens": 512,
        "reason": "" if rho == rho else "g does not vary",
    }  # fmt: skip
    return {"step": step, "layer": layer, "rho": rho, "null": null, **defaults, **others}


def series(*rhos, layer="a", null=0.1):
    """Observations of one layer at steps 0, 10, 20, ..."""
    return RhoHistory(row(10 * i, layer, rho, null) for i, rho in enumerate(rhos))


def same(left, right):
    """Equal rows, NaN being equal to NaN."""
    return [[repr(v) for v in r.values()] for r in left] == [[repr(v) for v in r.values()] for r in right]


def test_a_row_comes_back_as_it_was_given_with_its_columns_in_order():
    given_row = row(3, "a", 0.25, tokens=7)
    history = RhoHistory([given_row])
    assert history[0] == given_row == history[-1]
    assert list(history[0]) == list(COLUMNS)
    assert COLUMNS[:3] == ("step", "layer", "rho")
    assert COLUMNS[-2:] == ("tokens", "reason")
    with pytest.raises(IndexError, match="one of 1 observations but got 1"):
        history[1]


def test_the_rows_handed_out_are_copies():
    history = series(0.5)
    history[0]["rho"] = 0.9
    assert history[0]["rho"] == 0.5


def test_a_slice_is_a_list_of_rows():
    history = series(0.1, 0.2, 0.3)
    assert [r["rho"] for r in history[1:]] == [0.2, 0.3]
    assert [r["rho"] for r in history[::-1]] == [0.3, 0.2, 0.1]


def test_scalars_of_numpy_and_torch_become_plain_numbers():
    history = RhoHistory([row(np.int64(4), "a", torch.tensor(0.5), tokens=torch.tensor(9))])
    values = history[0]
    assert (values["step"], values["rho"], values["tokens"]) == (4, 0.5, 9)
    assert (type(values["step"]), type(values["rho"]), type(values["tokens"])) == (int, float, int)


def test_a_pair_of_step_and_layer_that_is_there_already_is_replaced_where_it_stands():
    history = RhoHistory([row(0, "a", 0.1), row(0, "b", 0.2), row(10, "a", 0.3)])
    history.append(row(0, "a", NAN))
    assert len(history) == 3
    assert math.isnan(history[0]["rho"])
    assert history[0]["reason"] == "g does not vary"
    assert [r["rho"] for r in history[1:]] == [0.2, 0.3]


def test_layers_keep_the_order_of_their_first_observation_and_steps_ascend():
    history = RhoHistory([row(20, "b"), row(20, "a"), row(5, "c"), row(5, "b")])
    assert history.layers == ["b", "a", "c"]
    assert history.steps == [5, 20]
    assert list(history.at()) == ["b", "a"]
    assert list(history.at(5)) == ["b", "c"]


def test_a_matrix_has_layers_by_steps_and_nan_where_nothing_was_observed():
    history = RhoHistory([row(20, "b", 0.4, tokens=3), row(5, "a", 0.2), row(20, "a", 0.3)])
    np.testing.assert_array_equal(history.matrix("rho"), [[NAN, 0.4], [0.2, 0.3]])
    np.testing.assert_array_equal(history.matrix("tokens"), [[NAN, 3], [512, 512]])
    with pytest.raises(ValueError, match=r"one of the columns step, rho, .* but got 'layer'"):
        history.matrix("layer")


def test_columns_have_the_types_of_their_contents():
    history = RhoHistory([row(5, "a", 0.2), row(5, "b", NAN)])
    assert history.column("layer").tolist() == ["a", "b"]
    assert history.column("reason").tolist() == ["", "g does not vary"]
    assert history.column("step").dtype == np.int64
    assert history.column("rho").dtype == np.float64
    with pytest.raises(ValueError, match="but got 'rho_null'"):
        history.column("rho_null")


def test_an_empty_history_has_no_layers_steps_or_last_rows():
    history = RhoHistory()
    assert (history.layers, history.steps, history.at(), list(history)) == ([], [], {}, [])
    assert history.matrix("rho").shape == (0, 0)
    assert history.column("layer").shape == (0,)
    assert emergence(history) == {}


def test_a_step_without_observations_is_refused_with_those_there_are():
    history = series(*[0.5] * 9)
    with pytest.raises(ValueError, match=r"but got 15. Observed: 0, 10, 20, \.\.\., 60, 70, 80"):
        history.at(15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rho": "high"}, "Expected rho to be of type float but got 'high'"),
        ({"step": 1.5}, "Expected step to be of type int but got 1.5"),
        ({"layer": 3}, "Expected layer to be of type str but got 3"),
        ({"loss": 0.0}, "columns step, layer, .* but got .*loss"),
    ],
)
def test_a_row_of_another_form_is_refused_and_nothing_is_kept_of_it(change, message):
    history = series(0.5)
    with pytest.raises(ValueError, match=message):
        history.append({**row(10, "b"), **change})
    assert len(history) == 1
    assert history.layers == ["a"]
    assert history.steps == [0]


def test_it_becomes_a_data_frame_as_it_is():
    pandas = pytest.importorskip("pandas")
    history = RhoHistory([row(0, "a", 0.5), row(0, "b", NAN), row(10, "a", 0.7)])
    frame = pandas.DataFrame(history)
    assert tuple(frame.columns) == COLUMNS
    assert frame.groupby("layer")["rho"].max()["a"] == 0.7
    assert frame["rho"].isna().tolist() == [False, True, False]
    assert frame["tokens"].dtype == np.int64


numbers = st.floats(allow_nan=True, allow_infinity=True)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
rows = st.builds(
    lambda step, layer, values, tokens, reason: {
        "step": step, "layer": layer, **dict(zip(COLUMNS[2:8], values, strict=True)), "tokens": tokens, "reason": reason
    },
    st.integers(0, 2**40), texts, st.lists(numbers, min_size=6, max_size=6), st.integers(0, 2**40), texts,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(table=st.lists(rows, max_size=6))
def test_csv_and_state_give_back_exactly_what_went_in(table, tmp_path_factory):
    history = RhoHistory(table)
    path = tmp_path_factory.getbasetemp() / "round_trip.csv"
    history.to_csv(path)
    assert same(RhoHistory.from_csv(path), history)
    restored = RhoHistory()
    restored.load_state_dict(history.state_dict())
    assert same(restored, history)
    assert restored.layers == history.layers


def test_csv_is_readable_by_eye_and_undefined_is_nan(tmp_path):
    RhoHistory([row(5, "a", NAN, NAN)]).to_csv(tmp_path / "new" / "rho.csv")
    header, line = (tmp_path / "new" / "rho.csv").read_text().splitlines()
    assert header == ",".join(COLUMNS)
    assert line == "5,a,nan,nan,nan,nan,nan,0.08,512,g does not vary"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("null", "zero", 1), "Expected the columns step, .*'zero'"),
        (lambda text: text.replace("0.5", "half", 1), "Line 2 of .* 'half'"),
        (lambda text: text.rstrip() + ",more\n", "Line 2 of .* expected 10 cells"),
        (lambda text: text.rsplit(",", 1)[0] + "\n", "Line 2 of .* expected 10 cells"),
    ],
)
def test_a_csv_of_something_else_is_refused(tmp_path, change, message):
    path = tmp_path / "rho.csv"
    series(0.5).to_csv(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        RhoHistory.from_csv(path)


def test_a_table_that_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "rho.csv"
    series(0.5).to_csv(path)
    before = path.read_bytes()
    unwritable = RhoHistory([row(0, "a"), row(1, "\ud800")])  # half a surrogate pair is not UTF-8
    with pytest.raises(UnicodeEncodeError):
        unwritable.to_csv(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_parquet_holds_the_same_table(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    history = RhoHistory([row(0, "a", 0.1 + 0.2), row(0, "b", NAN)])
    history.to_parquet(tmp_path / "rho.parquet")
    table = parquet.read_table(tmp_path / "rho.parquet")
    assert tuple(table.column_names) == COLUMNS
    assert table.column("rho").null_count == 0
    assert same(RhoHistory(table.to_pylist()), history)
    assert [path.name for path in tmp_path.iterdir()] == ["rho.parquet"]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'fasc-lightning\[table\]'"):
        series(0.5).to_parquet(tmp_path / "rho.parquet")
    assert not list(tmp_path.iterdir())


def test_the_state_goes_through_a_checkpoint_that_allows_only_weights():
    history = RhoHistory([row(0, "a", 0.1), row(0, "b", NAN), row(10, "b", 0.2)])
    buffer = io.BytesIO()
    torch.save(history.state_dict(), buffer)
    buffer.seek(0)
    resumed = RhoHistory([row(99, "z")])
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert same(resumed, history)
    # The resumed run observes step 10 again, then goes on.
    resumed.extend([row(10, "b", 0.3), row(20, "a", 0.4)])
    assert resumed.steps == [0, 10, 20]
    assert [r["rho"] for r in resumed[2:]] == [0.3, 0.4]


def test_the_state_is_a_copy():
    history = series(0.5)
    state = history.state_dict()
    history.append(row(0, "a", 0.9))
    assert state["rho"].tolist() == [0.5]


def test_the_state_names_layers_once_and_takes_under_80_bytes_a_row():
    history = RhoHistory(row(step, f"a_long_name.{layer}") for step in range(50) for layer in range(20))
    state = history.state_dict()
    assert len(state["layers"]) == 20
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in tensors) <= 80 * len(history)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("null"), "Expected the state of a RhoHistory"),
        (lambda state: state.update(rho=torch.zeros(3)), "columns of one length .*'rho': 3"),
    ],
)
def test_another_state_is_refused_and_the_history_unchanged(change, message):
    history = series(0.5)
    state = series(0.1, 0.2).state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        history.load_state_dict(state)
    assert same(history, series(0.5))


def emergence_by_definition(observed, threshold, observations):
    """Try each start, and look at every observation that follows it."""
    for start in range(len(observed) - observations + 1):
        window = observed[start : start + observations]
        if all(rho > threshold and rho > null and low > 0 for _, rho, null, low in window):
            return observed[start][0]
    return None


levels = st.sampled_from([0.1, 0.3, 0.5, NAN])


@settings(deadline=None, max_examples=100)
@given(
    rhos=st.lists(levels, max_size=12),
    nulls=st.lists(levels, min_size=12, max_size=12),
    lows=st.lists(st.sampled_from([-0.1, 0.0, 0.1, 0.2, NAN]), min_size=12, max_size=12),
    threshold=st.sampled_from([0.0, 0.3, 0.4]),
    observations=st.integers(1, 4),
)
def test_emergence_is_the_first_run_of_its_definition(rhos, nulls, lows, threshold, observations):
    observed = [(7 * i, *values) for i, values in enumerate(zip(rhos, nulls, lows, strict=False))]
    history = RhoHistory(row(0, "other", 0.9) for _ in range(1))
    history.extend(row(step, "a", rho, null, low=low) for step, rho, null, low in reversed(observed))
    found = emergence(history, threshold, observations)
    assert found.get("a") == emergence_by_definition(observed, threshold, observations)


def test_an_undefined_observation_breaks_a_run_and_a_missing_one_does_not():
    assert emergence(series(0.5, 0.5, NAN, 0.5, 0.5, 0.5)) == {"a": 30}
    history = series(0.5, 0.5, 0.1, 0.5, 0.5, 0.5)
    sparse = RhoHistory(r for r in history if r["step"] != 20)
    sparse.append(row(20, "b"))
    assert emergence(sparse) == {"a": 0, "b": None}


def test_a_layer_that_never_leaves_its_null_does_not_emerge():
    assert emergence(series(0.5, 0.5, 0.5, null=0.6)) == {"a": None}
    assert emergence(series(0.3, 0.3, 0.3)) == {"a": None}


def test_a_layer_whose_interval_holds_zero_does_not_emerge():
    for low in (-0.1, 0.0, NAN):  # NaN: fewer than eight sequences
        assert emergence(RhoHistory(row(step, "a", 0.9, low=low) for step in range(3))) == {"a": None}
    assert emergence(RhoHistory(row(step, "a", 0.9, low=0.01) for step in range(3))) == {"a": 0}


def test_unrelated_values_on_few_tokens_do_not_emerge():
    history = RhoHistory()
    for step in range(12):
        score = DependenceScore()
        score.update(torch.randn(8, 4, 64), torch.randn(8, 4, 64))
        low, high = score.interval.tolist()
        values = {"debiased": score.debiased.item(), "low": low, "high": high, "iid_floor": score.iid_floor.item()}
        history.append(row(step, "a", score.compute().item(), score.null.item(), **values))
    assert (history.column("rho") > 0.3).all()
    assert (history.column("iid_floor") > 0.3).all()
    assert emergence(history, 0.3, 2) == {"a": None}
    said = describe(history)
    assert "the iid floor is above 0.3 in 1 of 1 layer (100.0%): there unrelated tokens alone" in said


def test_the_summary_says_nothing_of_floors_below_the_threshold():
    assert "iid floor is above" not in describe(series(0.5))


@pytest.mark.parametrize("function", [emergence, describe])
def test_options_out_of_range_are_refused(function):
    for threshold in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=r"threshold of rho in \[0, 1\] but got"):
            function(series(0.5), threshold)
    with pytest.raises(ValueError, match="1 observation or more but got 0"):
        function(series(0.5), 0.3, 0)


def test_the_summary_says_what_is_undefined_and_why():
    few = {"null": NAN, "debiased": NAN, "low": NAN, "high": NAN, "reason": "too few"}
    history = RhoHistory([row(0, "a"), row(0, "b", **few), row(0, "c", **few), row(0, "d", NAN)])
    lines = describe(history).splitlines()
    assert "undefined at step 0: 1 layer: g does not vary (1)" in lines
    assert "undefined in part at step 0: 2 layers: too few (2)" in lines
    assert emergence(history, 0.3, 1) == {"a": 0, "b": None, "c": None, "d": None}


def test_the_summary_gives_the_figures_of_the_last_step():
    history = RhoHistory()
    rhos = np.linspace(0.05, 0.6, 8)
    for step in (0, 50, 100):
        history.extend(row(step, f"h.{i}.fc", rho, null=0.2) for i, rho in enumerate(rhos.tolist()))
        history.extend([row(step, "dead", NAN, NAN), row(step, "idle", NAN, NAN, reason="not used in this step")])
    lines = describe(history).splitlines()
    assert lines[0] == "rho of 10 layers: 30 observations at 3 steps (steps 0 to 100)"
    above, beyond_null = int((rhos > 0.3).sum()), int((rhos > 0.2).sum())
    assert f"mean rho {rhos.mean():.3f}" in lines[1]
    assert f"median {np.median(rhos - 0.05):.3f}" in lines[1]
    assert f"rho above 0.3 in {above} of 8 layers ({above / 8:.1%})" in lines[1]
    assert f"above its null in {beyond_null} of 8 layers ({beyond_null / 8:.1%})" in lines[1]
    table = [line for line in lines if "h." in line and "│" in line]
    assert [line.split("│")[1].strip() for line in table] == [f"h.{i}.fc" for i in (7, 6, 5, 4, 3)]
    assert "0.550" in table[0]
    assert "0.500 to 0.700" in table[0]
    criterion = "3 observations in a row above 0.3 and above the null, the interval of the debiased rho above 0"
    emerged = lines.index(f"emerged ({criterion}): 4 of 10 layers; first:")
    assert lines[emerged + 1 : emerged + 5] == [f"  step 0: h.{i}.fc" for i in (4, 5, 6, 7)]
    assert lines[-1] == "undefined at step 100: 2 layers: g does not vary (1), not used in this step (1)"


def test_the_summary_names_the_first_five_layers_in_order_of_step():
    history = RhoHistory()
    for step in range(8):
        history.extend(row(step, f"layer{i}", 0.5 if step >= 6 - i else 0.1) for i in range(7))
    lines = describe(history, observations=1).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("emerged (1 observation in a row"))
    assert lines[first + 1 :] == [f"  step {i}: layer{6 - i}" for i in range(5)]


def test_the_summary_of_nothing_says_so():
    assert describe(RhoHistory()) == "rho: nothing was observed"
    undefined = describe(series(NAN))
    assert "at step 0 rho is defined for no layer" in undefined
    assert "undefined at step 0: 1 layer: g does not vary (1)" in undefined


def test_the_summary_manages_without_nulls_and_takes_names_as_they_are():
    text = describe(RhoHistory([row(0, "experts[red].up", 0.5, NAN, debiased=NAN)]))
    assert "no null" in text
    assert "experts[red].up" in text


def test_a_history_of_some_layers():
    history = RhoHistory(row(step, layer) for step in (0, 5) for layer in "abc")
    assert history.only(["c", "a", "d"]).layers == ["a", "c"]
    assert history.only(["c", "a", "d"]).steps == [0, 5]
    assert history.only("abc") is history
    assert len(history.only([])) == 0
