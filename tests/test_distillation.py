from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recovery_cases import compressed, same, training_loader, values
from tiny import Tokens, causal_module
from torch import nn

from fasc_lightning import Distillation, FactorRecovery, FascCallback, LoraRecovery, distillation
from fasc_lightning.distillation import Teacher, relative_error, teacher_bytes
from fasc_lightning.divergence import kl_divergence, top_k_divergence
from fasc_lightning.plan import apply_plan
from fasc_lightning.teacher_cache import LogitCache, sample_keys

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
    monkeypatch.setattr("fasc_lightning.divergence.CHUNK", 2)
    teacher, student = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    index = None if rows is None else torch.tensor(rows)
    found, expected = student.clone().requires_grad_(), student.clone().requires_grad_()
    kl_divergence(teacher, found, index, temperature).backward()
    chosen = range(5) if rows is None else rows
    p, q = (torch.log_softmax(x[list(chosen)] / temperature, 1) for x in (teacher, expected))
    loss = (p.exp() * (p - q)).sum(1).mean()
    loss.backward()
    torch.testing.assert_close(kl_divergence(teacher, student, index, temperature), loss.detach().float())
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-7)


def test_divergence_over_the_largest_and_the_rest():
    teacher, student = torch.randn(4, 9), torch.randn(4, 9, requires_grad=True)
    log_p, index = torch.log_softmax(teacher / 2, 1).topk(3, 1)
    found = top_k_divergence(log_p, index, student, temperature=2)
    p, q = (torch.softmax(x / 2, 1) for x in (teacher, student))
    p, q = (torch.cat([x.gather(1, index), 1 - x.gather(1, index).sum(1, keepdim=True)], 1) for x in (p, q))
    torch.testing.assert_close(found, (p * (p.log() - q.log())).sum(1).mean())
    found.backward()
    assert torch.isfinite(student.grad).all()
    # All classes: the whole divergence.
    log_p, index = torch.log_softmax(teacher, 1).topk(9, 1)
    torch.testing.assert_close(
        top_k_divergence(log_p, index, student), kl_divergence(teacher, student), atol=2e-6, rtol=1e-4
    )


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
    expected = torch.stack([(s - t).square().sum() / t.square().sum() for s, t in zip(*hidden, strict=True)]).mean()
    torch.testing.assert_close(relative_error(*hidden), expected)
    for settings in ({}, {"device": "cpu"}):
        student.teacher = Teacher(student, layers, Distillation(weight=0.0, blocks=3.0, **settings))
        label_loss = student.model(**batch).loss
        loss = student.training_step(batch, 0)
        torch.testing.assert_close(loss, label_loss + 3 * expected)
        loss.backward()
        student.teacher.release()
        student.teacher = None
    assert not any(block._forward_hooks for block in student.model.model.layers)


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
    found, expected = teacher._ask(batch), dense.model(**batch).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)


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
    monkeypatch.setattr(distillation, "available_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"0\.00 GB is free on cpu\. HINT: .*cache=FOLDER"):
        Teacher(student, layers, Distillation(dtype="float32"))
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


def test_without_dense_layers_there_is_no_teacher(make_trainer):
    module, callback = compressed(make_trainer, LoraRecovery(teacher="dense"))
    callback._second._dense.clear()
    before = values(module)
    with pytest.raises(MisconfigurationException, match="they are not at hand"):
        make_trainer(callback).fit(module, training_loader())
    assert same(values(module), before)
