from __future__ import annotations

import json
import math
import random
import sys
import tempfile

import numpy as np
import pytest
import torch
import yaml
from processes import run_script
from tiny import Tokens, byte_tokenizer, save_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasc_lightning import compress, load_compressed
from fasc_lightning.evaluation.harness import harness_model, run_harness
from fasc_lightning.layers import is_compressed

ITEMS = [
    {"question": f"Is {word}?", "choices": choices}
    for word, choices in [
        ("grass", ["green", "red"]),
        ("snow", ["hot", "cold", "white"]),
        ("sky", ["blue", "low", "wet", "far"]),
        ("fire", ["ice", "burns"]),
        ("the sea", ["salt", "sweet", "dry", "flat"]),
        ("night", ["dark", "day"]),
    ]
]


@pytest.fixture
def folder(tmp_path):
    save_model_folder(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    return model, AutoTokenizer.from_pretrained(tmp_path / "model")


def compressed(model):
    ids = Tokens(samples=16, length=24).input_ids
    compress(model, [{"input_ids": ids[i : i + 4]} for i in range(0, 16, 4)], keep=0.6, progress=False)
    assert is_compressed(model)
    return model


def reloaded(model):
    with tempfile.TemporaryDirectory() as folder:
        compressed(model).save_pretrained(folder)
        return load_compressed(folder)


def choice_scores(model, tokenizer, item):
    """Log-probability of each choice after the question, one plain forward pass each."""
    prompt = tokenizer(item["question"])["input_ids"]
    scores = []
    for choice in item["choices"]:
        ids = tokenizer(" " + choice)["input_ids"]
        with torch.no_grad():
            log_prob = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
        scores.append(sum(log_prob[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids)))
    return scores


def write_task(path, items, name="colours", **settings):
    """A multiple-choice task over a local jsonl file; returns its configuration and the path of its YAML file."""
    path.mkdir(exist_ok=True)
    data = path / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 3.0},
        **settings,
    }
    (path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return config, path / f"{name}.yaml"


@pytest.mark.parametrize(
    "prepare", [lambda model: model, compressed, reloaded], ids=["dense", "compressed", "reloaded"]
)
def test_a_local_task_is_scored_as_by_hand(folder, prepare, tmp_path):
    model, tokenizer = folder
    model = prepare(model).train()
    before = list(model.parameters())
    # The model is right on the items whose label is its own favourite: on four of the six here.
    best = [int(np.argmax(choice_scores(model.eval(), tokenizer, item))) for item in ITEMS]
    right = [True, False, True, True, False, True]
    labels = [b if r else (b + 1) % len(i["choices"]) for b, r, i in zip(best, right, ITEMS, strict=True)]
    config, path = write_task(tmp_path / "task", [{**i, "label": n} for i, n in zip(ITEMS, labels, strict=True)])
    model.train()
    states = random.getstate(), torch.get_rng_state()
    result = run_harness(model, tokenizer, [path], batch_size=3)
    score = result.scores["colours"]["acc"]
    assert score.value == pytest.approx(4 / 6)
    assert score.stderr == pytest.approx(np.std(right, ddof=1) / math.sqrt(6))
    assert score.chance == pytest.approx(np.mean([1 / len(item["choices"]) for item in ITEMS]))
    assert score.higher_is_better is True
    assert result.counts == {"colours": 6}
    assert result.num_fewshot == {"colours": 0}
    assert result.versions["colours"] == 3.0
    assert "lm_eval" in result.versions
    # The model is the same object, in the same mode, and the caller's random numbers go on as they would.
    assert model.training
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    json.dumps(result.to_dict())
    # The same task as a dict, and fewer items of it.
    assert run_harness(model, tokenizer, [config]).scores == result.scores
    assert run_harness(model, tokenizer, [config], limit=2).scores["colours"]["acc"].value == 0.5


@pytest.mark.exhaustive  # its parts are tested above, in this process
def test_the_command_of_lm_eval_on_a_saved_folder(folder, tmp_path):
    """As the README has it: lm-eval's own program, with the format registered first."""
    model, tokenizer = folder
    compressed(model).save_pretrained(tmp_path / "compressed")
    tokenizer.save_pretrained(tmp_path / "compressed")
    items = [{**item, "label": i % 2} for i, item in enumerate(ITEMS)]
    config, path = write_task(tmp_path / "task", items)
    program = tmp_path / "program.py"
    program.write_text("import fasc_lightning, lm_eval.__main__ as lm_eval; lm_eval.cli_evaluate()")
    options = f"--model hf --model_args pretrained={tmp_path / 'compressed'},dtype=float32 --device cpu --batch_size 4"
    run_script(program, *options.split(), "--tasks", path, "--output_path", tmp_path, folder=tmp_path)
    (written,) = tmp_path.rglob("results_*.json")
    value = json.loads(written.read_text())["results"]["colours"]["acc,none"]
    assert (
        value
        == run_harness(load_compressed(tmp_path / "compressed"), tokenizer, [config]).scores["colours"]["acc"].value
    )


def test_log_probabilities_are_those_of_the_model(folder):
    from lm_eval.api.instance import Instance

    model, tokenizer = folder
    item = ITEMS[2]
    requests = [
        Instance("loglikelihood", {}, (item["question"], " " + choice), i, metadata=("t", 0, 1))
        for i, choice in enumerate(item["choices"])
    ]
    lm = harness_model(model, tokenizer, batch_size=2, max_length=64)
    assert lm.max_length == 64
    found = [value for value, _ in lm.loglikelihood(requests)]
    assert found == pytest.approx(choice_scores(model, tokenizer, item), rel=1e-5)


@pytest.mark.parametrize("output", ["multiple_choice", "loglikelihood_rolling"])
def test_log_probabilities_that_are_not_finite_raise_with_the_tasks_name(folder, tmp_path, output):
    model, tokenizer = folder
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    settings = (
        {}
        if output == "multiple_choice"
        else {
            "doc_to_choice": None,
            "doc_to_target": "{{question}}",
            "doc_to_text": "",
            "metric_list": [{"metric": "word_perplexity"}],
        }
    )
    items = [{**item, "label": 0} for item in ITEMS]
    config, _ = write_task(tmp_path / "task", items, output_type=output, **settings)
    with pytest.raises(FloatingPointError, match="task 'colours'"):
        run_harness(model, tokenizer, [config])


def test_rolling_perplexity_has_no_chance_level(folder, tmp_path):
    model, tokenizer = folder
    settings = {
        "output_type": "loglikelihood_rolling",
        "doc_to_choice": None,
        "doc_to_target": "{{question}}",
        "doc_to_text": "",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    config, _ = write_task(tmp_path / "task", ITEMS, **settings)
    score = run_harness(model, tokenizer, [config], bootstrap_iters=10).scores["colours"]["byte_perplexity"]
    total = 0.0
    for item in ITEMS:
        ids = [tokenizer.bos_token_id, *tokenizer(item["question"])["input_ids"]]
        with torch.no_grad():
            log_prob = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total += sum(log_prob[i, token].item() for i, token in enumerate(ids[1:]))
    length = sum(len(item["question"].encode()) for item in ITEMS)
    assert score.value == pytest.approx(math.exp(-total / length), rel=1e-4)
    assert score.chance is None


def test_what_is_no_task_is_refused(folder, tmp_path):
    model, tokenizer = folder
    with pytest.raises(ValueError, match="at least one task"):
        run_harness(model, tokenizer, [])
    with pytest.raises(ValueError, match="at least one task"):
        run_harness(model, tokenizer, "arc_easy")
    with pytest.raises(ValueError, match=r"none\.yaml"):
        run_harness(model, tokenizer, [tmp_path / "none.yaml"])


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"fasc-lightning\[eval\]"):
        harness_model(None, byte_tokenizer())
