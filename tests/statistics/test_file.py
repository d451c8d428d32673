from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny import causal_model

from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes, select_layers
from fasc_lightning.statistics import CalibrationMoments, load_moments, moments_needs, save_moments
from fasc_lightning.statistics._layer_moments import NEEDS
from fasc_lightning.studies.rho import backward_windows


def gathered(needs=(), dtype=torch.float32):
    """Moments of a tiny model and its layers."""
    model = causal_model().requires_grad_(False).to(dtype)
    layers = select_layers(model)
    moments = CalibrationMoments(layer_shapes(layers), dtype, needs=needs)
    windows = torch.randint(3, 64, (3, 16), generator=torch.Generator().manual_seed(1))
    for _ in backward_windows(model, Taps(layers, moments), windows):
        pass
    return moments, layers


def same(a, b):
    """Whether two statistics of a layer are equal to the last bit."""
    if isinstance(a, tuple):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("needs", [(), ("coupled",), ("C", "abs_x"), tuple(NEEDS)])
def test_every_field_of_every_layer_comes_back_bit_by_bit(tmp_path, needs, dtype):
    moments, layers = gathered(needs, dtype)
    save_moments(moments, tmp_path / "folder" / "m.safetensors")
    loaded = load_moments(tmp_path / "folder" / "m.safetensors", shapes=layer_shapes(layers))
    assert loaded.needs == moments.needs >= set(needs)
    assert moments_needs(tmp_path / "folder" / "m.safetensors") == moments.needs
    assert (loaded.dtype, loaded.shapes, loaded.nbytes) == (dtype, moments.shapes, moments.nbytes)
    for name in layers:
        expected, found = vars(moments.layer(name)), vars(loaded.layer(name))
        assert {field for field, value in found.items() if value is None} == set(NEEDS) - moments.needs - {"plain"}
        assert all(same(value, found[field]) for field, value in expected.items())
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["m.safetensors"]


def test_shared_inputs_stay_shared(tmp_path):
    moments, _ = gathered()
    save_moments(moments, tmp_path / "m.safetensors")
    loaded = load_moments(tmp_path / "m.safetensors")
    assert set(loaded.inputs) == set(moments.inputs)
    assert any(len(members) == 3 for members in loaded.inputs)  # q, k and v


def test_what_is_loaded_goes_on_as_if_it_had_never_been_saved(tmp_path):
    moments, layers = gathered(tuple(NEEDS))
    save_moments(moments, tmp_path / "m.safetensors")
    loaded = load_moments(tmp_path / "m.safetensors")
    other, _ = gathered(tuple(NEEDS))
    moments.add_(other)
    loaded.add_(other)
    for name in layers:
        found = vars(loaded.layer(name))
        assert all(same(value, found[field]) for field, value in vars(moments.layer(name)).items())


def test_layers_that_no_token_reached_stay_unreached(tmp_path):
    save_moments(CalibrationMoments({"a": (3, 4)}, needs=["C"]), tmp_path / "m.safetensors")
    loaded = load_moments(tmp_path / "m.safetensors")
    assert loaded.tokens("a") == 0
    with pytest.raises(ValueError, match="no gradient reached it"):
        loaded.layer("a")


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(tmp_path, length):
    moments, _ = gathered()
    path = tmp_path / "m.safetensors"
    save_moments(moments, path)
    content = path.read_bytes()
    path.write_bytes(content[:length])
    for read in (load_moments, moments_needs):
        with pytest.raises(ValueError, match=r"m\.safetensors is damaged"):
            read(path)


def test_a_save_that_fails_leaves_the_file_before_it(tmp_path, monkeypatch):
    moments, _ = gathered()
    path = tmp_path / "m.safetensors"
    save_moments(moments, path)
    before = path.read_bytes()

    def fail(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_moments(moments, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_another_model_is_refused(tmp_path):
    moments, layers = gathered()
    save_moments(moments, tmp_path / "m.safetensors")
    shapes = layer_shapes(layers)
    wider = {**shapes, next(iter(shapes)): (99, 32)}
    with pytest.raises(ValueError, match=r"another model: layer 'model.layers.0.self_attn.q_proj' is \(32, 32\) in"):
        load_moments(tmp_path / "m.safetensors", shapes=wider)
    with pytest.raises(ValueError, match=r"'extra' is not there in the file and \(2, 3\) in the model"):
        load_moments(tmp_path / "m.safetensors", shapes={**shapes, "extra": (2, 3)})


def test_another_source_is_refused(tmp_path):
    moments, _ = gathered()
    save_moments(moments, tmp_path / "m.safetensors", source="a1")
    assert load_moments(tmp_path / "m.safetensors", source="a1").nbytes == moments.nbytes
    with pytest.raises(ValueError, match=r"source 'b2' but those in .* are from 'a1'"):
        load_moments(tmp_path / "m.safetensors", source="b2")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is none"):
        load_moments(tmp_path / "m.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="of something else"):
        load_moments(tmp_path / "m.safetensors")
    header = '{"format": 0}'
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors", metadata={"fasc_lightning.moments": header})
    with pytest.raises(ValueError, match="of format 0"):
        load_moments(tmp_path / "m.safetensors")
