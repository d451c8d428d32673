from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import transformers
from hub_cases import assert_same, compressed, compressed_with_report, make_truncated
from huggingface_hub import ModelCard
from tiny import causal_model, causal_module, token_loader
from transformers import AutoModelForCausalLM

from fasc_lightning import FascCallback, load_compressed, model_card, save_compressed
from fasc_lightning.layers import compressed_layers, swap_modules
from fasc_lightning.models import attach_config

EVALUATION = {
    "perplexity": {"news": {"dense": 20.5, "compressed": 23.25}, "code": {"dense": 5.0, "compressed": 5.5}},
    "facts": {
        "dense": 40.0,
        "compressed": 38.5,
        "chance": 7.25,
        "count": 650,
        "by_kind": {"geographic": {"dense": 50.0, "compressed": 45.0, "count": 300}},
    },
}


def section(card, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card.text, re.MULTILINE | re.DOTALL)[1]


def table(text):
    """Rows of the first table in a text, as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_header(tmp_path):
    model, report = compressed_with_report()
    model_card(model, report, base_model="some/base-1.0", licence="mit", evaluation=EVALUATION).save(tmp_path / "card")
    data = ModelCard.load(tmp_path / "card").data.to_dict()
    assert data.pop("model-index")
    assert data == {
        "base_model": "some/base-1.0",
        "library_name": "transformers",
        "license": "mit",
        "metrics": ["perplexity", "accuracy"],
        "pipeline_tag": "text-generation",
        "tags": ["fasc", "low-rank", "compression"],
    }


def test_how_it_was_made():
    model, report = compressed_with_report()
    made = section(
        model_card(model, report, base_model="some/base", licence="mit", calibration=["news", "a/b"]), "How it was made"
    )
    for line in (
        "* base model: some/base",
        "* licence: mit; the base model's holds for this one",
        "* method: fasc",
        "* budget: keep 0.7, the fraction of the targeted layers' parameters",
        "* allocation, layout: measured, auto",
        "* calibration data: news, a/b; 256 tokens seen by a layer",
        "* seed: 0",
    ):
        assert line in made.splitlines()
    assert re.search(r"^\* refit: .*loss on held-out batches \d\.\d{4} before and \d\.\d{4} after$", made, re.MULTILINE)
    versions = re.search(r"^\* versions: (.*)$", made, re.MULTILINE)[1]
    assert versions == ", ".join(f"{name} {version}" for name, version in report.versions.items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 0.5, "keep": None}, r"rank 0\.5 \(as a fraction of full rank\)"),
        ({"rank": 12, "keep": None}, r"rank 12 \(absolute\)"),
    ],
)
def test_budgets(options, told):
    model, report = compressed_with_report()
    report = replace(report, options={**report.options, **options}, refit=None)
    made = section(model_card(model, report), "How it was made")
    assert re.search(rf"^\* budget: {told}, the parameters of uniform matrices", made, re.MULTILINE)
    assert "* refit: none" in made.splitlines()


def test_perplexity_facts_and_sizes():
    model, report = compressed_with_report()
    card = model_card(model, report, evaluation=EVALUATION)
    assert table(section(card, "What it costs")) == [
        ["", "dense", "compressed"],
        ["perplexity of news", "20.50", "23.25"],
        ["perplexity of code", "5.00", "5.50"],
        ["facts recalled, chance 7.2 %", "40.0 %", "38.5 %"],
        ["facts: geographic", "50.0 %", "45.0 %"],
    ]
    rows = {row[0]: row[1:] for row in table(section(card, "What it saves"))}
    dense, small = report.whole["dense"], report.whole["compressed"]
    assert rows["whole model, parameters"] == [
        f"{dense.parameters:,}",
        f"{small.parameters:,}",
        f"{small.parameters / dense.parameters:.1%}",
    ]
    assert rows["targeted layers, parameters"][2] == f"{report.kept:.1%}"
    assert rows["whole model, MB"][:2] == [f"{size.bytes / 1e6:.1f}" for size in (dense, small)]
    assert len(rows) == 7


def test_further_states_are_shown_where_they_were_measured():
    model, report = compressed_with_report()
    results = {"perplexity": {"news": {"dense": 2.0, "compressed": 4.0}, "code": {"dense": 1.0, "recovered": 3.0}}}
    assert table(section(model_card(model, report, evaluation=results), "What it costs")) == [
        ["", "dense", "compressed", "recovered"],
        ["perplexity of news", "2.00", "4.00", ""],
        ["perplexity of code", "1.00", "", "3.00"],
    ]
    assert "What it costs" not in model_card(model, report).text


def test_the_model_index_holds_the_compressed_model(tmp_path):
    model, report = compressed_with_report()
    results = {
        "perplexity": {**EVALUATION["perplexity"], "code": {"dense": 5.0, "compressed": 5.5, "recovered": 4.5}},
        "held_out": {"dense": 3.0, "compressed": 4.0},
        "divergence": {"news": {"compressed": 0.125}},
        "facts": EVALUATION["facts"],
        "minimal_pairs": {"dense": 80, "compressed": 75, "count": 40},
    }
    model_card(model, report, base_model="some/base", evaluation=results).save(tmp_path / "card")
    data = ModelCard.load(tmp_path / "card").data
    assert data.model_name == "some/base, compressed"
    assert data.metrics == ["perplexity", "kl_divergence", "accuracy"]
    found = {(row.dataset_name, row.metric_type): row for row in data.eval_results}
    assert {key: row.metric_value for key, row in found.items()} == {
        ("news", "perplexity"): 23.25,
        ("code", "perplexity"): 4.5,
        ("held-out data", "perplexity"): 4.0,
        ("news", "kl_divergence"): 0.125,
        ("facts", "accuracy"): 38.5,
        ("facts: geographic", "accuracy"): 45.0,
        ("minimal_pairs", "accuracy"): 75.0,
    }
    facts, kind = found["facts", "accuracy"], found["facts: geographic", "accuracy"]
    assert (facts.task_type, facts.dataset_args, facts.metric_args) == (
        "text-generation",
        {"count": 650},
        {"chance": 7.25},
    )
    assert (kind.dataset_type, kind.dataset_config, kind.dataset_args) == ("facts", "geographic", {"count": 300})
    # The table has all states.
    rows = table(section(ModelCard.load(tmp_path / "card"), "What it costs"))
    assert ["perplexity of held-out data", "3.00", "4.00", ""] in rows
    assert ["KL on news, nats a token", "", "0.1250", ""] in rows
    assert ["minimal pairs", "80.0 %", "75.0 %", ""] in rows


@pytest.mark.parametrize(
    "results", [{}, {"perplexity": {"news": {"dense": 2.0}, "code": {"dense": 2.0, "compressed": math.inf}}}]
)
def test_no_index_without_figures_of_this_model(results):
    model, report = compressed_with_report()
    data = model_card(model, report, evaluation=results).data
    assert not {"model-index", "metrics"} & data.to_dict().keys()


def test_layers_and_rho():
    model, report = compressed_with_report()
    layers = [
        replace(report.layers[0], rho=0.25, rho_null=math.nan, rho_debiased=-0.0625, loss=2e-7),
        *report.layers[1:],
    ]
    # One that stayed dense is held in no layer of low rank.
    swap_modules(model, {layers[1].name: model.get_submodule(layers[1].name).to_linear()})
    layers[1] = replace(layers[1], layout="dense")
    text = section(model_card(model, replace(report, layers=layers)), "Layers")
    dense = [f"`{row.name}`" for row in layers if row.layout == "dense"]
    assert len(dense) > 1
    assert f"Targeted, but kept dense: {', '.join(dense)}." in text
    header, first, second, *rest = table(text)
    assert header == ["layer", "shape", "rank", "stored as", "tokens", "rho", "rho null", "rho debiased", "loss"]
    assert first == [layers[0].name, "32 x 32", str(layers[0].rank), "pivot", "256", "0.250", "-", "-0.062", "2.0e-07"]
    assert second[:4] == [layers[1].name, "16 x 32", str(layers[1].rank), "dense"]
    assert len(rest) == len(layers) - 2
    compressed_only = replace(report, layers=[row for row in report.layers if row.layout != "dense"])
    assert "kept dense: none." in model_card(compressed(), compressed_only).text


def test_the_json_of_a_report_serves_as_well():
    model, report = compressed_with_report()
    written = json.loads(json.dumps({**report.to_dict(), **EVALUATION}))
    assert str(model_card(model, written)) == str(model_card(model, report, evaluation=EVALUATION))
    recipe = {"calibration": ["self", "/data/my/news.txt", "a/b"], "windows": 64, "window": 512}
    written["options"] |= recipe
    text = model_card(model, written).text
    assert "calibration data: text sampled from the model itself, news.txt, a/b; 64 windows of 512 tokens; 256" in text


def test_a_report_of_a_fit_names_layers_as_the_model_does(make_trainer):
    module, callback = causal_module(), FascCallback(rank=0.5, seed=3)
    make_trainer(callback).fit(module, token_loader(samples=16))
    assert callback.report.layers[0].name == "model.model.layers.0.self_attn.q_proj"
    card = model_card(module.model, callback.report)
    assert table(section(card, "Layers"))[1][0] == "model.layers.0.self_attn.q_proj"
    assert "* seed: 3" in card.text
    # Without the report the model still knows how it was made.
    bare = model_card(module.model)
    for line in ("* method: fasc", "* seed: 3", "* calibration data: not stated", "* refit: auto"):
        assert line in section(bare, "How it was made").splitlines()
    assert "rank 0.5 (as a fraction of full rank)" in bare.text
    rows = table(section(bare, "Layers"))
    assert rows[0] == ["layer", "shape", "rank", "stored as"]
    assert {row[0] for row in rows[1:]} == set(compressed_layers(module.model))


def test_reports_of_other_models_are_refused():
    model, report = compressed_with_report()
    first = report.layers[0]
    for layers, told in (
        (
            [replace(first, rank=first.rank + 1), *report.layers[1:]],
            f"'{first.name}' and 0 .*rank {first.rank} in the m",
        ),
        (report.layers[1:], f"'{first.name}' and 0 .*rank {first.rank} in the model, no such layer in the report"),
        ([*report.layers, replace(first, name="a.b")], "'a.b' and 0 .*no such layer in the model, rank"),
    ):
        with pytest.raises(ValueError, match=told):
            model_card(model, replace(report, layers=layers))
    with pytest.raises(ValueError, match="LlamaForCausalLM is dense"):
        model_card(causal_model(), report)


def test_a_base_model_in_a_folder(tmp_path):
    base = tmp_path / "my-base"
    causal_model().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: llama3\n---\n# A model\n")
    model = AutoModelForCausalLM.from_pretrained(base)
    name = "model.layers.0.mlp.up_proj"
    swap_modules(model, {name: make_truncated(model.get_submodule(name))})
    attach_config(model, method="svd")
    for given in ({}, {"base_model": str(base)}):
        card = model_card(model, **given)
        assert card.data.license == "llama3"
        assert card.data.base_model is None  # only a hub id can be followed
        assert "# my-base, compressed" in card.text
        assert str(tmp_path) not in str(card)
    assert model_card(model, licence="mit").data.license == "mit"
    assert model_card(model, license="mit").data.license == "mit"
    with pytest.raises(ValueError, match="`licence` or `license`"):
        save_compressed(model, tmp_path / "small", licence="mit", license="apache-2.0")
    assert not (tmp_path / "small").exists()
    # Saved again after a reload, it still says what it was made from.
    save_compressed(model, tmp_path / "small")
    save_compressed(load_compressed(tmp_path / "small"), tmp_path / "again")
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert card.data.license == "llama3"
    assert "* base model: my-base" in card.text


@pytest.mark.parametrize("readme", ["# No header\n", "---\n- a list\n---\n", "---\nlicense: [\n---\n", "\xff"])
def test_readmes_that_state_no_licence(tmp_path, readme, caplog):
    (tmp_path / "README.md").write_bytes(readme.encode("latin-1"))
    card = model_card(compressed(), base_model=str(tmp_path))
    assert card.data.license is None
    assert "* licence: not stated; the base model's holds for this one" in card.text


def test_the_code_in_the_card_loads_the_model(tmp_path):
    model = compressed()
    save_compressed(model, tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code.replace('"..."', repr(str(tmp_path))), names)
    assert_same(names["model"], model)


def test_other_heads_are_loaded_by_their_classes():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    for name, task in (
        ("SequenceClassification", "text-classification"),
        ("TokenClassification", "token-classification"),
        ("MaskedLM", "fill-mask"),
        ("NextSentencePrediction", None),
    ):
        model = getattr(transformers, f"BertFor{name}")(config)
        layer = "bert.encoder.layer.0.intermediate.dense"
        swap_modules(model, {layer: make_truncated(model.get_submodule(layer))})
        card = model_card(model)
        assert card.data.pipeline_tag == task
        assert f"import AutoModel{f'For{name}' if task else ''}\n" in card.text
        assert "A compressed BertFor" in card.text
