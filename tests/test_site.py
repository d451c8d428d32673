"""The site of `make docs`."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import fasc_lightning
from fasc_lightning import evaluation, solvers

ROOT = Path(__file__).parents[1]

#: What the reference describes: modules, each with all names of its `__all__`.
DOCUMENTED = {
    "fasc_lightning": fasc_lightning,
    "fasc_lightning.evaluation": evaluation,
    "fasc_lightning.solvers": solvers,
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built without a warning: no broken link, no missing anchor, no docstring with an unknown argument."""
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    warned = logging.Handler(logging.WARNING)
    messages = []
    warned.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(warned)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    logging.getLogger("mkdocs").removeHandler(warned)
    assert messages == []
    return folder


@pytest.mark.parametrize("room", DOCUMENTED)
def test_the_reference_has_every_public_name(room):
    pages = "".join(file.read_text() for file in (ROOT / "docs" / "api").glob("*.md"))
    described = re.findall(rf"^::: {re.escape(room)}\.(?:(?!solvers|evaluation)\w+\.)?(\w+)$", pages, re.MULTILINE)
    rooms = {name.rpartition(".")[2] for name in DOCUMENTED}
    assert sorted(set(described) - rooms) == sorted(DOCUMENTED[room].__all__)
    assert len(set(described)) == len(described)


def test_every_name_of_the_reference_is_rendered(site):
    pages = "".join(file.read_text() for file in (site / "api").glob("*.html"))
    for room, module in DOCUMENTED.items():
        # The path of a function in a module of its own name, such as `compress`, has the name twice.
        ids = {name: (f'id="{room}.{name}"', f'id="{room}.{name}.{name}"') for name in module.__all__}
        assert [name for name, either in ids.items() if not any(found in pages for found in either)] == []
    options = (site / "api" / "options.html").read_text()
    assert "Budget in bytes" in " ".join(options.split())  # a description of an argument


def test_every_page_is_in_the_navigation(site):
    menu = (site / "index.html").read_text()
    pages = [file.relative_to(site).as_posix() for file in site.rglob("*.html") if file.name != "404.html"]
    assert len(pages) > 25
    assert [page for page in pages if page != "index.html" and f'href="{page}"' not in menu] == []


def test_the_site_needs_nothing_from_elsewhere(site):
    loads = re.compile(r"<(?:script|img|iframe)[^>]+src=\"(?:https?:)?//|<link[^>]+href=\"https?://[^>]*stylesheet")
    assert [file.name for file in site.rglob("*.html") if loads.search(file.read_text())] == []


def test_pages_have_their_figures(site):
    for file in site.rglob("*.html"):
        sources = re.findall(r'<img[^>]+src="([^"]+)"', file.read_text())
        assert [source for source in sources if not (file.parent / source).is_file()] == []


def test_the_site_is_no_part_of_the_repository():
    assert "/site/" in (ROOT / ".gitignore").read_text().splitlines()
