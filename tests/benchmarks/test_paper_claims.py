from __future__ import annotations

import json
import lzma
import subprocess
from runpy import run_path

import numpy as np
import p1
import paper_claims
import pytest
import torch
from tiny import causal_model, save_model_folder

from fasc_lightning.layers import linear_weight


@pytest.fixture
def windows():
    return torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(1))


def test_the_hessian_is_that_of_brute_force_over_random_signs(windows):
    model = causal_model("llama").double()
    model.set_attn_implementation("eager")
    layer = model.model.layers[0].mlp.up_proj
    ids, m = windows[:1], linear_weight(layer).shape[0]

    def loss(added):
        with paper_claims.added_to_output(layer) as add:
            add(added)
            return model(input_ids=ids, labels=ids).loss * (ids.numel() - 1)

    H = torch.autograd.functional.hessian(loss, torch.zeros(ids.numel(), m, dtype=torch.float64))
    signs = 2.0 * torch.randint(2, (ids.numel(), 1), generator=torch.Generator().manual_seed(7)) - 1
    expected = torch.einsum("t,tmun,u->mn", signs[:, 0].double(), H, signs[:, 0].double())
    torch.set_default_dtype(torch.float64)
    try:
        product, size = paper_claims.layer_hessian(model, layer, ids, seed=7)
        found = product(torch.eye(m))
    finally:
        torch.set_default_dtype(torch.float32)
    assert size == m
    torch.testing.assert_close(found, expected)
    assert not layer._forward_hooks


def test_over_many_signs_the_tokens_own_hessians_are_left():
    blocks = torch.randn(3, 4, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = blocks + blocks.permute(2, 3, 0, 1)
    own = sum(blocks[t, :, t] for t in range(3))

    def loss(added):
        added = added.double()
        return torch.einsum("tm,tmun,un->", added, blocks, added) / 2

    draw = torch.Generator().manual_seed(1)
    found = [paper_claims.sampled_hessian(loss, (3, 4), draw)(torch.eye(4)) for _ in range(500)]
    np.testing.assert_allclose(torch.stack(found).mean(0).numpy(), own.numpy(), atol=0.6)


def test_leading_eigenvectors_are_those_of_numpy():
    draw = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(40, 40, generator=draw))[0]
    values = torch.cat([torch.tensor([-9.0, 7.0, 5.0]), 0.1 * torch.rand(37, generator=draw)])
    H = V @ torch.diag(values) @ V.T
    found, vectors = paper_claims.leading_eigenvectors(H.__matmul__, 40, 3, steps=4)
    expected, basis = np.linalg.eigh(H.double().numpy())
    order = np.argsort(-np.abs(expected))[:3]
    np.testing.assert_allclose(found.numpy(), expected[order], rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(basis[:, order] * vectors.numpy(), axis=0)), 1, atol=1e-4)


def test_overlap_is_one_for_the_same_subspace_and_the_share_of_shared_axes():
    axes = torch.eye(6)
    assert paper_claims.overlap(axes[:, :3], axes[:, [2, 0, 1]]) == pytest.approx(1)
    assert paper_claims.overlap(axes[:, :3], axes[:, 2:5]) == pytest.approx(1 / 3)
    assert paper_claims.captured(axes[:, :3], axes[:, 2:4]) == pytest.approx(1 / 2)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with all source files, a few lines each; FASC_DATA names it."""
    folder = tmp_path / "data"
    folder.mkdir()
    words = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 60
    for name in (*p1.CALIBRATION, *p1.TEXTS.values()):
        (folder / name).write_text(words)
    places = ["Rome", "Oslo", "Lima", "Bern"]
    facts = [
        {"subject": f"Place {i}", "relation": r, "template": "[X] is in [Y] .", "object": places[i], "kind": "other"}
        for i in range(4)
        for r in ("P1", "P2")
    ]
    foreign = [{**fact, "lang": language} for fact in facts for language in paper_claims.LANGUAGES]
    for name, rows in (("lama_trex", facts * 40), ("mlama", foreign)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    pairs = [{"phenomenon": "p", "uid": "u", "good": "A dog runs.", "bad": "A dog run."}] * 3
    numbers = [{"prompt": f"A bird has {i}", "object": word} for i, word in enumerate(("two", "four"))]
    rows = [{"instruction": "Name a fox.", "input": "", "output": "The quick brown fox jumps over dogs."}] * 200
    for name, lines in (("facts_p1", facts), ("blimp_a", pairs), ("numersense", numbers), ("alpaca", rows)):
        paper_claims.write_jsonl(folder / f"{name}.jsonl", lines)
    monkeypatch.setenv("FASC_DATA", str(folder))
    return folder


def test_all_parts_run_once_and_are_kept(data, tmp_path, monkeypatch):
    recipe = run_path(str(paper_claims.RECIPE))["main"]
    monkeypatch.setattr(subprocess, "run", lambda command, check: recipe(command[2:]))
    save_model_folder(tmp_path / "model")
    output = tmp_path / "out"
    options = ["--model", str(tmp_path / "model"), "--output", str(output), "--windows", "10", "--window", "32"]
    options += ["--eval-windows", "2", "--layers", "3", "--stability-windows", "2", "--eigenvectors", "2"]
    options += ["--hessian-windows", "2", "--hessian-window", "6", "--relations", "1", "--facts", "2", "--pairs", "2"]
    paper_claims.main(options)
    facts = [json.loads(line) for line in (output / "questions" / "facts.jsonl").read_text().splitlines()]
    assert {fact["kind"] for fact in facts} == {"en", "numbers", *paper_claims.LANGUAGES}
    assert len({fact["relation"] for fact in facts if fact["kind"] != "numbers"}) == 6  # one relation, six languages
    for name in ("syntax-uniform", "syntax-fisher", "layers", "sensitivity"):
        assert "svd" in (output / name / "results.md").read_text()
    stability = json.loads((output / "stability" / "stability.json").read_text())
    assert all(0 < row["fasc, mean"] <= 1 + 1e-6 for row in stability)
    rows = (output / "hessian" / "hessian.md").read_text().splitlines()[2:]
    assert len(rows) == 2 * paper_claims.HESSIANS
    kept = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    kept |= {path: path.stat().st_mtime_ns for path in (output / "hessian").glob("*.json")}
    paper_claims.main([*options, "--parts", "stability", "hessian"])
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
