"""Models at equal bytes: recipes/compare_bytes.py on the texts of P1, beside models of other programs.

    FASC_DATA=<folder with the texts> python benchmarks/equal_bytes.py --output benchmarks/results/bytes \
        --peers FOLDER ... --write docs/bytes.md

The scripts in benchmarks/peers make the folders. Further options go to the recipe, as ``--speed``. Rows that exist are
not measured again (delete the folder after a change of the code). ``--write`` replaces the page's generated part and
its figure.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from p1 import FACTS, text_options
from pages import write_part

RECIPE = Path(__file__).parents[1] / "recipes" / "compare_bytes.py"

#: Sizes, and uniform bits as controls.
SIZES = ("0.29", "0.27", "0.24", "0.21", "0.21+refit", "0.15")
CONTROLS = ("int8", "int4", "int3", "int2")
#: Low rank, not refitted: docs/results.md has the refitted rows.
KEEPS = ("0.8", "0.8+int8")
FIGURE = "bytes.png"


def command(data: Path, output: Path, more: Sequence[str]) -> list[str]:
    """Return the recipe's command line."""
    options = ["--sizes", *SIZES, *CONTROLS, "--keep", *KEEPS, "--refit", "--output", str(output)]
    options += ["--windows", "64", "--eval-windows", "32", "--kl-windows", "4"]
    options += [*text_options(data), "--eval-facts", str(data / FACTS)]
    return [sys.executable, str(RECIPE), *options, *more]


def page_part(results: str) -> str:
    """Return the sections of the recipe's results.md as they stand in a page of docs."""
    _, found, rest = results.partition("\n## ")
    sections = re.sub(r"^## ", "### ", f"## {rest}", flags=re.MULTILINE) if found else ""
    return sections.replace(f"]({FIGURE})", f"](figures/{FIGURE})").strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe, and write the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/bytes"))
    parser.add_argument("--write", type=Path, help="page whose generated part is replaced")
    options, more = parser.parse_known_args(arguments)
    folder = os.environ.get("FASC_DATA")
    if folder is None or not (Path(folder) / FACTS).exists():
        sys.exit(f"Expected FASC_DATA to name the folder that holds {FACTS} and the texts, but it is {folder!r}.")
    subprocess.run(command(Path(folder), options.output, more), check=True)
    if options.write is not None:
        figures = options.write.parent / "figures"
        figures.mkdir(exist_ok=True)
        shutil.copyfile(options.output / FIGURE, figures / FIGURE)
        text = (options.output / "results.md").read_text(encoding="utf-8")
        write_part(options.write, "equal_bytes.py", page_part(text))


if __name__ == "__main__":
    main()
