from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Matrices of tests are too small to share out: threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too

import lightning.pytorch as pl
import pytest
import torch
from rotation import PARTS, left_out, part_of_suite

from fasc_lightning.options._allocations import _ALLOCATIONS
from fasc_lightning.solvers._registry import _SOLVERS

torch.set_num_threads(1)


def whole_suite(config):
    """Whether the command line names no tests, by path, word or marker: named ones all run."""
    named = config.option.keyword or config.option.markexpr
    return config.args_source == pytest.Config.ArgsSource.TESTPATHS and not named


def pytest_report_header(config):
    part = part_of_suite()
    if whole_suite(config) and part is not None:
        return f"part {part} of parts 0 to {PARTS - 1} of tests/rotated.txt; make test-all runs all"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what the suite samples elsewhere, unless ``-m exhaustive`` asks for it; begin with what is slow."""
    variants = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            variants.setdefault((item.path, item.originalname), []).append(item)
    for family in variants.values():
        (count,) = family[0].get_closest_marker("sampled").args
        kept = {i * len(family) // count for i in range(count)}
        for i, item in enumerate(family):
            if i not in kept:
                item.add_marker(pytest.mark.exhaustive)
    if "exhaustive" not in config.option.markexpr:
        left = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    if whole_suite(config):
        others = left_out([item.nodeid for item in items], part_of_suite())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in others])
        items[:] = [item for item in items if item.nodeid not in others]
    # So that no worker is left with a slow test when the others have nothing more to do.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """Solvers and allocations that a test registers are gone after it."""
    for registry in (_SOLVERS, _ALLOCATIONS):
        monkeypatch.setattr(registry, "_known", dict(registry._known))


@pytest.fixture
def make_trainer(tmp_path):
    """A Trainer that writes nowhere but into the test's folder and says nothing."""

    def make(*callbacks, **options):
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})

    return make
