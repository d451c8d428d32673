"""The benchmark of ranks, residuals and bits under one budget, on small layers and a model made in a moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks_or_bits as module
import torch
from layer_moments import full_moments
from pages import markers
from tiny import save_model_folder

from fasc_lightning.compression import fisher_metric


def test_every_option_loses_what_its_matrix_loses(monkeypatch):
    monkeypatch.setattr(module, "GROUP", 8)
    monkeypatch.setattr(module, "RESIDUALS", {2: (24,), 3: (8,)})
    W, moments = torch.randn(24, 32), full_moments(torch.randn(200, 32), torch.randn(200, 24), torch.randn(24, 32))
    found = module.options_of(W, moments)
    A, G = (moment.double() for moment in fisher_metric(moments))
    bits = [option for option in found if option[0] == "bits"]
    assert [size for _, size, _ in bits] == [module.Grid(b, 8, symmetric=False).nbytes(24, 32) for b in module.BITS]
    assert [loss for _, _, loss in bits] == sorted((loss for _, _, loss in bits), reverse=True)
    everything, eight = (loss for kind, _, loss in found if kind == "residual")
    assert everything < 1e-6 * bits[0][2]  # a residual of full rank
    assert 0 < eight < bits[1][2]
    ranks = {(kind, size): loss for kind, size, loss in found if kind in module.LAYOUTS}
    S = torch.linalg.svdvals(torch.linalg.cholesky(G).T @ W.double() @ torch.linalg.cholesky(A))
    for k in (8, 16):
        tail = float(S[k:].square().sum())
        assert ranks["factors", k * (24 + 32) + 2 * (24 + k)] == pytest.approx(tail, rel=1e-4)
        assert ranks["pivots", k * (24 + 32 - k) + 2 * (24 + k)] == pytest.approx(tail, rel=1e-4)


def test_from_the_options_to_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "GROUP", 8)
    monkeypatch.setattr(module, "BUDGETS", (0.5, 0.3))
    monkeypatch.setattr(module, "RESIDUALS", {2: (8,)})
    text, page = tmp_path / "text.txt", tmp_path / "page.md"
    save_model_folder(tmp_path / "model")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    page.write_text("\n".join(markers("ranks_or_bits.py")))
    options = ["--model", str(tmp_path / "model"), "--texts", str(text), "--windows", "4", "--window", "32"]
    options += ["--every", "2", "--output", str(tmp_path / "out"), "--write", str(page)]
    module.main(options)
    table = capsys.readouterr().out.strip()
    assert table in page.read_text()
    for line in table.splitlines()[2:]:
        control, *others = [float(cell.split()[0]) for cell in line.strip("| ").split("|")[1:]]
        assert all(loss <= control * 1.02 for loss in others)  # a greedy rest may differ by a little
    monkeypatch.setattr(module, "options_of", lambda *_: pytest.fail("kept options are computed again"))
    module.main(options)
    assert capsys.readouterr().out.strip() == table


def test_the_page_has_the_markers():
    page = (Path(__file__).parents[2] / "docs" / "bytes.md").read_text()
    assert all(page.count(marker) == 1 for marker in markers("ranks_or_bits.py"))
