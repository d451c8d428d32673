from __future__ import annotations

import json
import lzma

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from fasc_lightning.data import _sampling as sampling
from fasc_lightning.data import _windows as data
from fasc_lightning.data import calibration_windows, model_fingerprint, read_text, text_windows, window_loader
from fasc_lightning.data._sampling import sample_windows
from fasc_lightning.data._windows import WindowDataset

VOCABULARY = 24


@pytest.fixture
def tokenizer():
    """Words w0 to w21 after an unknown word and a beginning token."""
    words = {"<unk>": 0, "<bos>": 1, **{f"w{i}": i + 2 for i in range(VOCABULARY - 2)}}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>")


@pytest.fixture
def model():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).double()


def words(start, count):
    return " ".join(f"w{(start + i) % 22}" for i in range(count))


def test_read_text_reads_plain_and_compressed_text(tmp_path):
    text = "One line.\n\nAnother, with ümlauts.\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.txt.xz") == text


def test_read_text_joins_the_rows_of_jsonl(tmp_path):
    rows = [
        {"text": "First.", "prompt": "unused"},
        {"prompt": "2 + 2 is", "completion": "4"},
        {"instruction": "Add.", "input": "", "output": "Done."},
        {"question": "Why?", "answer": "Because.", "id": 3},
    ]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    expected = "First.\n\n2 + 2 is\n4\n\nAdd.\nDone.\n\nWhy?\nBecause."
    assert read_text(tmp_path / "a.jsonl") == read_text(tmp_path / "a.jsonl.xz") == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', r"line 2: expected a text in one of the fields text, .*but got the fields \['body'\]"),
        ("{broken", "line 2: expected one JSON object a line"),
        ("[1]", "line 2: expected a JSON object, but got a list"),
    ],
)
def test_read_text_names_the_bad_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "a.jsonl")


def test_read_text_refuses_unknown_endings_and_missing_files(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"ending in \.txt, \.jsonl"):
        read_text(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="Expected a text file"):
        read_text(tmp_path / "missing.txt")


def test_text_windows_are_consecutive_and_without_special_tokens(tokenizer):
    text = words(0, 50)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert text_windows(text, tokenizer, 3, 7).flatten().tolist() == whole[:21]
    assert text_windows(text, tokenizer, None, 7).shape == (7, 7)


def test_text_windows_of_a_prefix_equal_those_of_the_whole_text(tokenizer, monkeypatch):
    text = "\n".join(words(i, 40) for i in range(400))
    whole = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    lengths = []
    ids = data._ids

    def counted(part, tokenizer):
        lengths.append(len(part))
        return ids(part, tokenizer)

    monkeypatch.setattr(data, "_ids", counted)
    assert torch.equal(text_windows(text, tokenizer, 20, 16), whole[:320].view(20, 16))
    assert max(lengths) < len(text) / 4
    # Long words: the first cut holds too few tokens and has to grow.
    sparse = " ".join(["x" * 60] * 400)
    assert text_windows(sparse, tokenizer, 20, 16).shape == (20, 16)


def test_text_windows_says_how_many_it_supports(tokenizer):
    with pytest.raises(ValueError, match="Expected 9 windows of 8 tokens, but the text has 50 tokens, enough for 6"):
        text_windows(words(0, 50), tokenizer, 9, 8)
    with pytest.raises(ValueError, match="enough for 0"):
        text_windows("", tokenizer, None, 8)
    with pytest.raises(ValueError, match="windows=0"):
        text_windows("w1", tokenizer, 0, 8)


def test_calibration_windows_share_equally_and_shuffle_by_seed(tmp_path, tokenizer):
    sources = []
    for name, word in (("a", "w1"), ("b", "w2"), ("c", "w3")):
        (tmp_path / f"{name}.txt").write_text(f"{word} " * 200)
        sources.append(str(tmp_path / f"{name}.txt"))

    def collect(seed):
        return calibration_windows(sources, tokenizer, windows=11, window=6, seed=seed)

    windows = collect(0)
    assert windows.shape == (11, 6)
    assert windows[:, 0].bincount().tolist()[3:] == [4, 4, 3]
    assert torch.equal(windows, collect(0))
    assert not torch.equal(windows, collect(1))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(windows[:, 0], torch.tensor([3] * 4 + [4] * 4 + [5] * 3)[order])


def test_calibration_windows_reads_a_data_set_folder(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.json").write_text("\n".join(json.dumps({"text": words(i, 30)}) for i in range(9)))
    windows = calibration_windows([str(folder)], tokenizer, windows=4, window=16, seed=0)
    text = "\n\n".join(words(i, 30) for i in range(9))
    assert sorted(windows.tolist()) == sorted(text_windows(text, tokenizer, 4, 16).tolist())


def test_calibration_windows_refuses_what_cannot_work(tmp_path, tokenizer):
    (tmp_path / "short.txt").write_text("w1 w2")
    short = str(tmp_path / "short.txt")
    options = {"windows": 2, "window": 4, "seed": 0}
    with pytest.raises(ValueError, match=r"Calibration source '.*short.txt': Expected 2 windows"):
        calibration_windows([short], tokenizer, **options)
    with pytest.raises(ValueError, match="distinct calibration sources"):
        calibration_windows([short, short], tokenizer, **options)
    with pytest.raises(ValueError, match="distinct calibration sources"):
        calibration_windows([], tokenizer, **options)
    with pytest.raises(ValueError, match="pass `model=`"):
        calibration_windows(["self"], tokenizer, **options)
    with pytest.raises(FileNotFoundError, match="Expected a calibration file"):
        calibration_windows(["missing.jsonl"], tokenizer, **options)


def test_calibration_windows_from_the_model_and_a_file(tmp_path, tokenizer, model, monkeypatch):
    monkeypatch.setenv("FASC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text(words(0, 200))
    sources = [str(tmp_path / "a.txt"), "self"]
    options = {"windows": 5, "window": 8, "seed": 2, "model": model}
    windows = calibration_windows(sources, tokenizer, **options)
    assert (windows[:, 0] == tokenizer.bos_token_id).sum() == 2
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert torch.equal(windows, calibration_windows(sources, tokenizer, cache=False, **options))


def reference_sample(model, first, windows, window, seed):
    """Inverse-distribution sampling by full forward passes, without any cache."""
    uniforms = torch.rand(windows, window - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ids = torch.full((windows, 1), first)
    for step in range(window - 1):
        with torch.no_grad():
            probability = model(ids, use_cache=False).logits[:, -1].softmax(-1)
        drawn = (probability.cumsum(-1) <= uniforms[:, step : step + 1]).sum(-1, keepdim=True)
        ids = torch.cat([ids, drawn], dim=1)
    return ids


@pytest.mark.parametrize("family", ["llama", "gpt2", "sliding", "mamba"])
def test_sample_windows_equals_sampling_without_a_cache(model, tokenizer, family):
    torch.manual_seed(1)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5,
            bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        model = GPT2LMHeadModel(config).double()
    if family == "sliding":
        config = MistralConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, sliding_window=5,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
        )  # fmt: skip
        model = MistralForCausalLM(config).double()
    if family == "mamba":
        config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
        model = MambaForCausalLM(config).double()
    got = sample_windows(model, tokenizer, windows=7, window=20, seed=5, batch_size=3)
    assert torch.equal(got, reference_sample(model.eval(), tokenizer.bos_token_id, 7, 20, 5))


def test_sample_windows_depends_on_nothing_but_model_and_seed(model, tokenizer):
    def sample(seed, batch_size):
        return sample_windows(model, tokenizer, windows=6, window=12, seed=seed, batch_size=batch_size)

    first = sample(0, 6)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, sample(0, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, sample(1, 6))


def test_sample_windows_follow_the_models_distribution(model, tokenizer):
    with torch.no_grad():
        expected = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].softmax(-1)
    count = 4000
    drawn = sample_windows(model, tokenizer, windows=count, window=2, seed=0, batch_size=count)[:, 1]
    observed = drawn.bincount(minlength=VOCABULARY) / count
    # Four standard deviations of a binomial frequency.
    assert ((observed - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt() + 1e-4).all()


def test_sample_windows_restores_the_mode_and_leaves_weights_alone(model, tokenizer):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sample_windows(model, tokenizer, windows=1, window=4, seed=0)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sample_windows_cache_is_keyed_by_model_and_settings(model, tokenizer, tmp_path, monkeypatch):
    def sample(**changes):
        options = {"windows": 3, "window": 6, "seed": 0, "cache_dir": tmp_path}
        return sample_windows(model, tokenizer, **{**options, **changes})

    first = sample()
    sample(seed=1)
    sample(window=7)
    assert len(list(tmp_path.iterdir())) == 3
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_continue", lambda *_: pytest.fail("sampled again"))
        assert torch.equal(sample(), first)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1.5
    assert not torch.equal(sample(), first)
    assert len(list(tmp_path.iterdir())) == 4


def test_sample_windows_in_bfloat16_are_those_of_a_model_in_bfloat16(model, tokenizer, tmp_path):
    model = model.float()
    options = {"windows": 4, "window": 12, "seed": 0, "cache_dir": tmp_path}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = sample_windows(model, tokenizer, **options, dtype=torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    sample_windows(model, tokenizer, **options)
    assert len(list(tmp_path.iterdir())) == 2
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    assert torch.equal(first, sample_windows(model, tokenizer, **{**options, "cache_dir": None}))


def test_model_fingerprint_sees_weights_and_configuration(model):
    first = model_fingerprint(model)
    assert first == model_fingerprint(model)
    model.config.rms_norm_eps = 1e-3
    assert model_fingerprint(model) != first


def test_sample_windows_refuses_what_cannot_work(model, tokenizer):
    with pytest.raises(ValueError, match="window=1"):
        sample_windows(model, tokenizer, windows=1, window=1, seed=0)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite at token 0"):
        sample_windows(model, tokenizer, windows=1, window=3, seed=0)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="beginning or end token"):
        sample_windows(model, tokenizer, windows=1, window=3, seed=0)


def test_window_loader_gives_causal_language_model_batches():
    windows = torch.arange(15).view(5, 3)
    batches = list(window_loader(windows, batch_size=2))
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), windows)
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), windows)
    assert all(batch["attention_mask"].eq(1).all() for batch in batches)


@pytest.mark.parametrize("windows", [torch.zeros(4), torch.zeros(2, 3)])
def test_window_dataset_refuses_other_tensors(windows):
    with pytest.raises(ValueError, match="Expected int64 windows"):
        WindowDataset(windows)
