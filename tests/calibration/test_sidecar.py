from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from fasc_lightning.calibration import _sidecar as sidecar
from fasc_lightning.calibration._sidecar import SUFFIX, SidecarCheckpointIO, open_sidecar, sidecars


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch):
    monkeypatch.setattr(sidecar, "SIDECAR_BYTES", 40)


def checkpoint(size=100):
    return {"weights": torch.ones(3), "state": {"tensors": {"a": torch.arange(size)}}}


def plugin(inner=None):
    return SidecarCheckpointIO(inner or TorchCheckpointIO(), lambda content: content.get("state"))


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(SUFFIX))


def test_large_statistics_lie_beside_the_checkpoint_and_small_ones_in_it(tmp_path):
    io = plugin()
    io.save_checkpoint(checkpoint(), tmp_path / "large.ckpt")
    io.save_checkpoint(checkpoint(2), tmp_path / "small.ckpt")
    io.save_checkpoint({"weights": torch.ones(3)}, tmp_path / "none.ckpt")
    large, small = (io.load_checkpoint(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("large", "small"))
    assert small["state"]["tensors"]["a"].tolist() == [0, 1]
    assert large["state"]["tensors"] == {}
    (name,) = names(tmp_path)
    assert name.startswith("large.ckpt.")
    with open_sidecar(large["state"]["token"], tmp_path / "large.ckpt") as handle:
        assert torch.equal(handle.get_tensor("a"), torch.arange(100))


def test_sidecars_are_found_by_their_token_and_not_by_their_name(tmp_path):
    io = plugin()
    for name in ("a", "b"):
        io.save_checkpoint(checkpoint(), tmp_path / f"{name}.ckpt")
    tokens = {name: torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state"]["token"] for name in "ab"}
    files = {name: sidecars(tmp_path / f"{name}.ckpt")[0] for name in "ab"}
    moved = tmp_path / "moved"
    moved.mkdir()
    files["a"].rename(moved / f"other{SUFFIX}")
    files["b"].rename(moved / files["a"].name)
    with open_sidecar(tokens["a"], moved / "renamed.ckpt") as handle:
        assert handle.metadata() == {"fasc_lightning.calibration": tokens["a"]}
    (tmp_path / "link.ckpt").symlink_to(moved / "renamed.ckpt")
    (moved / "renamed.ckpt").touch()
    with open_sidecar(tokens["b"], tmp_path / "link.ckpt") as handle:
        assert handle.metadata() == {"fasc_lightning.calibration": tokens["b"]}
    with pytest.raises(FileNotFoundError, match=r"there is no a\.ckpt\.\w{16}\.fasc\.safetensors beside"):
        open_sidecar(tokens["a"], tmp_path / "a.ckpt").__enter__()


def test_an_overwritten_checkpoint_has_one_sidecar(tmp_path):
    io = plugin()
    io.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    first = names(tmp_path)
    io.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    assert len(names(tmp_path)) == 1
    assert names(tmp_path) != first
    io.save_checkpoint({"weights": torch.ones(3)}, tmp_path / "last.ckpt")
    assert names(tmp_path) == []


def test_leftovers_of_a_killed_process_go_with_the_next_save_of_that_name(tmp_path):
    plugin().save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    plugin().save_checkpoint(checkpoint(), tmp_path / "last.ckpt.more.ckpt")
    plugin().save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    assert len(names(tmp_path)) == 2


def test_removing_a_checkpoint_removes_its_sidecar_alone(tmp_path):
    io = plugin()
    for name in ("a", "b"):
        io.save_checkpoint(checkpoint(), tmp_path / f"{name}.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    assert [name[:7] for name in names(tmp_path)] == ["b.ckpt."]
    io.clean([])
    assert names(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["b.ckpt"]


def test_the_end_of_a_run_removes_what_its_killed_processes_left_where_it_is_told_to_look(tmp_path):
    first, other = plugin(), plugin()
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        for name in ("a", "b"):
            first.save_checkpoint(checkpoint(), folder / f"{name}.ckpt")
    (half,) = sidecars(here / "b.ckpt")
    half.rename(half.with_name(half.name + ".tmp"))
    other.save_checkpoint(checkpoint(), here / "c.ckpt")
    (here / f"mine{SUFFIX}").touch()
    second = plugin()
    second.run = first.run
    second.clean([here])
    assert sorted(path.name.split(".")[0] for path in here.iterdir()) == ["a", "b", "c", "c", "mine"]
    assert len(names(there)) == 2


def test_a_half_written_file_of_a_killed_process_goes_with_the_next_save_of_that_name(tmp_path):
    io = plugin()
    io.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    (file,) = sidecars(tmp_path / "last.ckpt")
    file.rename(file.with_name(file.name.replace(io.run, "0" * 8) + ".tmp"))
    io.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_that_is_written_later_keeps_the_sidecar_of_the_one_before(tmp_path):
    io = plugin(AsyncCheckpointIO(TorchCheckpointIO()))
    for _ in range(3):
        io.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    assert len(names(tmp_path)) == 2
    io.teardown()
    token = torch.load(tmp_path / "last.ckpt", weights_only=True)["state"]["token"]
    with open_sidecar(token, tmp_path / "last.ckpt") as handle:
        assert len(handle.get_tensor("a")) == 100


def test_a_save_that_fails_leaves_the_checkpoint_before_it_and_its_sidecar(tmp_path, monkeypatch):
    io = plugin()
    path = tmp_path / "last.ckpt"
    io.save_checkpoint(checkpoint(), path)
    before, token = path.read_bytes(), torch.load(path, weights_only=True)["state"]["token"]

    def full(*args, **kwargs):
        raise OSError("Read-only file system")

    monkeypatch.setattr(io.inner, "save_checkpoint", full)
    with pytest.raises(OSError, match="Read-only"):
        io.save_checkpoint(checkpoint(), path)
    assert path.read_bytes() == before
    with open_sidecar(token, path) as handle:
        assert len(handle.get_tensor("a")) == 100


def test_statistics_that_cannot_be_written_are_left_out_and_said_to_be(tmp_path, monkeypatch):
    def full(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.warns(UserWarning, match=r"beside .*last\.ckpt: No space left on device"):
        plugin().save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state"]
    assert state["tensors"] == {}
    assert "No space left" in state["obstacle"]
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_names_do_not_look_like_checkpoints_to_lightning(tmp_path, make_trainer):
    """Its search for a cluster job's newest checkpoint, and for the last one, takes parts of names for it."""
    io = plugin()
    io.save_checkpoint(checkpoint(), tmp_path / "hpc_ckpt_3.ckpt")
    io.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    connector = make_trainer()._checkpoint_connector
    assert connector._hpc_resume_path == str(tmp_path / "hpc_ckpt_3.ckpt")
    assert len(sidecars(tmp_path / "hpc_ckpt_3.ckpt")) == 1


def test_checkpoints_that_are_not_of_this_machine_keep_their_statistics(tmp_path):
    io = plugin()
    io.save_checkpoint(checkpoint(), f"file://{tmp_path}/far.ckpt")
    assert torch.load(tmp_path / "far.ckpt", weights_only=True)["state"]["tensors"]["a"].shape == (100,)
    assert names(tmp_path) == []
