"""The memory of a process, and benchmarks in a process of their own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch


def resident() -> int:
    """Return the largest resident memory of this process so far, in bytes.

    On Linux a new process inherits the value of ``getrusage`` from its parent; the status file has its own value.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def anonymous() -> int:
    """Return the resident memory of this process now, without pages of mapped files, in bytes; 0 where not known.

    The system drops pages of mapped files when it needs memory, so they count for nothing.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
    return 1024 * int(lines["RssAnon"].split()[0])


@contextmanager
def watched(every: float = 0.01) -> Iterator[Callable[[], int]]:
    """Watch :func:`anonymous` from a thread of its own; yields a function that returns the largest value so far.

    Args:
        every: Seconds between two looks. What lasts less may be missed.
    """
    most, ended = [anonymous()], Event()

    def watch() -> None:
        while not ended.wait(every):
            most[0] = max(most[0], anonymous())

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        ended.set()
        thread.join()


def restart_peak() -> None:
    """Let :func:`resident` count from now on, on Linux; elsewhere it goes on counting from the start."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def warm_up() -> None:
    """Compress a tiny model, so that libraries, threads and pools exist before a measurement."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fasc_lightning import compress

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    batches = [{"input_ids": torch.randint(64, (1, 256))}] * 2
    compress(LlamaForCausalLM(config), batches, keep=0.8, progress=False)


def run_alone(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a script in a process of its own and return its last line of output, which is JSON."""
    done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
