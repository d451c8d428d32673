from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny import byte_tokenizer, causal_model, token_loader

from fasc_lightning import compress, load_compressed
from fasc_lightning.layers import compressed_layers, swap_to_dense

LAYOUTS = ("pivot", "factors")
PROMPTS = ([7, 21, 30, 5, 11], [9, 4], [40, 41, 42])


def make_model(family, **options):
    """A compressed model whose choices are not close ones, so that rounding does not decide them."""
    model = causal_model(family).eval()
    model.get_output_embeddings().weight.data *= 20
    compress(model, list(token_loader(samples=16)), keep=0.7, refit=False, progress=False, **options)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A compressed model as it is in memory, reloaded from a folder, and made dense."""
    made = {}

    def get(family="llama", layout="pivot", quantize=None):
        key = (family, layout, quantize)
        if key not in made:
            model = make_model(family, layout=layout, quantize=quantize)
            assert compressed_layers(model)
            folder = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder)
            dense = copy.deepcopy(model)
            swap_to_dense(dense)
            made[key] = model, load_compressed(folder), dense
        return made[key]

    return get


def generate(model, ids, mask=None, **options):
    """Ten new tokens, and the scores they were chosen by."""
    ids = torch.as_tensor(ids)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        **{"min_new_tokens": 10, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **options},
        return_dict_in_generate=True,
        output_scores=True,
    )
    return output.sequences, torch.stack(output.scores)


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2"])
def test_greedy_batches_with_a_cache_are_those_of_the_dense_model(models, family, layout):
    model, reloaded, dense = models(family, layout)
    ids, mask = left_padded(PROMPTS)
    tokens, scores = generate(dense, ids, mask)
    for compressed in (model, reloaded):
        got, got_scores = generate(compressed, ids, mask)
        assert torch.equal(got, tokens)
        torch.testing.assert_close(got_scores, scores, rtol=1e-4, atol=1e-4)
    assert len({tuple(row) for row in tokens[:, ids.shape[1] :].tolist()}) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cache_changes_nothing(models, layout):
    for model in models("llama", layout)[:2]:
        ids, mask = left_padded(PROMPTS)
        cached, scores = generate(model, ids, mask)
        for options in ({"use_cache": False}, {"cache_implementation": "static"}):
            tokens, other = generate(model, ids, mask, **options)
            assert torch.equal(tokens, cached)
            torch.testing.assert_close(other, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_left_padding_in_a_batch_changes_no_prompt(models, layout):
    for model in models("llama", layout)[:2]:
        ids, mask = left_padded(PROMPTS)
        together, _ = generate(model, ids, mask)
        for row, prompt in zip(together, PROMPTS, strict=True):
            alone, _ = generate(model, [prompt])
            assert row[-len(alone[0]) :].tolist() == alone[0].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [{"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5}]
)
def test_beams_are_those_of_the_dense_model(models, layout, options):
    model, reloaded, dense = models("llama", layout)
    ids, mask = left_padded(PROMPTS)
    tokens, _ = generate(dense, ids, mask, **options)
    for compressed in (model, reloaded):
        assert torch.equal(generate(compressed, ids, mask, **options)[0], tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_are_those_of_the_dense_model(models, layout):
    model, reloaded, dense = models("llama", layout)
    sampled = []
    for each in (dense, model, reloaded):
        torch.manual_seed(3)
        sampled.append(generate(each, [[9, 4]] * 4, do_sample=True, temperature=0.8, top_k=20)[0])
    assert torch.equal(sampled[1], sampled[0])
    assert torch.equal(sampled[2], sampled[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantised_models_generate_as_their_dense_ones(models, layout):
    model, reloaded, dense = models("llama", layout, "int8")
    ids, mask = left_padded(PROMPTS)
    tokens, _ = generate(dense, ids, mask)
    for compressed in (model, reloaded):
        assert torch.equal(generate(compressed, ids, mask)[0], tokens)


def test_dynamic_quantisation_generates_in_batches(models):
    """A token is rounded by itself, so that neither batch nor padding change it."""
    model, reloaded, _ = models("llama", "pivot", "int8-dynamic")
    ids, mask = left_padded(PROMPTS)
    together, _ = generate(model, ids, mask)
    assert torch.equal(generate(reloaded, ids, mask)[0], together)
    for row, prompt in zip(together, PROMPTS, strict=True):
        assert row[-len(prompt) - 10 :].tolist() == generate(model, [prompt])[0][0].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_generates_with_a_cache(layout):
    model = make_model("llama", layout=layout).to(torch.bfloat16)
    ids, mask = left_padded(PROMPTS)
    tokens, scores = generate(model, ids, mask)
    assert torch.isfinite(scores[scores > float("-inf")]).all()
    # The first choice is made by the prompt alone, in one pass.
    with torch.no_grad():
        first = model(ids, attention_mask=mask).logits[:, -1]
    chosen = scores[0].float().where(scores[0] > float("-inf"), first.float())
    torch.testing.assert_close(chosen, first.float(), rtol=0.02, atol=0.02)
    assert tokens.shape == (3, ids.shape[1] + 10)


def test_a_pipeline_of_a_reloaded_folder(tmp_path):
    tokenizer = byte_tokenizer()
    model = causal_model("llama", vocab_size=len(tokenizer), max_position_embeddings=128).eval()
    compress(model, list(token_loader(samples=16)), keep=0.7, refit=False, progress=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = transformers.pipeline(
        "text-generation",
        model=load_compressed(tmp_path),
        tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path),
    )
    options = transformers.GenerationConfig(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    texts = pipe(["The sea is", "Snow"], batch_size=2, generation_config=options, return_full_text=False)
    ids = tokenizer("The sea is", return_tensors="pt")
    expected = model.generate(**ids, generation_config=options)[0, ids["input_ids"].shape[1] :]
    assert texts[0][0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(texts) == 2
