from __future__ import annotations

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recovery_cases import compressed, same, training_loader, values
from tiny import Patches, Tokens, causal_module
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from fasc_lightning import Distillation, FactorRecovery, FascCallback, LoraRecovery
from fasc_lightning.batches import ResumableLoader
from fasc_lightning.models import apply_plan
from fasc_lightning.recovery import Teacher, frozen_copy
from fasc_lightning.recovery import _teacher as teacher_module
from fasc_lightning.recovery._divergence import kl_divergence, top_k_divergence
from fasc_lightning.recovery._logit_cache import LogitCache, sample_keys
from fasc_lightning.recovery._teacher import block_error, teacher_bytes
from fasc_lightning.recovery._teacher_phase import _all_samples

pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture
def pair():
    """A dense module, and a compressed one with the dense layers that were replaced."""
    dense = causal_module().eval()
    student = copy.deepcopy(dense)
    plan = {
        name: {"rank": 6, "layout": "pivot"}
        for name, layer in dense.named_modules()
        if isinstance(layer, nn.Linear) and "lm_head" not in name
    }
    return dense, student, apply_plan(student, plan)


def batches(padded: bool = True) -> list[dict[str, torch.Tensor]]:
    data = Tokens(samples=6, length=12, padded=padded)
    return [torch.utils.data.default_collate([data[i] for i in range(j, j + 2)]) for j in (0, 2, 4)]


def reference(dense, student, batch, temperature=1.0, weight=1.0):
    """The loss by torch's own functions, token by token."""
    with torch.no_grad():
        t = dense.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    out = student.model(**batch)
    terms = []
    for i in range(t.shape[0]):
        for j in range(t.shape[1] - 1):
            if batch["labels"][i, j + 1] != -100:
                p, q = (torch.log_softmax(x[i, j] / temperature, 0) for x in (t, out.logits))
                terms.append(F.kl_div(q, p, reduction="sum", log_target=True))
    return weight * temperature**2 * torch.stack(terms).mean() + (1 - weight) * out.loss


# The loss


@pytest.mark.parametrize("rows", [None, [0, 3, 4]])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_its_gradient_are_those_of_the_definition(rows, temperature, monkeypatch):
    monkeypatch.setattr("fasc_lightning.recovery._divergence.CHUNK", 2)
    teacher, student = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    index = None if rows is None else torch.tensor(rows)
    found, expected = student.clone().requires_grad_(), student.clone().requires_grad_()
    (3 * kl_divergence(teacher, found, index, temperature)).backward()
    chosen = range(5) if rows is None else rows
    p, q = (torch.log_softmax(x[list(chosen)] / temperature, 1) for x in (teacher, expected))
    loss = (p.exp() * (p - q)).sum(1).mean()
    (3 * loss).backward()
    torch.testing.assert_close(kl_divergence(teacher, student, index, temperature), loss.detach())
    torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("rows", [None, [0, 2, 3]])
def test_divergence_over_the_largest_and_the_rest(rows, monkeypatch):
    monkeypatch.setattr("fasc_lightning.recovery._divergence.CHUNK", 2)
    teacher, student = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    chosen = list(range(4)) if rows is None else rows
    log_p, index = torch.log_softmax(teacher[chosen] / 2, 1).topk(3, 1)
    found, expected = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = top_k_divergence(log_p, index.int(), found, None if rows is None else torch.tensor(rows), temperature=2)
    p, q = (torch.softmax(x[chosen] / 2, 1) for x in (teacher, expected))
    p, q = (torch.cat([x.gather(1, index), 1 - x.gather(1, index).sum(1, keepdim=True)], 1) for x in (p, q))
    definition = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(loss, definition)
    loss.backward()
    definition.backward()
    torch.testing.assert_close(found.grad, expected.grad)
    # All classes: the whole divergence.
    log_p, index = torch.log_softmax(teacher[chosen], 1).topk(9, 1)
    among = torch.tensor(chosen)
    torch.testing.assert_close(top_k_divergence(log_p, index, student, among), kl_divergence(teacher, student, among))


def test_a_student_who_leaves_nothing_to_the_others_is_still_led_back():
    """In float32 1 minus what it gives to the largest is 0, and a logarithm of that leads nowhere."""
    student = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    loss = top_k_divergence(torch.tensor([[0.5]]).log(), torch.tensor([[0]]), student)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (-0.6931472 + 60 - 0.6931472) + 0.5 * -0.6931472, rel=1e-4)
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, -0.25, -0.25]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32_and_its_gradients_do_not_vanish(dtype):
    """As a GradScaler has it: the loss is multiplied before the way back."""
    count, scale = 4096, 2.0**16
    logits = [(3 * torch.randn(count, 32)).to(dtype) for _ in range(2)]
    teacher, student = logits[0], logits[1].requires_grad_()
    exact = student.detach().double().requires_grad_()
    p, q = torch.log_softmax(teacher.double(), 1), torch.log_softmax(exact, 1)
    expected = (p.exp() * (p - q)).sum(1).mean()
    expected.backward()
    log_p, index = p.float().topk(32, 1)
    for loss in (kl_divergence(teacher, student), top_k_divergence(log_p, index, student)):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        student.grad = None
        (loss * scale).backward()
        assert student.grad.dtype == dtype
        found = student.grad.double() / scale
        assert float((found - exact.grad).norm() / exact.grad.norm()) < 1e-2
    # One prediction: the scale is beyond what float16 holds, its gradient is not.
    student.grad = None
    loss = kl_divergence(teacher, student, torch.tensor([0]), temperature=4.0)
    (loss * scale).backward()
    assert torch.isfinite(student.grad).all()


def test_a_second_way_back_is_refused():
    loss = kl_divergence(torch.randn(2, 3), torch.randn(2, 3, requires_grad=True))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_nothing_that_counts_is_no_loss():
    student = torch.randn(2, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    assert kl_divergence(torch.randn(2, 3), student, none) == 0
    assert top_k_divergence(torch.zeros(0, 2), torch.zeros(0, 2), student, none) == 0


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 0.7)])
def test_the_loss_of_a_module_is_the_definition_of_it(pair, temperature, weight):
    dense, student, layers = pair
    options = Distillation(temperature=temperature, weight=weight)
    student.log = lambda *args, **kwargs: None
    before = values(student)
    student.teacher = Teacher(student, layers, options)
    for batch in batches():
        expected = reference(dense, student, batch, temperature, weight)
        torch.testing.assert_close(student.training_step(batch, 0), expected)
    assert same(values(student), before)


def test_labels_are_not_needed(pair):
    dense, student, layers = pair
    student.log = lambda *args, **kwargs: None
    student.teacher = Teacher(student, layers, Distillation())
    batch = batches()[0]
    expected = reference(dense, student, batch)
    del batch["labels"]
    torch.testing.assert_close(student.training_step(batch, 0), expected)


def test_the_dense_model_is_its_own_best_student(pair):
    dense, student, layers = pair
    student.log = lambda *args, **kwargs: None
    twin = copy.deepcopy(dense)
    twin.log = student.log
    twin.teacher = Teacher(
        twin, {name: copy.deepcopy(layer) for name, layer in layers.items()}, Distillation(blocks=1.0)
    )
    assert twin.training_step(batches()[0], 0).item() == pytest.approx(0, abs=1e-6)


def test_block_outputs_are_compared(pair):
    dense, student, layers = pair
    student.log = lambda *args, **kwargs: None
    batch = batches()[0]
    hidden = []
    for module in (student, dense):
        found = []

        def keep(block, args, output, found=found):
            found.append(output[0] if isinstance(output, tuple) else output)

        handles = [block.register_forward_hook(keep) for block in module.model.model.layers]
        with torch.no_grad():
            module.model(**batch)
        for handle in handles:
            handle.remove()
        hidden.append(found)
    real = (batch["labels"] != -100)[:, 1:]  # the last token predicts nothing, and padding is none
    pairs = [(s[:, :-1][real], t[:, :-1][real]) for s, t in zip(*hidden, strict=True)]
    expected = torch.stack([((s - t).square().sum(1) / t.square().sum(1)).mean() for s, t in pairs]).mean()
    assert not real.all()
    every = torch.stack([((s - t).square().sum(2) / t.square().sum(2)).mean() for s, t in zip(*hidden, strict=True)])
    torch.testing.assert_close(block_error(*hidden), every.mean())
    assert block_error(*hidden, torch.zeros(hidden[0][0].shape[:2], dtype=torch.bool)) == 0
    for settings in ({}, {"device": "cpu"}):
        student.teacher = Teacher(student, layers, Distillation(weight=0.0, blocks=3.0, **settings))
        label_loss = student.model(**batch).loss
        loss = student.training_step(batch, 0)
        torch.testing.assert_close(loss, label_loss + 3 * expected)
        loss.backward()
        student.teacher.release()
        student.teacher = None
    assert not any(block._forward_hooks for block in student.model.model.layers)


def test_blocks_that_are_run_again_on_the_way_back_are_taught_alike_and_not_held(pair):
    _, student, layers = pair
    student.log = lambda *args, **kwargs: None
    student.train()
    student.teacher = Teacher(student, layers, Distillation(blocks=1.0))
    gradients = []
    for settings in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        student.zero_grad()
        if settings is not None:
            student.model.activation_checkpointing_enable(settings)
        student.training_step(batches()[0], 0).backward()
        assert not student.teacher._blocks._found
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    student.teacher.release()


def test_no_logits_are_copied_to_leave_out_those_that_predict_nothing(pair):
    dense, _, _ = pair
    batch = batches()[0]
    logits, counted = dense.predictions(batch)
    assert logits.is_contiguous()
    assert logits._base is None  # all that the model made
    assert torch.equal(counted[:, :-1], batch["labels"][:, 1:] != -100)
    assert not counted[:, -1].any()


def test_a_fit_in_mixed_precision_is_taught_in_it_and_compared_in_float32(make_trainer, monkeypatch):
    """With padding, a temperature and two batches a step, against float64 on the very logits."""
    module, callback = compressed(make_trainer, FactorRecovery(teacher=Distillation(temperature=2.0)))
    seen, losses, gradients = [], [], []
    divergence = kl_divergence

    def watch(teacher, student, rows, temperature):
        loss = divergence(teacher, student, rows, temperature)
        if student.requires_grad:
            assert not teacher.requires_grad
            seen.append((teacher.clone(), student.detach().clone(), rows, temperature))
            student.register_hook(lambda grad: gradients.append(grad.clone()))
            losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(teacher_module, "kl_divergence", watch)
    settings = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "limit_train_batches": 4}
    make_trainer(callback, **settings).fit(module, training_loader(padded=True))
    assert len(seen) == len(gradients) == 4
    for (teacher, student, rows, temperature), loss, gradient in zip(seen, losses, gradients, strict=True):
        assert teacher.dtype == student.dtype == gradient.dtype == torch.bfloat16
        assert 0 < len(rows) < len(student)
        exact = student.double().requires_grad_()
        p, q = (torch.log_softmax(x[rows].double() / temperature, 1) for x in (teacher, exact))
        expected = (p.exp() * (p - q)).sum(1).mean()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        (temperature**2 * expected / 2).backward()
        assert float((gradient.double() - exact.grad).norm() / exact.grad.norm()) < 1e-2


# The teacher


def test_a_teacher_on_the_same_device_shares_all_but_the_dense_layers(pair):
    _, student, layers = pair
    teacher = Teacher(student, layers, Distillation())
    assert teacher.shares
    own = {p.data_ptr() for layer in layers.values() for p in layer.parameters()}
    seen = set()
    handle = student.model.register_forward_pre_hook(lambda m, a: seen.update(p.data_ptr() for p in m.parameters()))
    teacher._ask(batches()[0])
    handle.remove()
    assert own < seen
    assert seen - own < {p.data_ptr() for p in student.parameters()}
    assert teacher_bytes(student, layers, Distillation(), torch.device("cpu"))[0] == 0


def test_a_teacher_of_its_own_is_a_copy_in_the_dtype_asked_for(pair):
    dense, student, layers = pair
    options = Distillation(device="cpu", dtype="bfloat16")
    teacher = Teacher(student, layers, options)
    assert not teacher.shares
    assert {p.dtype for p in teacher._copy.parameters()} == {torch.bfloat16}
    assert teacher_bytes(student, layers, options, torch.device("cpu"))[0] == sum(
        2 * p.numel() for p in dense.parameters()
    )
    batch = batches()[0]
    found, expected = teacher._ask(batch), dense.model(**batch).logits.flatten(0, 1)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)


def test_a_copy_takes_memory_for_what_is_converted_alone_and_once(pair, monkeypatch):
    dense, student, layers = pair

    def whole(*arguments):
        raise AssertionError("Copied as it is before it is converted, where there may be no room for it.")

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", whole)
    half = Teacher(student, layers, Distillation(dtype=torch.bfloat16))._copy
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    options = Distillation(device="cpu")
    teacher = Teacher(student, layers, options)
    assert teacher_bytes(student, layers, options, torch.device("cpu"))[0] == 0
    known = {p.data_ptr() for module in (student, *layers.values()) for p in module.parameters()}
    assert {p.data_ptr() for p in teacher._copy.parameters()} <= known
    batch = batches()[0]
    torch.testing.assert_close(teacher._ask(batch), dense.model(**batch).logits.flatten(0, 1))


def test_the_layers_of_a_caller_stay_as_they_are(pair):
    _, student, layers = pair
    student.to(torch.bfloat16)
    teacher = Teacher(student, layers, Distillation())
    assert teacher._ask(batches()[0]).dtype == torch.bfloat16
    assert {p.dtype for layer in layers.values() for p in layer.parameters()} == {torch.float32}
    assert all(p.requires_grad for layer in layers.values() for p in layer.parameters())


def test_what_is_computed_and_no_weight_keeps_its_precision():
    """Frequencies times positions: rounded to half precision they are those of other positions."""
    module = causal_module()
    module.model.model.norm.register_buffer("scale", torch.ones(2))
    found = frozen_copy(module, dtype=torch.bfloat16)
    rotary, own = found.model.model.rotary_emb, module.model.model.rotary_emb
    assert torch.equal(rotary.inv_freq, own.inv_freq)
    assert rotary.inv_freq.data_ptr() != own.inv_freq.data_ptr()
    assert found.model.model.norm.scale.dtype == torch.bfloat16
    assert module.model.model.norm.scale.dtype == torch.float32


def test_inputs_are_brought_to_the_type_of_a_copy():
    class Taught(Patches):
        def predictions(self, batch):
            return self(batch[0]), None

    student, dense = Taught(), Taught()
    teacher = Teacher(student, {"up": dense.up}, Distillation(dtype="float64"))
    assert teacher._ask((torch.randn(2, 1, 16, 16), torch.zeros(2))).dtype == torch.float64
    assert torch.equal(teacher._copy.up.weight, dense.up.weight.double())


def test_dropout_is_off_in_the_teacher_and_on_in_the_student(pair):
    _, student, layers = pair
    student.model.model.embed_tokens = nn.Sequential(student.model.model.embed_tokens, nn.Dropout(0.5))
    student.train()
    teacher = Teacher(student, layers, Distillation())
    batch = batches()[0]
    assert torch.equal(teacher._ask(batch), teacher._ask(batch))
    assert all(module.training for module in student.modules())


def test_a_teacher_that_does_not_fit_is_refused(pair, monkeypatch):
    _, student, layers = pair
    monkeypatch.setattr(teacher_module, "available_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"0\.00 GB is free on cpu\. HINT: .*cache=FOLDER"):
        Teacher(student, layers, Distillation(dtype="float64"))
    Teacher(student, layers, Distillation())  # nothing but what is there already


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "`temperature` to be positive"),
        ({"weight": 1.5}, r"`weight` to be in \[0, 1\]"),
        ({"weight": 0.0}, "at 0 the teacher has no say"),
        ({"blocks": -1}, "`blocks` to be 0 or more"),
        ({"top_k": 0}, "`top_k` to be a positive int"),
        ({"blocks": 1.0, "cache": "folder"}, "blocks=0 with a `cache`"),
        ({"dtype": "int8"}, "a floating dtype as 'bfloat16' but got 'int8'"),
        ({"dtype": "half a float"}, "a floating dtype"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**options)


# The cache


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


@pytest.mark.parametrize("arm", [LoraRecovery, FactorRecovery])
def test_a_fit_with_a_cache_lets_the_teacher_go_before_it_trains(make_trainer, tmp_path, arm):
    import weakref

    options = Distillation(cache=str(tmp_path / "cache"), top_k=64)
    module, callback = compressed(make_trainer, arm(teacher=options))
    plain, reference_callback = compressed(make_trainer, arm(teacher="dense"))
    held = weakref.ref(next(iter(callback._second._dense.values())))
    gone = []

    class Gone(FascCallback.__mro__[1]):
        def on_train_batch_start(self, *args):
            gone.append(held() is None)

    make_trainer(callback, Gone(), max_epochs=2).fit(module, training_loader())
    make_trainer(reference_callback, max_epochs=2).fit(plain, training_loader())
    assert all(gone)
    found, expected = callback.report.recovery, reference_callback.report.recovery
    assert found["held_out_loss"]["after"] == pytest.approx(expected["held_out_loss"]["after"], rel=1e-3)
    # The folder serves another run, without the teacher.
    other, again = compressed(make_trainer, arm(teacher=options))
    again._second._dense.clear()
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


def test_without_dense_layers_there_is_no_teacher(make_trainer):
    module, callback = compressed(make_trainer, LoraRecovery(teacher="dense"))
    callback._second._dense.clear()
    before = values(module)
    with pytest.raises(MisconfigurationException, match="they are not at hand"):
        make_trainer(callback).fit(module, training_loader())
    assert same(values(module), before)
