"""Calibrations in checkpoints that were damaged or edited: never resumed with other statistics, nor in silence."""

from __future__ import annotations

import shutil
import warnings

import pytest
import saved_cases
import torch
from old_files import OLD, Counting
from safetensors import safe_open
from safetensors.torch import save_file
from saved_cases import BATCHES, STOP, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

AGAIN = "The calibration starts again from its first batch"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved_cases.save_interrupted(folder / "calibration", beside=False)
        saved_cases.save_interrupted(folder / "beside", beside=True)
        straight = fit(folder / "straight")
    return folder, straight


def edited(source, target, change):
    """Write a checkpoint whose calibration was changed; return its path."""
    content = torch.load(source / "last.ckpt", weights_only=True)
    (own,) = (state for key, state in content["callbacks"].items() if key.startswith("FascCallback"))
    if (other := change(own["calibration"])) is not None:
        own["calibration"] = None if other == "null" else other
    torch.save(content, target / "last.ckpt")
    return target / "last.ckpt"


def name_of(state, ending):
    return next(name for name in state["tensors"] if name.endswith(ending))


def drop(*path):
    def edit(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return edit


def put(ending, change):
    def edit(state):
        name = name_of(state, ending)
        state["tensors"][name] = change(state["tensors"][name])

    return edit


def at(*path, value):
    def edit(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value(state[path[-1]]) if callable(value) else value

    return edit


#: What can be told without a checksum, too, and what only with one.
TOLD = {
    "another shape": (
        put(".right", lambda t: t[:-1]),
        r"shape \(\) or \(\d+\) at 'couplings\.\d\.right' but got one of",
    ),
    "another type": (put(".right", lambda t: t.double()), r"float32 and shape .* at 'couplings\.\d\.right'"),
    "integers": (put(".right", lambda t: t.long()), r"float32 and shape .* but got one of int64"),
    "NaN": (put(".left", lambda t: t.fill_(torch.nan)), r"finite numbers at 'couplings\.\d\.left'"),
    "a negative count": (put("gradients.0.count", lambda t: t - 1000), r"from 0 to .* at 'gradients\.0\.count'"),
    "scores of another type": (put("scores.biased", lambda t: t.float()), r"float64 .* at 'scores\.biased'"),
    "scores of another number": (put("scores.tokens", lambda t: t[:-1]), r"at 'scores\.tokens'"),
    "a list of scores": (
        put("scores.tokens", lambda t: t.tolist()),
        r"a tensor in memory at 'scores\.tokens' but got a list",
    ),
    "a tensor missing": (
        drop("tensors", "couplings.0.weights"),
        r"the tensor 'couplings.*missing",
    ),
    "a tensor too many": (lambda s: s["tensors"].update(x=torch.ones(1)), "no tensor 'x'"),
    "another layer": (at("header", "moments", "shapes", value=lambda s: {"x": (3, 4)}), "Expected"),
    "moments of another type": (
        at("header", "moments", "dtype", value="float64"),
        "their dtype are others|a calibration with the values",
    ),
    "unknown statistics": (at("header", "moments", "needs", value=["all"]), r"at 'header\.moments\.needs\[0\]'"),
    "a group that is a dict": (at("header", "moments", "groups", "gradients", value={}), "a list at"),
    "batches as text": (at("header", "batches", value="4"), r"an integer.* at 'header\.batches' but got '4'"),
    "rows that do not add up": (
        at("header", "rows", value=lambda r: [n + 1 for n in r]),
        r"at 'scores\.rows'|a calibration with",
    ),
    "no header": (drop("header"), "the entry 'header'"),
    "a schedule that is a list": (at("schedule", value=[False, None]), "at 'schedule' but got a list"),
    "a schedule without end": (at("schedule", "min_steps", value=1.5), r"at 'schedule\.min_steps'"),
    "no positions": (at("positions", value=[]), "at 'positions'"),
    "a position without generators": (
        at("positions", 0, "rng", value={}),
        r"the entry 'python' in 'positions\[0\]\.rng'",
    ),
    "a generator that is none": (at("positions", 0, "rng", "torch", value=lambda t: t * 0), "random generators at"),
    "a key that is no name": (lambda s: s.update({3: 4}), "names as keys but got 3"),
    "another format": (at("format", value=7), "its format is 7, of which this version knows nothing"),
    "no format": (drop("format"), "its format is None"),
}
SUMMED = {
    "other values": (
        put(".right", lambda t: t * 1.5),
        r"the tensor 'couplings\.\d\.right' with the values that were saved",
    ),
    "other scores": (put("scores.floor", lambda t: t + 1), r"the tensor 'scores\.floor' with the values"),
    "a count of 10^9": (at("header", "batches", value=10**9), "a calibration with the values that were saved"),
    "tokens of 10^9": (
        put("gradients.0.count", lambda t: t * 0 + 1e9),
        r"the tensor 'gradients\.0\.count' with the values",
    ),
    "another schedule": (at("schedule", "stopping", value=True), "a calibration with the values that were saved"),
    "another end": (at("end", value=[1, -1, 5]), "a calibration with the values that were saved"),
    "another position": (
        at("positions", 0, "rng", "python", value=lambda p: (p[0], (7, *p[1][1:]), p[2])),
        "a calibration with",
    ),
    "no checksum": (drop("checksum"), "the entry 'checksum'"),
    "no checksums": (drop("checksums"), "the entry 'checksums'"),
}


@pytest.mark.sampled(12)
@pytest.mark.parametrize("case", [*TOLD, *SUMMED])
def test_a_damaged_calibration_starts_again_and_says_why(saved, tmp_path, case):
    folder, (straight, _) = saved
    change, reason = {**TOLD, **SUMMED}[case]
    path = edited(folder / "calibration", tmp_path, change)
    counting = Counting()
    with pytest.warns(UserWarning, match=rf"(?s){AGAIN}.*{reason}"):
        module, callback = fit(tmp_path, counting, ckpt_path=path)
    assert counting.batches == BATCHES
    assert callback.report.layers[0].tokens == 2 * BATCHES * 16
    # Frozen: all that is lost is time, but for the order of the batches, which is drawn anew.
    assert list(module.state_dict()) == list(straight.state_dict())


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", [case for case in TOLD if case not in ("another format", "no format")])
def test_without_checksums_what_is_not_of_its_kind_is_told(tmp_path, case):
    change, reason = TOLD[case]
    path = edited(OLD / "calibration", tmp_path, change)
    counting = Counting()
    with pytest.warns(UserWarning, match=rf"(?s){AGAIN}.*{reason}"):
        fit(tmp_path, counting, ckpt_path=path)
    assert counting.batches == BATCHES


@pytest.mark.parametrize("found", ["null", [], 3, "text"])
def test_a_null_calibration_is_said(saved, tmp_path, found):
    folder, _ = saved
    path = edited(folder / "calibration", tmp_path, lambda state: found)
    said = "null" if found == "null" else f"a {type(found).__name__}"
    counting = Counting()
    again = pytest.warns(
        UserWarning, match="starts again with what is left of it, since the checkpoint holds no statistics"
    )
    with again, pytest.warns(UserWarning, match=rf"last\.ckpt holds {said} in place of a calibration"):
        fit(tmp_path, counting, ckpt_path=path)
    assert counting.batches == BATCHES - STOP


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (at("origin", value=None), "a mapping of names at 'origin' but got None"),
        (at("origin", "loops", value=[]), r"a mapping of names at 'origin\.loops' but got a list"),
        (at("origin", "stopping", value=True), "'origin' with the values that were saved"),
        (at("origin", "loops", "epoch_loop.batch_progress", "total", "ready", value=-3), "an integer of at least 0 at"),
    ],
)
def test_where_it_cannot_start_again_it_is_refused(saved, tmp_path, change, reason):
    folder, _ = saved
    path = edited(folder / "calibration", tmp_path, change)
    with pytest.raises(ValueError, match=rf"(?s)last\.ckpt cannot be used.*{reason}.*resume from another checkpoint"):
        fit(tmp_path, ckpt_path=path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda t: t.update({next(n for n in t if n.endswith("right")): torch.ones(3)}),
            r"shape .* but got one of float32",
        ),
        (
            lambda t: t.update({n: v.to(torch.int32) for n, v in t.items() if n.endswith("left")}),
            "but got one of int32",
        ),
        (
            lambda t: t.update({n: v * 1.5 for n, v in t.items() if n.endswith("left")}),
            "with the values that were saved",
        ),
        (lambda t: t.pop("scores.floor"), "is missing"),
    ],
)
def test_a_damaged_sidecar_starts_it_again(saved, tmp_path, change, reason):
    folder, _ = saved
    shutil.copytree(folder / "beside", tmp_path / "beside")
    (sidecar,) = (tmp_path / "beside").glob("*.safetensors")
    with safe_open(sidecar, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors)
    sidecar.unlink()
    save_file(tensors, sidecar, metadata)
    with pytest.warns(UserWarning, match=rf"(?s){AGAIN}.*{reason}"):
        fit(tmp_path, ckpt_path=tmp_path / "beside" / "last.ckpt")


@pytest.mark.parametrize("callbacks", [[], None, {"FascCallback": []}])
def test_a_checkpoint_without_mappings_of_callbacks_is_refused(saved, tmp_path, callbacks):
    folder, _ = saved
    content = torch.load(folder / "calibration" / "last.ckpt", weights_only=True)
    if isinstance(callbacks, dict):
        callbacks = {
            key: [] if key.startswith("FascCallback") else state for key, state in content["callbacks"].items()
        }
    torch.save({**content, "callbacks": callbacks}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged or was edited"):
        fit(tmp_path, ckpt_path=tmp_path / "last.ckpt")


def test_a_run_that_is_no_name_makes_no_files_elsewhere(saved, tmp_path):
    folder, _ = saved
    path = edited(folder / "calibration", tmp_path, at("run", value="../../x"))
    counting = Counting()
    fit(tmp_path, counting, ckpt_path=path)
    assert counting.batches == BATCHES - STOP
