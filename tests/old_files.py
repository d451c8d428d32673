"""Files of earlier versions."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

DATA = Path(__file__).parent / "data"
#: Written before files had checksums, and by the last commit before the package had rooms.
FORMATS = [DATA / "format1", DATA / "format2"]
OLD = FORMATS[0]


class Counting(pl.Callback):
    batches = 0

    def on_train_batch_start(self, *args):
        self.batches += 1
