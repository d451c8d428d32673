"""README and the pages of docs/: every block of code runs at reduced size, and every name that they give exists."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import lightning as L
import pytest
from options_table import PAGE, with_table
from processes import run_script
from test_prose import PATTERN
from tiny import byte_tokenizer, causal_model, causal_module, save_model_folder, token_loader

from fasc_lightning import compress, quantize, to_dense

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text() for file in FILES}

#: Pages for users, in plain English. The pages of results are measurements of many days.
GUIDES = [
    "README.md",
    *(page for page in PAGES if re.match(r"docs/(guides/|get-|limits|options|recovery|serving|vers)", page)),
]

TESTS = [file.read_text() for file in (ROOT / "tests").rglob("test_*.py") if file != Path(__file__)]
#: Guides whose blocks build on each other: a test of their own, which names the file, runs them. Here they are parsed.
OWN_TESTS = {page for page in PAGES if "/guides/" in page and any(f'{Path(page).name}"' in test for test in TESTS)}

#: First line of a block that needs a GPU, the evaluation data, the network or hours; the reason follows.
NOT_TESTED = "# not tested: "

SMALL = "--model {model} --windows 6 --window 32 --eval-windows 2"
#: Appended to every recipe command: the last value of an option counts.
REDUCED = {
    "compress": f"{SMALL} --eval-facts {{facts}}",
    "compress_then_finetune": f"{SMALL} --eval-facts {{facts}} --tokens 600 --steps 2",
    "lightning_cli": "--model.name {model} --data.window 32 --data.tokens 600",
    "compare_methods": f"{SMALL} --eval-facts {{facts}} --keep 0.8",
    "compare_bytes": f"{SMALL} --eval-facts {{facts}} --sizes 0.6 --keep 0.8",
    "track_rho": "--people 12 --steps 4 --batch-size 8 --window 16 --monitor-every-n-steps 2",
    "study_rho": f"{SMALL} --heldout-windows 2",
}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    code: str

    @property
    def runs(self) -> bool:
        return self.page not in OWN_TESTS and not self.code.startswith(NOT_TESTED)


def blocks_of(page, text):
    found = re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [Block(page, text[: block.start()].count("\n") + 1, block[1], block[2]) for block in found]


BLOCKS = [block for page, text in PAGES.items() for block in blocks_of(page, text)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
BASH = [block for block in BLOCKS if block.language == "bash"]


def shell_lines(block):
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def lines_that_start(pattern):
    """Lines of blocks that run, each once, after any settings of the environment."""
    lines = (re.sub(r"^(\w+=\S+ )+", "", line) for block in BASH if block.runs for line in shell_lines(block))
    return list(dict.fromkeys(line for line in lines if re.match(pattern, line)))


def name(block):
    return f"{block.page}:{block.line}"


@pytest.fixture
def data(tmp_path):
    """Stand-ins for every file that a command reads, and for the model."""
    folder = tmp_path / "data"
    folder.mkdir()
    for file in set(re.findall(r"\$FASC_DATA/([\w.]+)", "".join(block.code for block in BASH))):
        if file.endswith(".jsonl"):
            fact = '{{"subject": "{}", "relation": "r", "template": "[X] is [Y] .", "object": "{}", "kind": "other"}}'
            (folder / file).write_text("\n".join(fact.format(s, o) for s, o in (("a", "b"), ("c", "d"))))
        else:
            (folder / file).write_text("All happy families are alike. " * 100)
    (tmp_path / "texts.txt").write_text("All happy families are alike. " * 100)  # a reader's own text
    save_model_folder(tmp_path / "model", positions=128)
    return tmp_path


@pytest.mark.parametrize("command", lines_that_start("python recipes/"))
def test_recipe_commands_run(command, data):
    for written, folder in {"$FASC_DATA": data / "data", "recipes/configs": ROOT / "recipes" / "configs"}.items():
        command = command.replace(written, str(folder))
    words = shlex.split(command)
    reduced = REDUCED[Path(words[1]).stem].format(model=data / "model", facts=data / "data" / "facts_p1.jsonl").split()
    words = [ROOT / words[1], *words[2:], *reduced]
    run_script(*words, folder=data)
    for option in ("--output", "--report"):
        if option in words:
            assert (data / words[words.index(option) + 1]).exists()


def test_there_are_blocks_of_both_languages():
    assert len(lines_that_start("python recipes/")) >= 4
    assert sum(block.runs for block in PYTHON) >= 20
    assert {block.language for block in BLOCKS} == {"python", "bash"}


#: Lines of the shell that a test of this file runs or looks up, or another one: tests/test_rooms.py pytest's lines in
#: CONTRIBUTING.md, tests/cli the command's.
KNOWN = r"python recipes/|make |pip install |export |\.venv/bin/python -m pytest |fasc( |$)"


@pytest.mark.parametrize("block", BASH, ids=name)
def test_shell_blocks_are_understood(block):
    parsed = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
    assert (parsed.returncode, parsed.stderr) == (0, "")
    if block.runs:
        unknown = set(shell_lines(block)) - set(lines_that_start(KNOWN))
        assert {line for line in unknown if not re.match(rf"(\w+=\S+ )+({KNOWN})", line)} == set(), (
            f"Begin {NOT_TESTED!r}"
        )


@pytest.mark.parametrize("script", sorted({s for b in BASH for s in re.findall(r"[\w/]+\.py\b", b.code) if "/" in s}))
def test_scripts_exist(script):
    assert (ROOT / script).is_file()


@pytest.mark.filterwarnings("ignore:.*tensorboardX")  # Lightning's word on the default logger
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # asked for by peft
@pytest.mark.filterwarnings("ignore:Recovery .* nothing lowered the held-out loss")  # too few steps to
@pytest.mark.parametrize("block", PYTHON, ids=name)
def test_examples_run(block, tmp_path, monkeypatch):
    if not block.runs:
        ast.parse(block.code)
        return
    monkeypatch.chdir(tmp_path)
    tokenizer, loader = byte_tokenizer(), token_loader(samples=16)
    size = {"vocab_size": len(tokenizer)}
    names = {"L": L, "module": causal_module(**size), "model": causal_model(**size), "loader": loader}
    names |= {"tokenizer": tokenizer, "batches": list(loader), "__name__": "example"}
    if "quantised" in block.code:
        quantised = causal_model(**size)
        quantize(quantised)
        names |= {"dense": causal_model(**size), "quantised": to_dense(quantised)}
    if 'load_compressed("compressed")' in block.code and "save_compressed" not in block.code:
        model = causal_model()
        compress(model, loader, keep=0.8, progress=False)
        model.save_pretrained("compressed")
    exec(compile(block.code, name(block), "exec"), names)


def test_make_targets_exist():
    named = {target for text in PAGES.values() for target in re.findall(r"^make (\w[\w-]*\w)", text, re.MULTILINE)}
    named |= {target for text in PAGES.values() for target in re.findall(r"`make (\w[\w-]*\w)`", text)}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    """Links within the repository; the build of the site checks anchors."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    made = {"contributing.md", "changelog.md", "index.md"}
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert [link for link in links if link and not (ROOT / page).parent.joinpath(link).is_file()] == []
    assert not made & set(links) or page.startswith("docs/api/")


@pytest.mark.parametrize("page", GUIDES)
def test_guides_have_no_phrase_of_the_list(page):
    text = " ".join(re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL).split())
    assert [text[max(0, found.start() - 40) : found.end()] for found in PATTERN.finditer(text)] == []


def test_the_options_table_is_that_of_the_declarations():
    page = PAGE.read_text()
    assert with_table(page) == page, "HINT: python tests/options_table.py"


def test_the_extras_table_has_every_extra_for_users():
    rows = set(re.findall(r"^\| `(\w+)` \|", README.split("## Install")[1].split("\n## ")[0], re.MULTILINE))
    assert rows == set(PROJECT["optional-dependencies"]) - {"dev", "docs"}
    installed = re.findall(r"fasc-lightning\[([\w,]+)\]", "".join(PAGES.values()))
    assert {extra for extras in installed for extra in extras.split(",")} <= set(PROJECT["optional-dependencies"])


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 160


def test_the_front_page_has_the_pictures_of_its_script():
    spec = importlib.util.spec_from_file_location("draw_front", ROOT / "docs" / "draw_front.py")
    sys.modules["draw_front"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for file, picture in module.badges().items():
        assert (module.FIGURES / file).read_text() == picture, "HINT: python docs/draw_front.py"
        assert f"docs/figures/{file}" in README
    models = module.rows(PAGES["docs/bytes.md"])
    assert {row.model.rpartition("-")[0] for row in models if row.kind == "another program"} == set(module.PROGRAMS)
    (axes,) = module.draw(models).axes
    assert {row.bytes for row in models} <= {x for line in axes.lines for x in line.get_xdata()}
