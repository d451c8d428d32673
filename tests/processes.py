"""Scripts of several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def run_script(script: str, *arguments: object) -> None:
    paths = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(FOLDER / script), *map(str, arguments)],
        check=True,
        env=environment,
        timeout=300,
        capture_output=True,
    )
