"""Saved files, damaged or edited in any way: loaded with what was saved, or refused by name; never anything else.

A sample runs in the suite; ``-m exhaustive`` runs ten times as many.
"""

from __future__ import annotations

import json
import lzma
import pickle
import shutil
import warnings

import lightning.pytorch as pl
import mutations
import pytest
import saved_cases
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import JSON_WRONG, change_bytes, change_safetensors, change_tree
from tiny import byte_tokenizer

from fasc_lightning import CompressionReport, FascCallback, load_compressed, save_compressed
from fasc_lightning._utils import is_permutation
from fasc_lightning.batches import position
from fasc_lightning.data import file_windows, read_text
from fasc_lightning.data._finetune_records import read_records
from fasc_lightning.data._sampling import sample_windows
from fasc_lightning.data._text_files import json_rows
from fasc_lightning.dependence import RhoHistory
from fasc_lightning.evaluation import load_facts
from fasc_lightning.models import match_checkpoint
from fasc_lightning.recovery._logit_cache import LogitCache, teacher_of
from fasc_lightning.statistics import load_moments, moments_needs, pack_moments, save_moments
from fasc_lightning.studies.comparison import Cell, CellStore, Outcome

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

#: Mutations in the suite, and of the whole.
COUNTS = pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.exhaustive)])


def examples(count, check):
    """Call a check with so many ways to draw, the same ones every time."""

    @settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def body(data):
        check(data.draw)

    body()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Everything that is saved, once."""
    folder = tmp_path_factory.mktemp("saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved_cases.save_interrupted(folder / "calibration", beside=False)
        saved_cases.save_interrupted(folder / "beside", beside=True)
        module, callback, made = saved_cases.finished()
    made.save_checkpoint(folder / "compressed.ckpt")
    save_compressed(module.model, folder / "folder", report=callback.report)
    module.model.save_pretrained(folder / "plain")  # without checksums
    save_moments(saved_cases.small_moments(), folder / "moments.safetensors", "source")
    saved_cases.save_cache(folder / "teacher")
    return folder


def attempt(load, kinds=(ValueError, OSError)):
    """Return what was loaded, and with what message it was refused, if it was."""
    try:
        return load(), None
    except kinds as error:
        return None, str(error)


def loaded(load, where: str):
    """Return what was loaded, or None if it was refused with a message that names the file."""
    found, message = attempt(load)
    assert message is None or where in message
    return found


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def copied(folder, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return target


# Moments, folders and teachers' predictions.


@COUNTS
def test_moments_are_what_was_saved_or_refused(saved, tmp_path, count):
    path, content = tmp_path / "moments.safetensors", (saved / "moments.safetensors").read_bytes()
    expected = pack_moments(load_moments(saved / "moments.safetensors"))

    def check(draw):
        mutations.write(path, change_safetensors(draw, content))
        found = loaded(lambda: load_moments(path), "moments.safetensors")
        assert found is None or same(pack_moments(found), expected)
        loaded(lambda: moments_needs(path), "moments.safetensors")

    examples(3 * count, check)


@COUNTS
def test_weights_of_a_folder_are_what_was_saved_or_refused(saved, tmp_path, count):
    expected = dict(load_compressed(saved / "folder").state_dict())

    def check(draw):
        path = copied(saved / "folder", tmp_path / "folder") / "model.safetensors"
        mutations.write(path, change_safetensors(draw, path.read_bytes()))
        found = loaded(lambda: load_compressed(path.parent), str(path.parent))
        assert found is None or same(dict(found.state_dict()), expected)

    examples(count, check)


@COUNTS
def test_without_checksums_weights_are_of_their_kind(saved, tmp_path, count):
    expected = load_compressed(saved / "plain").state_dict()

    def check(draw):
        path = copied(saved / "plain", tmp_path / "plain") / "model.safetensors"
        mutations.write(path, change_safetensors(draw, path.read_bytes()))
        if (found := loaded(lambda: load_compressed(path.parent), str(path.parent))) is not None:
            assert_of_kind(found.state_dict(), expected)

    examples(2 * count, check)


def assert_of_kind(state, expected):
    """Finite floats and permutations of the shapes that they had; other numbers nobody can tell."""
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape)
        assert is_permutation(value) if name.endswith("permutation") else "proj" not in name or value.isfinite().all()


@COUNTS
def test_json_of_a_folder_is_understood_or_refused(saved, tmp_path, count):
    def check(draw):
        folder = copied(saved / "folder", tmp_path / "folder")
        path = folder / draw(st.sampled_from(["config.json", "config.json", "generation_config.json"]))
        if draw(st.integers(0, 4)):
            content = json.dumps(change_tree(draw, json.loads(path.read_text()), JSON_WRONG)).encode()
        else:
            content = change_bytes(draw, path.read_bytes())
        mutations.write(path, content)
        loaded(lambda: load_compressed(folder), str(folder))

    examples(2 * count, check)


@COUNTS
def test_predictions_of_a_teacher_are_what_was_saved_or_refused(saved, tmp_path, count):
    expected = LogitCache(saved / "teacher", saved_cases.TEACHER, saved_cases.no_mask, saved_cases.TOP_K)
    expected = expected.get(saved_cases.batch(), None)

    def check(draw):
        folder = copied(saved / "teacher", tmp_path / "teacher")
        (weights,) = folder.glob("*.safetensors")
        if draw(st.integers(0, 3)):
            mutations.write(weights, change_safetensors(draw, weights.read_bytes()))
        else:
            mutations.write(folder / "teacher.json", change_bytes(draw, (folder / "teacher.json").read_bytes()))

        def read():
            cache = LogitCache(folder, saved_cases.TEACHER, saved_cases.no_mask, saved_cases.TOP_K)
            return cache.get(saved_cases.batch(), None) or "none, so that the teacher is asked"

        found = loaded(read, str(folder))
        assert found is None or isinstance(found, str) or same(found, expected)
        loaded(lambda: teacher_of(folder), str(folder))

    examples(2 * count, check)


@COUNTS
def test_sampled_windows_are_what_was_sampled_or_refused(tmp_path, count):
    module, tokenizer = saved_cases.small_module(), byte_tokenizer()
    options = {"windows": 3, "window": 8, "seed": 0, "cache_dir": tmp_path}
    expected = sample_windows(module.model, tokenizer, **options)
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()

    def check(draw):
        mutations.write(path, change_safetensors(draw, content))
        found = loaded(lambda: sample_windows(module.model, tokenizer, **options), path.name)
        assert found is None or same(found, expected)

    examples(count, check)


# Checkpoints.


class HaltedError(Exception):
    """A resumed fit stands where it would go on."""


class Halt(pl.Callback):
    """Ends a resumed fit before its first batch, and notes where it stood."""

    def on_train_start(self, trainer, pl_module):
        (callback,) = (c for c in trainer.callbacks if isinstance(c, FascCallback))
        calibration = callback._calibration.run
        found = calibration.statistics()
        self.batches = calibration.batches
        self.state = {
            "moments": pack_moments(found.moments),
            "scores": {n: [*s.metric_state.values()] for n, s in found.scores.items()},
            "kept": found.kept.batches,
            "position": position(trainer),
            "origin": calibration.origin,
            "schedule": callback._calibration.schedule.state_dict(trainer),
            "history": callback.rho_history.state_dict(),
        }
        raise HaltedError


def resumed(path):
    """Resume from a checkpoint; return where it went on, or that it was said to start again, or None if refused."""
    halt = Halt()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loaded(lambda: saved_cases.fit(path.parent, halt, ckpt_path=path), path.name)
        except HaltedError:
            again = any("starts again" in str(warning.message) for warning in caught)
            assert again is (halt.batches == 0)
            return "again" if again else halt.state
    return None


@COUNTS
def test_a_calibration_is_what_was_saved_or_starts_again(saved, tmp_path, count):
    expected = resumed(saved / "calibration" / "last.ckpt")
    content = torch.load(saved / "calibration" / "last.ckpt", weights_only=True)
    (key,) = (key for key in content["callbacks"] if key.startswith("FascCallback"))

    def check(draw):
        tree = change_tree(draw, {"callbacks": {key: content["callbacks"][key]}})
        if isinstance(tree.get("callbacks"), dict):
            tree["callbacks"] = {**content["callbacks"], **tree["callbacks"]}
        torch.save({**content, **tree}, tmp_path / "last.ckpt")
        found = resumed(tmp_path / "last.ckpt")
        assert found in (None, "again") or same(found, expected)

    examples(3 * count, check)


@COUNTS
def test_a_sidecar_is_what_was_saved_or_the_fit_starts_again(saved, tmp_path, count):
    expected = resumed(saved / "beside" / "last.ckpt")

    def check(draw):
        folder = copied(saved / "beside", tmp_path / "beside")
        (sidecar,) = folder.glob("*.safetensors")
        mutations.write(sidecar, change_safetensors(draw, sidecar.read_bytes()))
        found = resumed(folder / "last.ckpt")
        assert found == "again" or same(found, expected)

    examples(count, check)


@COUNTS
def test_a_compressed_checkpoint_is_of_its_kind_or_refused(saved, count):
    content = torch.load(saved / "compressed.ckpt", weights_only=True)
    expected = content["state_dict"]

    def check(draw):
        tree = change_tree(draw, {"state_dict": expected})
        module = saved_cases.small_module()
        dense = list(module.state_dict())
        if (refused := attempt(lambda: match_checkpoint(module, tree))[1]) is not None:
            assert "checkpoint" in refused
            assert list(module.state_dict()) == dense
            return
        # Of parts that are not compressed torch itself says what is wrong.
        refused = attempt(lambda: module.load_state_dict(tree.get("state_dict", {})), RuntimeError)[1]
        assert refused is None or "Error(s) in loading state_dict" in refused
        if refused is None:
            assert_of_kind(module.state_dict(), expected)

    examples(3 * count, check)


@COUNTS
def test_the_callbacks_own_state_is_what_was_saved_or_refused(saved, count):
    content = torch.load(saved / "compressed.ckpt", weights_only=True)
    (own,) = (state for key, state in content["callbacks"].items() if key.startswith("FascCallback"))

    def check(draw):
        callback = FascCallback(**saved_cases.OPTIONS)
        changed = change_tree(draw, own)
        _, refused = attempt(lambda: callback.load_state_dict(changed), ValueError)
        assert refused is None or "FascCallback" in refused
        assert callback.report is None or same(callback.report.to_dict(), own["report"])
        callback.state_dict()

    examples(3 * count, check)


# Reports, tables and data.


def observed():
    row = {"rho": 0.5, "null": 0.1, "debiased": 0.4, "low": 0.3, "high": 0.6, "iid_floor": 0.0, "tokens": 64}
    return RhoHistory({"step": s, "layer": n, **row, "reason": ""} for s in (0, 2) for n in ("a", "b"))


@COUNTS
def test_histories_are_of_their_kind_or_refused(tmp_path, count):
    path = tmp_path / "rho.csv"
    observed().to_csv(path)
    content = path.read_bytes()

    def check(draw):
        history = RhoHistory()
        if draw(st.booleans()):
            mutations.write(path, change_bytes(draw, content))
            loaded(lambda: RhoHistory.from_csv(path).state_dict(), "rho.csv")
            return
        changed = change_tree(draw, observed().state_dict())
        _, refused = attempt(lambda: history.load_state_dict(changed), ValueError)
        assert refused is None or ("RhoHistory" in refused and len(history) == 0)
        assert len(list(history)) == len(history)
        history.state_dict()

    examples(3 * count, check)


@COUNTS
def test_reports_and_cells_are_of_their_kind_or_refused(tmp_path, count):
    report = saved_cases.finished()[1].report.to_dict()
    store, cell = CellStore(tmp_path, "context"), Cell("dense")
    store.save(cell, Outcome(parameters=3, kept=0.5, seconds={"swap": 1.0}, plan=[{"name": "a", "rank": 3}]))
    path = store.path(cell)
    content = json.loads(path.read_text())

    def check(draw):
        changed = change_tree(draw, report, JSON_WRONG)
        _, refused = attempt(lambda: str(CompressionReport.from_dict(changed)), ValueError)
        assert refused is None or "report" in refused
        mutations.write(path, json.dumps(change_tree(draw, content, JSON_WRONG)).encode())
        loaded(lambda: store.load(cell), path.name)

    examples(2 * count, check)


ROWS = [
    {"text": "The sea is wide."},
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"prompt": "Two and two?", "completion": "Four."},
]


@COUNTS
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.xz", ".txt", ".txt.xz"])
def test_data_files_are_read_or_refused(tmp_path, count, ending):
    tokenizer = byte_tokenizer()
    text = "".join(json.dumps(row) + "\n" for row in ROWS * 4) if "jsonl" in ending else "Ein Süßer, Straße. " * 9
    content = lzma.compress(text.encode()) if ending.endswith(".xz") else text.encode()
    path = tmp_path / f"data{ending}"

    def check(draw):
        mutations.write(path, change_bytes(draw, content))
        for read in (read_text, lambda path: list(read_records(str(path))), lambda p: file_windows(p, tokenizer, 2, 4)):
            found = loaded(lambda read=read: read(path), path.name)
            if read is read_text and found is not None and ending == ".txt.xz":
                assert found == text  # xz has checksums

    examples(count, check)


@COUNTS
def test_rows_of_any_kind_are_read_or_refused(tmp_path, count):
    path = tmp_path / "data.jsonl"

    def check(draw):
        rows = change_tree(draw, [{"rows": ROWS[0]}, {"rows": ROWS[1]}], JSON_WRONG)
        lines = [json.dumps(row.get("rows", row) if isinstance(row, dict) else row) for row in rows]
        path.write_text("\n".join(lines) + "\n")
        for read in (read_text, lambda path: list(read_records(str(path))), load_facts, lambda p: list(json_rows(p))):
            loaded(lambda read=read: read(path), path.name)

    examples(count, check)


def test_damaged_pickles_are_for_torch_to_refuse(saved, tmp_path):
    content = (saved / "calibration" / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises((RuntimeError, EOFError, OSError, pickle.UnpicklingError)):
        saved_cases.fit(tmp_path, ckpt_path=tmp_path / "last.ckpt")
