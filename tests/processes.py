"""Scripts in processes of their own, forked from one server that has imported the libraries.

An interpreter that imports them takes seconds; a fork takes milliseconds. Each worker of pytest-xdist has a server.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent

#: What scripts import. The server imports them once, and runs nothing, so that it has no threads when it forks.
IMPORTED = [
    "torch", "torchmetrics", "lightning.pytorch", "torch.distributed.fsdp", "torch.distributed.tensor",
    "torch.distributed.checkpoint", "torchdata.stateful_dataloader", "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral", "lightning.pytorch.cli", "matplotlib.pyplot", "fasc_lightning",
]  # fmt: skip
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(IMPORTED)

#: Below the ports that Linux gives to clients.
PORTS = range(20_000, 32_000)


class Ended(NamedTuple):
    """The first process's exit code, and what all processes wrote."""

    code: int
    said: str


def run_script(
    script: Path | str, *arguments: object, processes: int = 1, code: int = 0, folder: Path | None = None
) -> str:
    """Run a script as the processes of one group, in a working folder if one is given; return what they wrote.

    Raises:
        AssertionError: If the first process ends with another code than `code`.
    """
    ended = run(FOLDER / script, *arguments, processes=processes, folder=folder)
    assert ended.code == code, ended.said[-5000:]
    return ended.said


def run(script: Path, *arguments: object, processes: int = 1, folder: Path | None = None, limit: float = 300) -> Ended:
    """Run a script. When one of its processes has failed, end the others, as Lightning's launcher does."""
    place = {"NODE_RANK": 0, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with tempfile.TemporaryDirectory() as home:
        group = []
        for rank in range(processes):
            environment = {"LOCAL_RANK": rank, **place} if processes > 1 else {}
            environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
            log = Path(home) / str(rank)
            started = SERVER.Process(target=_run, args=(script, arguments, environment, folder or Path.cwd(), log))
            started.start()
            group.append(started)
        try:
            _wait(group, limit)
        finally:
            for process in group:
                process.kill()
                process.join()
        said = "".join(log.read_text(errors="replace") for log in sorted(Path(home).iterdir()))
    return Ended(group[0].exitcode, said)


def _wait(group: list, limit: float) -> None:
    """Wait until all have ended; once one has failed, the first has half a minute more, and the others a second."""
    end = time.monotonic() + limit
    granted = limit
    while (running := [process for process in group if process.exitcode is None]) and time.monotonic() < end:
        if any(process.exitcode for process in group):
            grace = 1 if group[0].exitcode else 30
            if grace < granted:
                granted, end = grace, time.monotonic() + grace
        connection.wait([process.sentinel for process in running], max(0, end - time.monotonic()))


def _run(script: Path, arguments: tuple, environment: dict[str, str], folder: Path, log: Path) -> None:
    """Run a script as an interpreter would: it is `__main__`, and its folder comes first in `sys.path`."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *map(str, arguments)]
    runpy.run_path(str(script), run_name="__main__")


def free_port() -> int:
    """Return a port that nobody listens on, and that another worker is not likely to choose at the same time."""
    for port in PORTS[(os.getpid() * 97 + time.monotonic_ns() // 1000) % len(PORTS) :]:
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    return free_port()
