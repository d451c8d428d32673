from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recovery_cases import batches, compressed, reference, same, training_loader, values
from tiny import Patches, causal_module
from torch import nn

from fasc_lightning import Distillation, FactorRecovery, LoraRecovery
from fasc_lightning.recovery import Teacher, frozen_copy
from fasc_lightning.recovery import _teacher as teacher_module
from fasc_lightning.recovery._divergence import kl_divergence
from fasc_lightning.recovery._teacher import block_error, teacher_bytes

pytest.importorskip("peft", reason="peft is not installed")


# The loss


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
    with pytest.raises(MemoryError, match=r"1\.00 kB is free on cpu\. HINT: .*cache=FOLDER"):
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


def test_without_dense_layers_there_is_no_teacher(make_trainer):
    module, callback = compressed(make_trainer, LoraRecovery(teacher="dense"))
    callback._stage._dense.clear()
    before = values(module)
    with pytest.raises(MisconfigurationException, match="they are not at hand"):
        make_trainer(callback).fit(module, training_loader())
    assert same(values(module), before)
