"""Compressed models on a hub, by transformers' and huggingface_hub's own ways to upload them."""

from __future__ import annotations

import pytest
from hub_cases import assert_same, compressed_with_report, logits
from huggingface_hub import ModelCard, upload_folder
from local_hub import local_hub
from tiny import byte_tokenizer, causal_model, token_loader
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasc_lightning import compress, load_compressed, model_card, save_compressed, to_dense

REPOSITORY = "me/small"
EVALUATION = {"perplexity": {"news": {"dense": 20.5, "compressed": 23.25}}}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with local_hub(monkeypatch, tmp_path / "cache") as served:
        yield served


def rounded(quantize):
    model = causal_model().eval()
    return model, compress(model, list(token_loader(samples=16)), quantize=quantize, progress=False)


#: Makes a model and its report; the tags that tell how it is held.
MODELS = {
    "ranks": (compressed_with_report, ["low-rank"]),
    "int8": (lambda: rounded("int8"), ["quantization"]),
    "few bits": (lambda: rounded("int4"), ["quantization"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_pushed_models_reload_and_have_cards(hub, kind):
    make, tags = MODELS[kind]
    model, report = make()
    model.push_to_hub(REPOSITORY)
    assert set(hub.files[REPOSITORY]) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    for load in (load_compressed, AutoModelForCausalLM.from_pretrained):
        assert_same(load(REPOSITORY), model)
    tags = ["fasc", *tags, "compression"]
    assert ModelCard.load(REPOSITORY).data.tags == tags

    # The card of the report takes the place of transformers' empty one, and later pushes keep it.
    model_card(model, report, license="mit", evaluation=EVALUATION).push_to_hub(REPOSITORY)
    written = hub.files[REPOSITORY]["README.md"]
    load_compressed(REPOSITORY).push_to_hub(REPOSITORY, commit_message="again")
    byte_tokenizer().push_to_hub(REPOSITORY)
    assert hub.files[REPOSITORY]["README.md"] == written
    data = ModelCard.load(REPOSITORY).data
    assert (data.license, data.tags) == ("mit", tags)
    assert [(found.dataset_name, found.metric_value) for found in data.eval_results] == [("news", 23.25)]
    assert AutoTokenizer.from_pretrained(REPOSITORY)("a").input_ids == byte_tokenizer()("a").input_ids


@pytest.mark.parametrize("kind", MODELS)
def test_folders_are_uploaded_as_they_are(hub, tmp_path, kind):
    model, report = MODELS[kind][0]()
    folder = save_compressed(
        model, tmp_path / "small", report=report, tokenizer=byte_tokenizer(), evaluation=EVALUATION
    )
    hub.files[REPOSITORY] = {}
    upload_folder(folder_path=folder, repo_id=REPOSITORY)
    assert hub.files[REPOSITORY] == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert logits(load_compressed(REPOSITORY)).equal(logits(load_compressed(folder)))
    assert AutoTokenizer.from_pretrained(REPOSITORY)("a").input_ids == byte_tokenizer()("a").input_ids


def test_save_pretrained_pushes_too(hub, tmp_path):
    model, report = compressed_with_report()
    model.save_pretrained(tmp_path / "small", push_to_hub=True, repo_id=REPOSITORY)
    assert_same(load_compressed(REPOSITORY), model)
    assert ModelCard.load(REPOSITORY).data.tags == ["fasc", "low-rank", "compression"]
    # The folder's card is the repository's.
    assert (tmp_path / "small" / "README.md").read_bytes() == hub.files[REPOSITORY]["README.md"]
    model_card(model, report).push_to_hub(REPOSITORY)
    model.save_pretrained(tmp_path / "small", push_to_hub=True, repo_id=REPOSITORY)
    assert "## How it was made" in (tmp_path / "small" / "README.md").read_text()
    assert_same(load_compressed(tmp_path / "small"), model)


def test_tags_follow_the_layers():
    model, _ = compressed_with_report()
    model.add_model_tags("mine")
    assert model.model_tags == ["fasc", "low-rank", "compression", "mine"]
    assert to_dense(model).model_tags == ["mine"]
    assert to_dense(compressed_with_report()[0]).model_tags is None
    assert causal_model().model_tags is None
