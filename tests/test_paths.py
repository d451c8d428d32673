"""Documented names stay importable."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import fasc_lightning

#: Names by the path under which documents or earlier versions give them.
PATHS = {
    "fasc_lightning": fasc_lightning.__all__,
    "fasc_lightning.recovery": ["Distillable"],
    "fasc_lightning.compression": ["StorageOptions", "available_allocations", "register_allocation", "spend"],
    "fasc_lightning.data": ["load_model"],
    "fasc_lightning.evaluation": [
        "factual_recall",
        "perplexity",
        "minimal_pairs",
        "multiple_choice",
        "paired_interval",
    ],
    "fasc_lightning.evaluation.harness": ["HarnessResult", "harness_model", "run_harness"],
    "fasc_lightning.solvers": [
        "Factorization",
        "available_methods",
        "fasc",
        "get_solver",
        "register_solver",
        "shrink",
        "svd_llm",
        "two_sided",
    ],
}

#: Old paths of names that have moved.
MOVED = {"fasc_lightning.distillation": "Distillable", "fasc_lightning.bundled": "load_model"}


@pytest.mark.parametrize("path", PATHS)
def test_documented_names_are_there(path):
    module = importlib.import_module(path)
    assert [name for name in PATHS[path] if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", MOVED)
def test_moved_names_are_found_with_a_word_on_where_they_are(path):
    sys.modules.pop(path, None)
    with pytest.warns(DeprecationWarning, match="where it is now"):
        module = importlib.import_module(path)
    assert hasattr(module, MOVED[path])


def test_importing_the_package_loads_nothing_slow():
    program = (
        "import sys, lightning.pytorch, torchmetrics, transformers; before = set(sys.modules); import fasc_lightning; "
        "print(*{m.split('.')[0] for m in set(sys.modules) - before}); "
        "assert 'fasc_lightning.trainer_callback' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert "fasc_lightning" in done.stdout
    slow = {"matplotlib", "scipy", "pandas", "datasets", "peft", "lm_eval", "jsonargparse", "gguf", "pyarrow"}
    assert slow & set(done.stdout.split()) == set()
