from __future__ import annotations

from pathlib import Path

import equal_bytes
import pytest
from equal_bytes import command, main, page_part
from p1 import FACTS
from pages import markers

RESULTS = "# Models\n\n* model: x\n\n## By bytes\n\n| a |\n|---|\n| 1 |\n\n![bytes](bytes.png)\n\n## Others\n\ntext\n"
PART = "### By bytes\n\n| a |\n|---|\n| 1 |\n\n![bytes](figures/bytes.png)\n\n### Others\n\ntext"


def test_a_page_gets_the_sections_without_the_head_and_the_figure(tmp_path, monkeypatch):
    page, out, data = tmp_path / "docs" / "bytes.md", tmp_path / "out", tmp_path / "data"
    for folder in (page.parent, out, data):
        folder.mkdir()
    first, last = markers("equal_bytes.py")
    page.write_text(f"before\n{first}\nold\n{last}\nafter\n")
    (data / FACTS).write_text("")
    ran = []

    def recipe(words, check):
        ran.append(words)
        (out / "results.md").write_text(RESULTS)
        (out / "bytes.png").write_bytes(b"figure")

    monkeypatch.setenv("FASC_DATA", str(data))
    monkeypatch.setattr(equal_bytes.subprocess, "run", recipe)
    main(["--output", str(out), "--write", str(page), "--peers", "one", "two", "--speed"])
    assert ran == [command(data, out, ["--peers", "one", "two", "--speed"])]
    assert page.read_text() == f"before\n{first}\n\n{PART}\n\n{last}\nafter\n"
    assert (page.parent / "figures" / "bytes.png").read_bytes() == b"figure"
    assert page_part("# Models\n") == ""


def test_the_page_has_the_markers():
    page = (Path(__file__).parents[2] / "docs" / "bytes.md").read_text()
    assert all(page.count(marker) == 1 for marker in markers("equal_bytes.py"))


def test_without_the_texts_nothing_runs(monkeypatch):
    monkeypatch.delenv("FASC_DATA", raising=False)
    with pytest.raises(SystemExit, match="FASC_DATA"):
        main([])
