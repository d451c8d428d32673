"""The entry of a program: one line for bad input, exit codes, Ctrl-C."""

from __future__ import annotations

import sys

import pytest
from jsonargparse import ArgumentParser
from processes import run_script

from fasc_lightning.cli import CommandParser, run_program


@pytest.fixture(autouse=True)
def _named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/program.py", "--steps", "1"])


def failing(error):
    def main(arguments):
        raise error

    return main


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Expected --steps to be at least 1\nbut got 0"),
        FileNotFoundError("Expected --steps to be at least 1 but got 0."),
        ModuleNotFoundError("Expected --steps to be at least 1 but got 0."),
        MemoryError("Expected --steps to be at least 1 but got 0"),
        TypeError("Expected --steps to be at least 1 but got 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(error, capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(failing(error), [])
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "program.py: Expected --steps to be at least 1 but got 0.\n")


@pytest.mark.parametrize("error", [KeyError("rows"), TypeError("unsupported operand"), RuntimeError("shapes")])
def test_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_program(failing(error), [])


def test_an_unknown_option_names_the_nearest(capsys):
    parser = CommandParser("A program.")
    parser.add_argument("--quantize")
    for given, near in (("--quantise", " Did you mean '--quantize'?"), ("--zzz", "")):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([given, "int4"])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.endswith(f"{given} int4.{near} Options: program.py --help\n")


def test_debug_shows_the_traceback_and_is_no_option_of_the_program():
    seen = []
    run_program(seen.extend, ["--a", "--debug", "1"])
    assert seen == ["--a", "1"]
    with pytest.raises(ValueError, match="bad"):
        run_program(failing(ValueError("bad")), ["--debug"])


def test_arguments_are_those_of_the_process():
    seen = []
    sys.argv.append("--debug")
    run_program(seen.extend)
    assert seen == sys.argv[1:] == ["--steps", "1"]


def from_trainer(arguments):
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


@pytest.mark.parametrize("main", [failing(KeyboardInterrupt()), from_trainer])
def test_an_interrupt_is_one_line_and_exit_code_130(main, capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(main, [])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\nprogram.py: interrupted. No file is half-written.\n"


def test_a_programs_own_exit_code_stays():
    with pytest.raises(SystemExit) as ended:
        run_program(lambda arguments: sys.exit(5), [])
    assert ended.value.code == 5


@pytest.mark.parametrize("arguments", [["--steps", "many"], ["--stepz", "1"], ["more"], ["--config", "none.yaml"]])
def test_wrong_options_are_one_line(arguments, capsys):
    parser = CommandParser("Count steps.\n\nMore.")
    parser.add_argument("--steps", type=int, help="how many")
    parser.add_argument("--config", action="config")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    assert ended.value.code == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.count("\n") == 1
    assert error.startswith("program.py: ")
    assert error.endswith(" Options: program.py --help\n")


def test_help_describes_the_program(capsys):
    parser = CommandParser("Count steps.\n\nMore.")
    assert isinstance(parser, ArgumentParser)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "Count steps.\n" in printed
    assert "More." not in printed
    assert "--debug shows the traceback" in printed


def test_ctrl_c_in_a_fit_leaves_no_files(tmp_path):
    said = run_script("cli/interrupted_command.py", tmp_path, code=130)
    assert said.splitlines()[-1] == "fasc compress: interrupted. No file is half-written."
    assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]
