from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from expert_cases import make
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from processes import run_script
from sharded_fit import CASES, ShardedModule, is_plain, make_module
from torch import nn

from fasc_lightning import load_compressed
from fasc_lightning.distributed import Unsharding, is_sharded, whole
from fasc_lightning.distributed import _fsdp as sharding
from fasc_lightning.layers import is_compressed, select_layers


def run(what: str, folder) -> list[dict]:
    run_script("sharded_fit.py", what, folder, processes=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The same fits under FSDP2 and under DDP."""
    return run("compare", tmp_path_factory.mktemp("compared"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", CASES)
def test_sharded_fits_end_as_those_of_replicas_do(compared, case):
    first, second = (found[case]["fsdp2"] for found in compared)
    expected = compared[0][case]["ddp"]
    assert first["spread"] == 1.0
    assert expected["spread"] == 0.0
    assert first["plain"]
    assert second["plain"]
    assert first["ranks"] == expected["ranks"]
    assert first["whole"] == expected["whole"]
    assert second["refit"] is None  # the first process says what was done
    assert (first["refit"] or {}).get("layers") == (expected["refit"] or {}).get("layers")
    assert (first["refit"] or {}).get("loss", {}) == pytest.approx((expected["refit"] or {}).get("loss", {}), rel=1e-9)
    assert first["history"] == pytest.approx(expected["history"], rel=1e-9)
    assert list(first["state"]) == list(second["state"]) == list(expected["state"])
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name])
        torch.testing.assert_close(value, expected["state"][name], rtol=1e-9, atol=1e-9)
    for name, moments in expected["moments"].items():
        for field in ("A", "G", "mean_x", "mean_h", "tokens"):
            torch.testing.assert_close(first["moments"][name][field], moments[field], rtol=1e-9, atol=1e-12)
        assert first["rhos"][name] == pytest.approx(expected["rhos"][name], abs=1e-9, nan_ok=True)


def test_a_sharded_fit_ends_with_the_factors_of_one_process(compared, make_trainer):
    from sharded_fit import fit

    (one, two) = fit("auto", **CASES["one by one"]), compared[0]["one by one"]["fsdp2"]
    assert two["ranks"] == one["ranks"]
    for name, value in one["state"].items():
        torch.testing.assert_close(two["state"][name], value, rtol=1e-7, atol=1e-7)


def test_cases_cover_both_ways_to_read_weights(compared):
    assert compared[0]["replayed"]["fsdp2"]["refit"] is not None  # the whole module first
    assert compared[0]["one by one"]["fsdp2"]["refit"] is None
    assert compared[0]["trained"]["fsdp2"]["history"]  # with rho observed meanwhile
    tied = compared[0]["tied"]["fsdp2"]["state"]
    assert torch.equal(tied["model.lm_head.weight"], tied["model.model.embed_tokens.weight"])


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    return run("fail", tmp_path_factory.mktemp("failed"))


@pytest.mark.parametrize("case", ["one by one", "replayed"])
def test_a_fit_that_fails_after_the_swap_leaves_a_module_that_is_sharded_and_trains_as_before(failed, case):
    for found in failed:
        ended = found[case]
        assert ended["error"] == "InterruptedError: after the swap"
        assert ended["kinds"] == ["FSDPLlamaDecoderLayer", "FSDPLlamaForCausalLM"]
        assert ended["spread"]
        assert ended["report"] is None
        assert ended["losses"] == found["straight"]


def test_modules_that_no_process_can_hold_are_compressed_layer_by_layer(failed):
    for found in failed:
        assert found["no room"]["plain"]
        assert found["no room"]["refit"] is None
        assert found["no room, insisted"].startswith("MemoryError: Expected room for the whole module on every process")


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            "tensor parallel",
            r"splits layers over 2 processes .* HINT: ModelParallelStrategy\(data_parallel_size=2, tens",
        ),
        ("unsharded", "`configure_model` of Unsharded to shard its weights but it shards none"),
        ("recovery", "a single device or strategy='ddp' for a recovery but got ModelParallelStrategy"),
    ],
)
def test_what_is_no_sharded_data_parallelism_is_refused_with_a_remedy(failed, case, said):
    for found in failed:
        with pytest.raises(RuntimeError, match=f"MisconfigurationException: .*{said}.*"):
            raise RuntimeError(found[case])


def test_fused_experts_whose_weights_are_sharded_are_refused_with_a_remedy(monkeypatch):
    monkeypatch.setattr(sharding, "is_sharded", lambda module: True)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer, model = SimpleNamespace(strategy=strategy, world_size=2), make("mixtral")
    with pytest.raises(MisconfigurationException, match=r"1 modules hold fused experts, .* HINT: exclude the experts"):
        sharding.check_sharded(trainer, model, select_layers(model))
    sharding.check_sharded(trainer, model, select_layers(model, exclude=r".*experts.*"))


def test_a_module_is_saved_in_every_way_and_trains_on(tmp_path):
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    first, second = run("save", tmp_path)
    for found in (first, second):  # sharded again, with its factors
        assert found["losses"] == pytest.approx(found["expected"], rel=1e-6)

    folder = load_compressed(tmp_path / "folder")
    assert_same(folder.state_dict(), {name.removeprefix("model."): value for name, value in first["state"].items()})
    consolidated = _load_distributed_checkpoint(tmp_path / "parts.ckpt")
    torch.save(consolidated, tmp_path / "consolidated.ckpt")
    for file in ("one", "consolidated"):
        module = ShardedModule.load_from_checkpoint(tmp_path / f"{file}.ckpt", model=make_module().model)
        assert is_compressed(module)
        assert_same(module.state_dict(), first["state"])


def test_a_sharded_calibration_goes_on_where_its_checkpoint_was_saved(tmp_path):
    for found in run("resume", tmp_path):
        for ended in found.values():
            assert ended["straight"]["error"] == ended["resumed"]["error"] == "nothing"
            assert ended["stopped"] == ("InterruptedError: ", 3)
            assert ended["resumed"]["batches"] == ended["straight"]["batches"] - 2
            assert_same(ended["resumed"]["state"], ended["straight"]["state"], rtol=1e-9, atol=1e-9)


def assert_same(found, expected, rtol=0.0, atol=0.0):
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol)


@pytest.fixture
def mesh():
    """Of one process."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def network(mesh) -> nn.Sequential:
    """Layers that share a weight, and two that are sharded together; with hooks of others before and after."""
    from torch.distributed.fsdp import fully_shard

    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    net[1].register_forward_hook(lambda *unused: calls.append("before"))
    calls = net.calls = []
    fully_shard([net[2], net[3]], mesh=mesh)
    fully_shard(net, mesh=mesh)
    net[1].register_forward_hook(lambda *unused: calls.append("after"))
    net[2].weight.requires_grad_(False)
    net(torch.ones(1, 4))  # leaves the weights of the root gathered
    return net


def test_nothing_of_fsdp_is_left_and_all_of_it_comes_back(mesh):
    from torch.distributed.fsdp import fully_shard

    net = network(mesh)
    x = torch.randn(3, 4)
    expected, order = net(x), [dict(part._forward_hooks) for part in net.modules()]
    unsharding = Unsharding()
    unsharding.run(net)
    assert is_plain(net)
    assert not is_sharded(net)
    assert net[0].weight is net[1].weight
    assert [p.requires_grad for p in net.parameters()] == [True, True, True, False, True, True, True]
    torch.testing.assert_close(net(x), expected)
    net.calls.clear()
    net(x)
    assert net.calls == ["before", "after"]

    unsharding.run(net)  # which is whole already
    unsharding.undo()
    assert not is_plain(net)
    assert [list(part._forward_hooks) for part in net.modules()] == [list(hooks) for hooks in order]
    torch.testing.assert_close(net(x), expected)
    net(x).sum().backward()
    assert net[0].weight.grad.shape == (4, 4)

    unsharding.run(net)
    unsharding.forget()
    unsharding.undo()
    assert is_plain(net)
    fully_shard(net, mesh=mesh)
    torch.testing.assert_close(net(x), expected)


def test_a_module_that_cannot_be_gathered_stays_sharded(mesh, monkeypatch):
    net = network(mesh)
    asked = []

    def failing(tensor):
        asked.append(tensor)
        if len(asked) == 3:
            raise MemoryError
        return whole(tensor)

    monkeypatch.setattr("fasc_lightning.distributed._fsdp.whole", failing)
    with pytest.raises(MemoryError):
        Unsharding().run(net)
    assert all(hasattr(p, "device_mesh") for p in net.parameters())


def test_hooks_that_were_put_on_a_whole_module_stay_where_it_is_sharded_again(mesh):
    net = network(mesh)
    unsharding = Unsharding()
    unsharding.run(net)
    net.register_forward_hook(lambda *unused: net.calls.append("new"))
    unsharding.undo()
    net.calls.clear()
    net(torch.ones(1, 4))
    assert net.calls == ["before", "after", "new"]


def test_a_plain_tensor_is_whole_as_it_is():
    tensor = torch.ones(2, requires_grad=True)
    assert whole(tensor) is tensor
    assert not is_sharded(nn.Linear(2, 2))
