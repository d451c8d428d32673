"""`fasc compress` on a tiny model, interrupted in its calibration."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import os
import signal

from tiny import save_model_folder

import fasc_command
from fasc_lightning import FascCallback


def interrupt(*arguments: object) -> None:
    """Press Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    save_model_folder(folder / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    FascCallback.on_train_batch_start = interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
    text = str(folder / "text.txt")
    fasc_command.main(
        [
            "compress", "--model", str(folder / "model"), "--calibration", text, "--eval-text", f"foxes={text}",
            "--windows", "4", "--window", "32", "--eval-windows", "2", "--output", str(folder / "out"),
            "--report", str(folder / "report.json"),
        ]
    )  # fmt: skip
