"""The README's commands and examples, run at reduced size."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import lightning as L
import pytest
from options_table import with_table
from processes import run_script
from tiny import byte_tokenizer, causal_model, causal_module, save_model_folder, token_loader

from fasc_lightning import compress

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [(ROOT / "docs" / name).read_text() for name in ("serving.md", "recovery.md", "scale.md")]
SMALL = "--model {model} --windows 6 --window 32 --eval-windows 2"
#: Appended to every recipe command: the last value of an option counts.
REDUCED = {
    "compress": f"{SMALL} --eval-facts {{facts}}",
    "compress_then_finetune": f"{SMALL} --eval-facts {{facts}} --tokens 600 --steps 2",
    "lightning_cli": "--model.name {model} --data.window 32 --data.tokens 600",
    "compare_methods": f"{SMALL} --eval-facts {{facts}}",
    "track_rho": "--people 12 --steps 4 --batch-size 8 --window 16 --monitor-every-n-steps 2",
    "study_rho": f"{SMALL} --heldout-windows 2",
}


def blocks(language, page=README):
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def recipe_commands():
    pages = README + "".join((ROOT / "docs" / name).read_text() for name in ("rho.md", "results.md", "recovery.md"))
    lines = "\n".join(blocks("bash", pages)).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line for line in lines if "python recipes/" in line))


@pytest.fixture
def data(tmp_path):
    """Stand-ins for every file that a command reads, and for the model."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in set(re.findall(r"\$FASC_DATA/([\w.]+)", README)):
        if name.endswith(".jsonl"):
            fact = '{{"subject": "{}", "relation": "r", "template": "[X] is [Y] .", "object": "{}", "kind": "other"}}'
            (folder / name).write_text("\n".join(fact.format(s, o) for s, o in (("a", "b"), ("c", "d"))))
        else:
            (folder / name).write_text("All happy families are alike. " * 100)
    (tmp_path / "texts.txt").write_text("All happy families are alike. " * 100)  # a reader's own text
    save_model_folder(tmp_path / "model", positions=128)
    return tmp_path


@pytest.mark.parametrize("command", recipe_commands())
def test_recipe_commands_run(command, data):
    command = re.sub(r"^.*?python recipes/", "python recipes/", command).split("#")[0]
    for name, folder in {"$FASC_DATA": data / "data", "recipes/configs": ROOT / "recipes" / "configs"}.items():
        command = command.replace(name, str(folder))
    words = shlex.split(command)
    reduced = REDUCED[Path(words[1]).stem].format(model=data / "model", facts=data / "data" / "facts_p1.jsonl").split()
    words = [ROOT / words[1], *words[2:], *reduced]
    run_script(*words, folder=data)
    for option in ("--output", "--report"):
        if option in words:
            assert (data / words[words.index(option) + 1]).exists()


def test_there_are_recipe_commands():
    assert len(recipe_commands()) >= 4


@pytest.mark.parametrize("page", ["README.md", "docs/rho.md", "docs/results.md", "docs/speed.md"])
def test_figures_and_pages_exist(page):
    links = re.findall(r"\]\(([\w./-]+)\)", (ROOT / page).read_text())
    assert links
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).is_file()] == []


@pytest.mark.filterwarnings("ignore:.*tensorboardX")  # Lightning's word on the default logger
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # asked for by peft
@pytest.mark.filterwarnings("ignore:FascCallback. recovery .* nothing lowered the held-out loss")  # too few steps to
@pytest.mark.parametrize("code", [code for page in (README, *PAGES) for code in blocks("python", page)])
def test_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer, loader = byte_tokenizer(), token_loader(samples=16)
    size = {"vocab_size": len(tokenizer)}
    names = {"L": L, "module": causal_module(**size), "model": causal_model(**size), "loader": loader}
    names |= {"tokenizer": tokenizer, "batches": list(loader)}
    if 'load_compressed("compressed")' in code and "save_compressed" not in code:
        model = causal_model()
        compress(model, loader, keep=0.8, progress=False)
        model.save_pretrained("compressed")
    exec(compile(code, "README.md", "exec"), names)


@pytest.mark.parametrize("target", re.findall(r"^make (\w[\w-]*)|`make (\w[\w-]*)`", README, re.MULTILINE))
def test_make_targets_exist(target):
    (target,) = filter(None, target)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_options_table_is_that_of_the_declarations():
    assert with_table(README) == README, "HINT: python tests/options_table.py"
