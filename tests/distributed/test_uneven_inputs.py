from __future__ import annotations

import json

import pytest
import torch
from processes import free_port, run_script
from sharded_fit import make_module, make_trainer
from uneven_fit import SHARES, Keeping, loader


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """What two processes with unequal numbers of batches end with."""
    folder = tmp_path_factory.mktemp("uneven")
    run_script("uneven_fit.py", folder, processes=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process():
    """The moments of all samples."""
    callback = Keeping(rank=0.5, allocation="fisher", refit=False, update_weights=False)
    make_trainer("auto", callback).fit(make_module(), loader((0, 16), endless=False))
    return callback.kept


@pytest.mark.sampled(2)
@pytest.mark.parametrize("endless", [False, True])
@pytest.mark.parametrize("share", SHARES)
def test_processes_with_unequal_numbers_of_batches_end_with_the_moments_of_all(uneven, one_process, share, endless):
    first, second = (found["found"][share, endless] for found in uneven)
    assert first["error"] == second["error"] == "nothing"
    for name in one_process.shapes:
        expected = one_process.layer(name)
        for field in ("A", "G", "mean_x", "mean_h", "tokens"):
            torch.testing.assert_close(first["moments"][name][field], getattr(expected, field))
    assert list(first["state"]) == list(second["state"])
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())


def test_each_pass_waits_for_the_process_with_more_batches(uneven):
    first, second = (found["passes"] for found in uneven)
    assert first["error"] == second["error"] == "nothing"
    # Of the same factors as one pass, but for the order of sums.
    one = uneven[0]["found"]["fewer on the first", False]
    torch.testing.assert_close(first["state"], one["state"])
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("trained", "MisconfigurationException: .* there are 2, 6, .* averages the gradients .* HINT: limit_train"),
        ("trained, endless", "RuntimeError: .* 1 of 2 processes have had their last one, .* averages the gradients"),
        ("sharded", "MisconfigurationException: .* there are 2, 6, .* weights are gathered from all"),
        ("sharded, endless", "RuntimeError: .* 1 of 2 processes have had their last one, .* weights are gathered"),
        ("two epochs", "MisconfigurationException: .* batches before the calibration are trained on"),
        ("checkpoints", "MisconfigurationException: .* all save checkpoints together before the epoch is over"),
    ],
)
def test_a_fit_whose_batches_need_all_processes_ends_on_all_of_them_where_one_has_no_more(uneven, case, said):
    for found in uneven:
        ended = found["refused"][case]
        assert not ended["compressed"]
        with pytest.raises(RuntimeError, match=said):
            raise RuntimeError(ended["error"])


@pytest.fixture(scope="module")
def lonely(tmp_path_factory):
    """How fits end of which a process dies or fails."""
    folder = tmp_path_factory.mktemp("lonely")
    run_script("lonely_fit.py", folder, free_port())
    return folder, json.loads((folder / "ends.json").read_text())


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("case", "code", "said"),
    [
        ("frozen, killed in a batch", 9, "Expected an answer of every process but one has ended"),
        ("trained, killed in a batch", 9, "peer"),
        ("sharded, killed in a batch", 9, "peer"),
        ("frozen, killed before factors are shared", 9, ""),
        ("frozen, fails and saves", 1, "Expected an answer of every process but one has ended"),
        ("trained, fails and saves", 1, "peer"),
        ("frozen, hangs", "still there", "Expected an answer of every process but one has ended"),
    ],
)
def test_a_process_that_is_left_alone_ends_with_an_error_and_a_dense_module(lonely, case, code, said):
    folder, ends = lonely
    assert ends[case]["codes"] == [1, code]
    assert ends[case]["seconds"] < 30
    left = json.loads((folder / f"{case}.0.json").read_text())
    assert left["error"].startswith("RuntimeError")
    assert said in left["error"]
    assert not left["compressed"]
    assert not left["report"]
    assert (folder / case / "0" / "failed.ckpt").exists() is ("saves" in case)


def test_a_fit_of_one_process_asks_nobody(make_trainer):
    callback = Keeping(rank=0.5, allocation="fisher", refit=False)
    make_trainer(callback).fit(make_module(), loader((0, 4), endless=True))
    assert callback.report is not None
