"""Files of earlier commits load as they did then: of fc953d9, without checksums, and of 0273634, before the rooms."""

from __future__ import annotations

import shutil

import pytest
import saved_cases
import torch
from old_files import FORMATS, Counting
from saved_cases import BATCHES, STOP, TEACHER, TOP_K, batch, fit, no_mask, small_module, small_moments

from fasc_lightning import FascCallback, load_compressed
from fasc_lightning.models import match_checkpoint
from fasc_lightning.recovery._logit_cache import LogitCache, teacher_of
from fasc_lightning.statistics import load_moments

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]


@pytest.fixture(params=FORMATS, ids=lambda folder: folder.name)
def old(request):
    return request.param


@pytest.mark.parametrize("folder", ["calibration", "beside"])
def test_an_old_calibration_goes_on(tmp_path, old, folder, recwarn):
    shutil.copytree(old / folder, tmp_path / folder)
    counting = Counting()
    module, callback = fit(tmp_path / "resumed", counting, ckpt_path=tmp_path / folder / "last.ckpt")
    straight, reference = fit(tmp_path / "straight")
    assert counting.batches == BATCHES - STOP
    assert not [w for w in recwarn if "starts again" in str(w.message)]
    assert callback.report.layers[0].tokens == reference.report.layers[0].tokens == 2 * BATCHES * 16
    states = module.state_dict(), straight.state_dict()
    assert list(states[0]) == list(states[1])
    # Rounding differs from one processor to another.
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-3, atol=1e-5)


def test_an_old_compressed_checkpoint_loads(old):
    content = torch.load(old / "compressed.ckpt", weights_only=True)
    module, callback = small_module(), FascCallback(**saved_cases.OPTIONS)
    match_checkpoint(module, content)
    module.load_state_dict(content["state_dict"])
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in module.state_dict().items())
    (state,) = (value for key, value in content["callbacks"].items() if key.startswith("FascCallback"))
    assert ("checksum" in state) is (old.name != "format1")
    callback.load_state_dict(state)
    assert callback.report.kept <= 0.6
    assert {row.name for row in callback.report.layers if row.layout != "dense"} == set(callback.report.plan)


def test_an_old_folder_loads(old):
    model = load_compressed(old / "folder")
    content = torch.load(old / "compressed.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, content[f"model.{name}"]) for name, value in model.state_dict().items())


def test_old_moments_load(old):
    loaded, expected = load_moments(old / "moments.safetensors", source="source"), small_moments()
    assert (loaded.shapes, loaded.needs, set(loaded.inputs)) == (expected.shapes, expected.needs, set(expected.inputs))
    for name in expected.shapes:
        assert loaded.tokens(name) == expected.tokens(name)
        torch.testing.assert_close(loaded.layer(name).A, expected.layer(name).A)
        torch.testing.assert_close(loaded.layer(name).coupled[1], expected.layer(name).coupled[1])


def test_an_old_teacher_cache_answers(old, tmp_path):
    shutil.copytree(old / "teacher", tmp_path / "teacher")
    assert teacher_of(tmp_path / "teacher") == TEACHER["teacher"]
    cache = LogitCache(tmp_path / "teacher", TEACHER, no_mask, TOP_K)
    log_p, index = cache.get(batch(), None)
    expected = saved_cases.save_cache(tmp_path / "new").get(batch(), None)
    torch.testing.assert_close(log_p, expected[0])
    assert torch.equal(index, expected[1])
