from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from tiny import VOCABULARY, Classifier, Tokens, causal_model, causal_module
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, LlamaConfig

from fasc_lightning import FactorRecovery, compress, recover, score
from fasc_lightning._run_fit import as_loader
from fasc_lightning.batches import as_token_batch, check_token_ids
from fasc_lightning.layers import compressed_layers

QUICK = {"keep": 0.7, "refit": False, "allocation": "fisher", "progress": False}
IDS = Tokens(samples=8, length=12).input_ids


def plan(data, model=None):
    model = causal_model() if model is None else model
    return compress(model, data, **QUICK).plan


@pytest.fixture(scope="module")
def expected():
    """Of eight batches of one sequence each."""
    return plan([{"input_ids": row[None]} for row in IDS])


def test_batches_in_order_pass_as_they_are():
    batch = BatchEncoding({"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "num_items_in_batch": 7})
    assert as_token_batch(batch) is batch


@pytest.mark.parametrize(
    "form",
    [
        lambda row: {"input_ids": row.tolist()},
        lambda row: {"input_ids": [row.tolist()], "attention_mask": [[1] * 12]},
        lambda row: {"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones(12, dtype=torch.long)},
        lambda row: {"input_ids": tuple(row.tolist())},
        lambda row: {"input_ids": row},
        lambda row: {"input_ids": row.numpy().astype(np.uint16)[None]},
        lambda row: {"input_ids": row.numpy(), "text": "left out", "labels": None},
        lambda row: BatchEncoding({"input_ids": [row.tolist()], "text": ["left out"]}),
    ],
)
def test_clear_forms_of_a_batch_give_the_same_plan(form, expected):
    data = [form(row) for row in IDS]
    assert plan(data) == expected


def test_dicts_of_lists_are_batches_of_several_sequences():
    batch = as_token_batch({"input_ids": IDS.tolist(), "labels": IDS.tolist(), "num_items_in_batch": 3})
    assert torch.equal(batch["input_ids"], IDS)
    assert batch["input_ids"].dtype == torch.long
    assert batch["labels"].shape == IDS.shape
    assert batch["num_items_in_batch"] == 3


@pytest.mark.parametrize("kind", ["python", "torch", "numpy"])
def test_tokenised_datasets_are_batches_of_one_sequence(kind, expected):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    data = datasets.Dataset.from_dict(
        {
            "text": ["some"] * 8,
            "input_ids": IDS.tolist(),
            "attention_mask": torch.ones_like(IDS).tolist(),
            "id": list(range(8)),
        }
    )
    if kind != "python":
        data.set_format(kind)
    assert plan(data) == expected
    assert plan(data.to_iterable_dataset()) == expected
    assert len(score(causal_model(), data, tokens=16)) == 14
    forecast = compress(causal_model(), data, dry_run=True, **QUICK)
    assert len(forecast.layers) == 14


def test_datasets_that_are_not_tokenised_are_refused():
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    data = datasets.Dataset.from_dict({"text": ["some", "text"], "id": [1, 2]})
    with pytest.raises(TypeError, match=r"a tokenised data set.*got one of id, text\. HINT: dataset\.map"):
        plan(data)
    with pytest.raises(TypeError, match=r"DatasetDict of 'train'\. HINT: give one of its splits"):
        plan(datasets.DatasetDict({"train": data}))


def test_rows_of_other_modules_are_not_touched():
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_dict({"a": [[1, 2], [3, 4]]})
    assert list(as_loader(rows, model=Classifier(nn.Linear(2, 2)))) == [{"a": [1, 2]}, {"a": [3, 4]}]
    assert list(as_loader([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ([1, 2, 3], TypeError, r"mappings with 'input_ids' but got int \(batch 0\)\. HINT: collate"),
        (IDS.tolist(), TypeError, r"mappings with 'input_ids' but got list \(batch 0\)\. HINT: collate"),
        ([IDS], TypeError, r"mappings with 'input_ids' but got Tensor \(batch 0\)\. HINT: collate"),
        ([(IDS, IDS)], TypeError, "but got tuple"),
        ([[]], TypeError, "but got list"),
        (["some text"], TypeError, r"but got str \(batch 0\)\. HINT: tokenise text first"),
        ([{"text": "some text"}], TypeError, r"but got dict of text \(batch 0\)\. HINT: tokenise text first"),
        ([{"input_ids": "some text"}], TypeError, r"'input_ids' of integers.*got str.*HINT: tokenise"),
        ([{"inputs_embeds": torch.zeros(1, 4, 8)}], TypeError, "dict of inputs_embeds.*HINT: wrap the model"),
        ([{"input_ids": IDS}, {"input_ids": [[1, 2], [3]]}], ValueError, r"unequal lengths.*\(batch 1\)\. HINT: pad"),
        ([{"input_ids": [torch.tensor([1, 2]), torch.tensor([3, 4])]}], TypeError, "list of 2 tensors.*set_format"),
        ([{"input_ids": IDS.float()}], TypeError, "of integers.*but got torch.float32"),
        ([{"input_ids": IDS[None]}], ValueError, r"got \(1, 8, 12\) \(batch 0\)"),
        ([{"input_ids": IDS[:, :0]}], ValueError, r"got \(8, 0\)"),
        ([{"input_ids": []}], (TypeError, ValueError), r"'input_ids' of"),
        (
            [{"input_ids": IDS, "labels": IDS[:, 1:]}],
            ValueError,
            r"'labels' of the shape of .*\(8, 12\), but got \(8, 11\)",
        ),
        ([{"input_ids": IDS[0], "attention_mask": IDS[:2]}], ValueError, r"'attention_mask' of the shape"),
        ({"input_ids": IDS}, TypeError, r"one dict: write \[batch\]"),
        (IDS, TypeError, r"one Tensor: write \[batch\]"),
        ("text", TypeError, "one str"),
    ],
)
def test_other_forms_are_refused_before_anything_runs(data, error, match):
    model = causal_model()
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    for work in (lambda: plan(data, model), lambda: score(model, data, tokens=16)):
        with pytest.raises(error, match=match):
            work()
    assert not calls


@pytest.mark.parametrize(("bad", "number"), [(VOCABULARY, 1), (-1, 0), (10**6, 2)])
def test_ids_outside_of_the_vocabulary_are_refused(bad, number):
    model = causal_model()
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    batches = [{"input_ids": IDS.clone()} for _ in range(3)]
    batches[number]["input_ids"][3, 5] = bad
    said = rf"from 0 to {VOCABULARY - 1}, .* of {VOCABULARY} tokens, but got {bad} "
    for data in (batches, iter(batches), [{"input_ids": batch["input_ids"].tolist()} for batch in batches]):
        with pytest.raises(ValueError, match=rf"{said}\(batch {number}\)"):
            compress(model, data, **QUICK)
    assert not calls
    with pytest.raises(ValueError, match=rf"{said}\(a batch\)\. HINT: tokenise with the model's own"):
        compress(model, DataLoader(batches, batch_size=None), **QUICK)
    assert not compressed_layers(model)


def test_ids_of_models_of_more_than_text_are_not_checked():
    model = causal_model()
    model.config.get_text_config = lambda *args, **kwargs: LlamaConfig()
    check_token_ids({"input_ids": IDS + VOCABULARY}, model)
    check_token_ids({"input_ids": IDS + VOCABULARY}, nn.Linear(2, 2))


def test_batches_of_loaders_are_understood_too(expected):
    assert plan(DataLoader([{"input_ids": row.tolist()} for row in IDS], batch_size=None)) == expected
    with pytest.raises(TypeError, match="but got list"):
        plan(DataLoader(TensorDataset(IDS), batch_size=1))
    collated = DataLoader([{"input_ids": row.tolist()} for row in IDS], batch_size=2)  # tokens, not sequences
    with pytest.raises(
        TypeError, match=r"list of 12 tensors \(a batch\): sequences, or, as PyTorch's default collation"
    ):
        plan(collated)


def test_a_trainer_without_the_callback_takes_them_too():
    module = causal_module()
    trainer = pl.Trainer(
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, DataLoader([{"input_ids": row} for row in IDS], batch_size=None))
    assert trainer.global_step == 2
    with pytest.raises(TypeError, match=r"mappings with 'input_ids' but got 'input_ids' of shape \(12,\)"):
        module.training_step({"input_ids": IDS[0]}, 0)


def test_recoveries_take_them_too():
    pytest.importorskip("peft", reason="peft is not installed")
    model = causal_model()
    data = [{"input_ids": ids} for ids in IDS.tolist()]
    options = FactorRecovery(epochs=1)
    report = compress(model, data, recovery=options, **QUICK)
    assert report.recovery["tokens"] == 7 * 12
    assert recover(model, data, options, progress=False)["tokens"] == 7 * 12
