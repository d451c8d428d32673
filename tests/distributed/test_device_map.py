from __future__ import annotations

import pytest
import torch
from tiny import causal_model, token_loader

from fasc_lightning import CausalLMModule, FascCallback, compress
from fasc_lightning.distributed import is_split


def dispatched():
    """A model that accelerate has dispatched, for want of devices to one, and that says that it was to two."""
    from accelerate import dispatch_model

    model = dispatch_model(causal_model().eval(), {"": "cpu"}, force_hooks=True)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    return model


def test_a_split_model_is_compressed_where_it_is(monkeypatch):
    model, moved = dispatched(), []
    for owner in (type(model), CausalLMModule):
        for name in ("to", "cpu"):
            monkeypatch.setattr(owner, name, lambda *args: moved.append(args))
    report = compress(model, token_loader(), keep=0.6, progress=False)
    monkeypatch.undo()
    assert moved == []
    assert report.refit is None
    whole = causal_model().eval()
    expected = compress(whole, token_loader(), keep=0.6, refit=False, progress=False)
    assert repr(report.layers) == repr(expected.layers)  # with NaN, which equals nothing
    ids = torch.arange(3, 19)[None]
    torch.testing.assert_close(model(ids).logits, whole(ids).logits)


def test_a_refit_of_a_split_model_is_refused_where_it_is_insisted_on():
    with pytest.raises(ValueError, match="one device"):
        compress(dispatched(), token_loader(), keep=0.6, refit=True, progress=False)


def test_parameters_on_several_devices_need_a_device_map():
    model = causal_model()
    model.model.layers[1].mlp.down_proj.to("meta")
    with pytest.raises(ValueError, match="on cpu, meta"):
        compress(model, token_loader(), keep=0.6, progress=False)


def test_weights_that_were_offloaded_are_refused_before_the_first_batch(tmp_path):
    from accelerate import disk_offload

    model = disk_offload(causal_model().eval(), tmp_path, execution_device=torch.device("cpu"))
    assert is_split(model) is False
    with pytest.raises(ValueError, match="are on the meta device"):
        compress(model, token_loader(), keep=0.6, progress=False)


def test_an_empty_model_is_refused_before_the_first_batch(make_trainer):
    with torch.device("meta"):
        model = causal_model()
    with pytest.raises((ValueError, NotImplementedError), match="meta"):
        make_trainer(FascCallback(rank=0.5)).fit(CausalLMModule(model), token_loader())


def test_a_bfloat16_model_stays_one(make_trainer):
    model = causal_model().to(torch.bfloat16).eval()
    report = compress(model, token_loader(), keep=0.6, progress=False, moments_device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert report.kept == pytest.approx(0.6, abs=0.01)
    assert torch.isfinite(model(torch.arange(3, 19)[None]).logits).all()
