"""Whatever is raised at whatever line of a fit, nothing of it is left behind."""

from __future__ import annotations

import shutil

import fault_cases
import lightning.pytorch as pl
import pytest
from faults import Lines, attempt, plan, record, watched
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from watching import assert_untouched, state

from fasc_lightning import FascCallback

MAKES = {**fault_cases.SCENARIOS, **fault_cases.FAILED}

#: Scenarios of the sample. The others take longer, or differ from these in lines that only compute.
SAMPLED = sorted(MAKES.keys() - {"monitoring", "gate", "passes", "sketches", "projected", "resumed", "recover"})

#: Trials of a sampled scenario; of every line, of all.
TRIALS, EACH = 2, 2


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ordinary")
    with watched(folder):
        return fault_cases.ordinary(folder)


def recorded(name, folder, warm):
    executed, done = record(MAKES[name], folder, warm)
    stops = [record(fault_cases.STOPS[name], folder, warm=False)[1]] if name in fault_cases.STOPS else []
    return executed, [done, *stops]


def tried(case, done, ordinary, folder):
    """Run a case in a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return attempt(MAKES[case.scenario], folder, done, ordinary, case.at, case.occurrence, case.kind)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", SAMPLED)
def test_an_exception_anywhere_leaves_nothing_behind(name, tmp_path, ordinary):
    executed, done = recorded(name, tmp_path / "recorded", warm=False)
    reached = 0
    for case in plan({name: executed}, 1):
        trial = tried(case, done, ordinary, tmp_path / "trial")
        assert not trial.leaks, f"{case}: {trial.leaks}"
        reached += trial.reached
        if reached == TRIALS:
            return
    raise AssertionError("no line was reached")


@pytest.mark.exhaustive
@pytest.mark.timeout(0)
def test_an_exception_at_every_line_leaves_nothing_behind(tmp_path, ordinary):
    """Every line that any scenario executes, in some of them: some 10,000 trials, an hour of one core.

    OMP_NUM_THREADS=1 python -m pytest -m exhaustive tests/test_faults.py
    """
    found = {name: recorded(name, tmp_path / name, warm=True) for name in MAKES}
    leaks, reached = [], 0
    for case in plan({name: executed for name, (executed, _) in found.items()}, EACH):
        trial = tried(case, found[case.scenario][1], ordinary, tmp_path / "trial")
        reached += trial.reached
        if trial.leaks:
            leaks.append(f"{case}: {trial.leaks}")
    assert reached > 1000
    assert not leaks, "\n".join([f"{len(leaks)} of {reached} trials left something behind", *leaks])


def test_what_a_failed_clean_up_leaves_goes_with_the_next_fit(make_trainer, monkeypatch):
    module, callback = fault_cases.module_of(), FascCallback(rank=0.5, update_weights=False)
    before, flags = state(module), {name: p.requires_grad for name, p in module.named_parameters()}

    class Stop(pl.Callback):
        def on_train_batch_end(self, *args):
            raise InterruptedError

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(callback, "on_exception", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callback, Stop()).fit(module, fault_cases.loader())
    monkeypatch.undo()
    assert not module.training
    with pytest.raises(MisconfigurationException, match="max_epochs=0"):
        make_trainer(callback, max_epochs=0).fit(module, fault_cases.loader())
    assert_untouched(module, before, flags)
    assert module.training
    make_trainer(callback).fit(module, fault_cases.loader())
    assert callback.report is not None


def wrapped(make, around):
    """The same world, whose run is given to a function."""

    def other(folder):
        world = make(folder)
        run = world.run
        world.run = lambda: around(world, run)
        return world

    return other


def test_what_is_left_behind_is_seen(tmp_path, ordinary):
    make = fault_cases.SCENARIOS["quantize"]
    executed, done = record(make, tmp_path)
    line = next(line for line in executed if line[0].endswith("quantize.py"))

    def leave(world, run):
        world.module.lm_head.register_forward_hook(lambda *unused: None)
        next(world.module.parameters()).requires_grad_(False)
        run()

    def swallow(world, run):
        with pytest.raises(RuntimeError):
            run()

    trials = [
        attempt(one, tmp_path, [done], ordinary, line, 0, RuntimeError)
        for one in (make, wrapped(make, leave), wrapped(make, swallow))
    ]
    assert [trial.outcome for trial in trials] == ["old", "broken", "old"]
    assert trials[0].leaks == []
    assert {"module: _forward_hooks", "module: weight flags"} <= set(trials[1].leaks)
    assert trials[2].leaks == ["swallowed"]


def test_lines_are_counted_only_while_they_are_watched():
    with Lines() as lines:
        pass
    fault_cases.small_model()
    assert not lines.counts
