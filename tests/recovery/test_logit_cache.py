from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from recovery_cases import batches, compressed, reference, training_loader
from tiny import Tokens
from torch.utils.data import DataLoader, RandomSampler

from fasc_lightning import Distillation, FactorRecovery, LoraRecovery
from fasc_lightning.batches import ResumableLoader
from fasc_lightning.recovery import Teacher
from fasc_lightning.recovery._logit_cache import LogitCache, sample_keys
from fasc_lightning.recovery._teacher_phase import _all_samples

pytest.importorskip("peft", reason="peft is not installed")


def test_samples_are_found_again_however_they_are_padded_and_batched():
    ids, mask = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    labels = torch.tensor([[-100, 6, 7, -100], [8, 9, -100, -100]])
    first = sample_keys({"input_ids": ids, "attention_mask": mask, "labels": labels}, mask)
    left = {
        "input_ids": torch.tensor([[0, 8, 9], [5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "labels": torch.tensor([[-100, 8, 9], [-100, 6, 7]]),
    }
    assert sample_keys(left, left["attention_mask"]) == first[::-1]
    other = {**left, "labels": left["labels"].clone()}
    other["labels"][0, 1] = -100
    assert sample_keys(other, left["attention_mask"])[0] != first[1]


def test_a_cache_of_all_classes_gives_the_loss_of_the_teacher(pair, tmp_path):
    dense, student, layers = pair
    student.log = lambda *args, **kwargs: None
    options = Distillation(temperature=2.0, cache=str(tmp_path), top_k=64)

    def cache():
        return LogitCache(tmp_path, {"teacher": "a", "temperature": 2.0}, student.token_mask, 64)

    teacher = Teacher(student, layers, options, cache=cache())
    for batch in batches():
        teacher.fill(batch)
    teacher.cache.flush()
    student.teacher = Teacher(student, {}, options, cache=cache())
    assert not student.teacher.present
    for batch in batches():
        expected = reference(dense, student, batch, 2.0)
        torch.testing.assert_close(student.training_step(batch, 0), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="none of this one, and the teacher is gone"):
        student.training_step(training_loader().dataset[0] | batches(padded=False)[0], 0)
    with pytest.raises(ValueError, match=r"holds others: teacher, temperature of them differ"):
        LogitCache(tmp_path, {"teacher": "b", "temperature": 1.0}, student.token_mask, 64)


@pytest.mark.parametrize("arm", [LoraRecovery, pytest.param(FactorRecovery, marks=pytest.mark.exhaustive)])
def test_a_fit_with_a_cache_lets_the_teacher_go_before_it_trains(make_trainer, tmp_path, arm):
    import weakref

    options = Distillation(cache=str(tmp_path / "cache"), top_k=64)
    module, callback = compressed(make_trainer, arm(teacher=options))
    plain, reference_callback = compressed(make_trainer, arm(teacher="dense"))
    held = weakref.ref(next(iter(callback._stage._dense.values())))
    gone = []

    class Gone(pl.Callback):
        def on_train_batch_start(self, *args):
            gone.append(held() is None)

    make_trainer(callback, Gone(), max_epochs=2).fit(module, training_loader())
    make_trainer(reference_callback, max_epochs=2).fit(plain, training_loader())
    assert all(gone)
    found, expected = callback.report.recovery, reference_callback.report.recovery
    assert found["held_out_loss"]["after"] == pytest.approx(expected["held_out_loss"]["after"], rel=1e-3)
    # The folder serves another run, without the teacher.
    other, again = compressed(make_trainer, arm(teacher=options))
    again._stage._dense.clear()
    make_trainer(again, max_epochs=2).fit(other, training_loader())
    assert again.report.recovery["held_out_loss"] == found["held_out_loss"]


class Asked(pl.Callback):
    """Whether there is a teacher to ask while a fit trains."""

    def __init__(self):
        self.present = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.present.append(pl_module.teacher.present)


@pytest.mark.parametrize("kind", ["left over", "drawn", "resumable"])
def test_samples_that_the_first_epoch_leaves_out_are_in_the_cache(make_trainer, tmp_path, kind):
    module, callback = compressed(make_trainer, FactorRecovery(teacher=Distillation(cache=str(tmp_path / "cache"))))
    data, generator = Tokens(samples=14, length=16), torch.Generator().manual_seed(3)
    if kind == "left over":
        loader = DataLoader(data, batch_size=4, shuffle=True, drop_last=True, generator=generator)
    elif kind == "drawn":
        sampler = RandomSampler(data, replacement=True, num_samples=8, generator=generator)
        loader = DataLoader(data, batch_size=4, sampler=sampler)
    else:
        loader = ResumableLoader(data, batch_size=4, shuffle=False)
    states = []

    class State(Asked):
        def on_train_start(self, trainer, pl_module):
            states.append(torch.equal(generator.get_state(), before))

    before = generator.get_state()
    asked = State()
    held = training_loader(samples=4)
    make_trainer(callback, asked, max_epochs=3).fit(module, loader, held)
    assert asked.present
    assert not any(asked.present)
    assert states == [True] or kind != "drawn"


def test_the_teacher_stays_where_a_fit_does_not_go_through_all_samples(make_trainer, tmp_path):
    module, callback = compressed(make_trainer, FactorRecovery(teacher=Distillation(cache=str(tmp_path / "cache"))))
    asked, filled = Asked(), []
    loader = training_loader()
    trainer = make_trainer(callback, asked, limit_train_batches=2)
    fill = Teacher.fill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "fill", lambda self, batch: filled.append(batch) or fill(self, batch))
        trainer.fit(module, loader)
    assert asked.present == [True, True]
    assert not filled
    assert module.teacher is None
    assert callback.report.recovery["steps"] == 2


def test_every_process_has_a_share_of_the_samples_and_all_together_have_all():
    data = list(range(11))
    loader = DataLoader(data, batch_size=2, drop_last=True, shuffle=True)
    shares = []
    for rank in range(3):
        loop = SimpleNamespace(_combined_loader=SimpleNamespace(iterables=loader))
        trainer = SimpleNamespace(
            fit_loop=loop,
            global_rank=rank,
            world_size=3,
            estimated_stepping_batches=5,
            accumulate_grad_batches=1,
        )
        shares += [x for batch in _all_samples(trainer) for x in batch.tolist()]
        for other in ({"iterables": [loader, loader]}, {"iterables": iter(data)}):
            trainer.fit_loop = SimpleNamespace(_combined_loader=SimpleNamespace(**other))
            assert _all_samples(trainer) is None
    assert sorted(shares) == data


def test_the_cache_is_filled_in_the_precision_of_the_fit(make_trainer, tmp_path, monkeypatch):
    module, callback = compressed(make_trainer, FactorRecovery(teacher=Distillation(cache=str(tmp_path / "cache"))))
    types, put = [], LogitCache.put

    def watch(self, batch, counted, logits, temperature):
        types.append((logits.dtype, logits.requires_grad))
        put(self, batch, counted, logits, temperature)

    monkeypatch.setattr(LogitCache, "put", watch)
    make_trainer(callback, precision="bf16-mixed").fit(module, training_loader())
    assert set(types) == {(torch.bfloat16, False)}
