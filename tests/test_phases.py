"""Who acts in the hooks of FascCallback: its parts or a recovery, reached without detours."""

from __future__ import annotations

import sys

import pytest
from tiny import causal_module, token_loader

from fasc_lightning import FascCallback, callback
from fasc_lightning.calibration import CalibrationPhase
from fasc_lightning.dependence import MonitorPhase
from fasc_lightning.recovery import RecoveryCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*saw fewer tokens than they have features"),
    pytest.mark.filterwarnings("ignore:.*nothing lowered the held-out loss"),
]


class Climbs:
    """Notes each return into the callback's module from a function of another one."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __call__(self, frame, event, arg):
        if event != "return" or frame.f_back is None:
            return
        here, there = (f.f_code.co_filename == callback.__file__ for f in (frame, frame.f_back))
        if there and not here:
            self.found.append(frame.f_code.co_qualname)


def test_the_start_of_a_fit_comes_back_to_the_callback_at_most_ten_times(make_trainer):
    climbs = Climbs()

    class Watched(FascCallback):
        def on_fit_start(self, *args):
            sys.setprofile(climbs)
            try:
                super().on_fit_start(*args)
            finally:
                sys.setprofile(None)

    watched = Watched(rank=0.5, update_weights=False, refit=False, allocation="fisher", monitor_every_n_steps=1)
    make_trainer(watched).fit(causal_module(), token_loader())
    assert "CalibrationPhase.on_fit_start" in climbs.found
    assert len(climbs.found) <= 10


def test_a_recovery_acts_in_place_of_the_parts(make_trainer):
    acting = []

    class Noting(FascCallback):
        def on_train_start(self, *args):
            acting.append([type(phase) for phase in self._phases])
            super().on_train_start(*args)

    noting = Noting(rank=0.5, update_weights=False, refit=False, allocation="fisher", recovery="lora")
    module = causal_module()
    for _ in range(2):
        make_trainer(noting).fit(module, token_loader())
    assert acting == [[MonitorPhase, CalibrationPhase], [RecoveryCallback]]
