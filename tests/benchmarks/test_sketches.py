from __future__ import annotations

import json
import subprocess

import pytest
import sketches
from pages import markers
from processes import run_script
from sketches import PROJECTED, SHARES, block_batches, main, width_rows

from fasc_lightning.statistics import moments_bytes


def test_the_memory_of_sketches_grows_linearly_and_that_of_exact_moments_with_the_square():
    rows = {d: {row["share"]: row for row in width_rows(d, 0)} for d in (128, 256)}
    assert set(rows[128]) == {1, PROJECTED, *SHARES}
    assert rows[128][PROJECTED]["bytes"] < 0.1 * rows[128][1]["bytes"]
    assert rows[256][1]["bytes"] > 3 * rows[128][1]["bytes"]
    # A sketch of s columns is linear in the width for a fixed s: 256 / 16 columns and 128 / 8 are as many.
    assert rows[256][16]["bytes"] == pytest.approx(2 * rows[128][8]["bytes"], rel=0.01)
    assert rows[128][1]["times_as_fast"]["median"] == 1
    assert all(row["microseconds_per_token"] > 0 for row in rows[128].values())


def test_activations_are_of_low_rank_and_noise():
    batches = block_batches(64, 300, 100)
    assert [batch["states"].shape for batch in batches] == [(1, 100, 64)] * 3
    assert batches[0]["classes"].shape == (1, 100)
    values = batches[0]["states"][0].svd().S
    assert values[7] > 1.5 * values[8]


def run_forked(command, **unused):
    """A process whose libraries have been imported before it starts."""
    said = run_script(*command[1:])
    return subprocess.CompletedProcess(command, 0, said)


def test_a_tiny_block_is_measured_in_a_process_of_its_own_and_written_down(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{markers('sketches.py')[0]}\nold\n{markers('sketches.py')[1]}\nbelow\n", encoding="utf-8")
    monkeypatch.setattr("memory.subprocess.run", run_forked)
    shapes = ["--hidden", "32", "--inner", "96", "--heads", "4", "--kv-heads", "2"]
    more = ["--tokens", "512", "--window", "128", "--sketch-size", "20", "--sketch-above", "48"]
    output = ["--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["sketches.py", "block", *shapes, *more, *output])
    main()
    blocks = json.loads((tmp_path / "sketches.json").read_text(encoding="utf-8"))["block"]
    assert list(blocks) == ["whole", "projected", "range"]
    assert blocks["projected"]["moments_bytes"] < blocks["range"]["moments_bytes"] < blocks["whole"]["moments_bytes"]
    whole, projected = ([layer["loss"] for layer in blocks[kind]["layers"]] for kind in ("whole", "projected"))
    assert projected == pytest.approx(whole, rel=1e-3)
    block = blocks["range"]
    assert block["tokens"] == 512
    assert block["resident"]["peak"] >= block["resident"]["before"] > 0
    assert block["predicted"]["peak"] > 4 * (32 * 96 * 3)
    assert {layer["name"].rpartition(".")[2] for layer in block["layers"] if layer["sketches"]} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    shapes_of = [tuple(layer["shape"]) for layer in block["layers"]]
    assert block["predicted"]["parts"]["moments"] < moments_bytes(shapes_of, needs={"coupled"})
    assert {"make", "calibrate", "factorize", "swap"} <= set(block["seconds"])
    monkeypatch.setattr("sys.argv", ["sketches.py", "widths", "--widths", "64", "--seconds", "0", *output])
    main()
    monkeypatch.setattr(sketches, "width_rows", lambda *_: pytest.fail("measured again"))
    main()
    monkeypatch.setattr("sys.argv", ["sketches.py", "tables", *output, "--write", str(page)])
    main()
    text = page.read_text(encoding="utf-8")
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "old" not in text
    assert "| 64 | 16 (1/4) |" in text
    assert "peak resident memory" in text
