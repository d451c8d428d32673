from __future__ import annotations

import json

import pytest
import recovery
import torch
from tiny import save_model_folder

from fasc_lightning import compress, save_compressed
from fasc_lightning.data import load_model, text_windows, window_loader

pytest.importorskip("peft", reason="peft is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # asked for by peft
    pytest.mark.filterwarnings("ignore:Recovery .* nothing lowered the held-out loss"),  # few steps
]

TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 60


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The texts and facts of P1, and a budget that has been compressed already, all in a moment's size."""
    data, output = tmp_path / "data", tmp_path / "output"
    data.mkdir()
    output.mkdir()
    for number, name in enumerate((*recovery.CALIBRATION, *recovery.TEXTS.values())):
        (data / name).write_text(f"{number}. {TEXT}")
    fact = {"subject": "Peru", "relation": "r", "template": "[X] has [Y] .", "object": "Lima", "kind": "other"}
    facts = [fact, {**fact, "subject": "Oslo", "object": "?"}]
    (data / recovery.FACTS).write_text("\n".join(map(json.dumps, facts)))
    save_model_folder(tmp_path / "model")
    monkeypatch.setattr(recovery, "load_model", lambda name: load_model(str(tmp_path / "model")))
    for name, value in {"WINDOW": 32, "HELD": 3, "EVAL_WINDOWS": 2}.items():
        monkeypatch.setattr(recovery, name, value)
    model, tokenizer = load_model(str(tmp_path / "model"))
    windows = text_windows(TEXT, tokenizer, 6, 32)
    report = compress(model, window_loader(windows, 1), keep=0.5, refit=False, progress=False)
    save_compressed(model, output / "keep0.5", report=report, tokenizer=tokenizer)
    return data, output


@pytest.mark.parametrize("arm", [*recovery.RECOVERIES, recovery.DENSE])
def test_every_row_is_trained_and_measured(arm, folders):
    row = recovery.run(arm, "keep0.5", 32 * 12, *folders, None)
    assert row["perplexity"].keys() == recovery.TEXTS.keys()
    assert all(torch.isfinite(torch.tensor([*row["perplexity"].values(), row["held_out"]])))
    assert row["facts"] in (0.0, 50.0, 100.0)
    if arm == recovery.DENSE:
        assert row["recovery"] is None
    else:
        assert row["recovery"]["tokens"] == 32 * 9
        assert ("refine" in row["recovery"]) == (arm == recovery.REFINED)


@pytest.mark.parametrize("arm", recovery.SIZE_ARMS)
def test_the_scales_of_a_size_are_trained(arm, folders):
    data, output = folders
    model, tokenizer = recovery.load_model("smollm2")
    windows = text_windows(TEXT, tokenizer, 6, 32)
    report = compress(model, window_loader(windows, 1), size=0.5, refit=False, progress=False)
    save_compressed(model, output / "size0.5", report=report, tokenizer=tokenizer)
    row = recovery.run(arm, "size0.5", 32 * 12, data, output, None)
    assert row["budget"] == "size0.5"
    assert row["recovery"]["tokens"] == 32 * 9


def test_the_yardstick_trains_the_layers_that_are_compressed_elsewhere(folders):
    model, tokenizer = recovery.load_model("smollm2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    windows = text_windows(TEXT, tokenizer, 6, 32)
    recovery.fine_tune(model, window_loader(windows, 1), recovery.YARDSTICK)
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}


def test_the_table_sets_rows_beside_the_dense_model():
    dense = {"arm": "none", "budget": "size0.21", "perplexity": {"wikitext2": 20.0, "c4": 40.0}, "facts": 40.0}
    row = {"arm": "lora, labels", "budget": "keep0.6", "tokens": 60_000, "seconds": 90.0}
    row |= {"perplexity": {"wikitext2": 25.0, "c4": 44.0}, "facts": 39.0}
    lines = recovery.table([dense, row], dense).splitlines()
    assert lines[2] == "| | dense | | 20.00 | 40.00 | 40.0 % | |"
    assert lines[4] == (
        "| keep 0.6 | lora, labels | 60k | 25.00 (1.250x) | 44.00 (1.100x) | 39.0 % (97.5 % of dense) | 2 |"
    )
    assert recovery.row_name("lora, dense teacher", "keep0.8", 60_000) == "lora-dense-teacher-keep0.8-60k"
    assert lines[3].startswith("| size 0.21 | none |  | 20.00 (1.000x)")
    assert recovery.compression_options("size0.21") == ["--size", "0.21"]
