from __future__ import annotations

import copy
import logging
import warnings

import lightning.pytorch as pl
import pytest
import torch
from expert_cases import make
from probe_cases import Counting, Masked, Product, Transposed, variants
from tiny import VOCABULARY, Classifier, Tokens, causal_model, feature_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear

from fasc_lightning import (
    Calibration,
    FascCallback,
    compress,
    load_compressed,
    match_checkpoint,
    save_compressed,
    score,
    to_dense,
)
from fasc_lightning.layers import (
    LowRankLinear,
    TargetedLayers,
    compressed_layers,
    select_layers,
    swap_modules,
    target_layers,
)
from fasc_lightning.layers._swap import _dense
from fasc_lightning.layers._targets import other_layers, warn_tied_layers
from fasc_lightning.models import apply_plan, quantize

Tripled = variants()[0]
MLP = ("gate_proj", "up_proj", "down_proj")


def falcon() -> FalconForCausalLM:
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        alibi=False,
        bias=True,
    )
    return FalconForCausalLM(config).eval()


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    ids = Tokens(samples=4 * count).input_ids
    return [{"input_ids": part} for part in ids.split(4)]


def fit(module: nn.Module, callback: FascCallback, loader: DataLoader | None = None) -> None:
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    trainer.fit(module, feature_loader() if loader is None else loader)


def test_falcon_is_compressed_saved_and_loaded(tmp_path):
    model = falcon()
    dense = copy.deepcopy(model)
    report = compress(model, batches(), keep=0.7, progress=False)
    assert len(report.layers) == 8
    assert len(compressed_layers(model)) == 8
    assert report.kept <= 0.7
    ids = batches()[0]["input_ids"]
    save_compressed(model, tmp_path / "compressed", report=report)
    loaded = load_compressed(tmp_path / "compressed")
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(loaded(ids).logits, logits)
        for found in (model, loaded):
            to_dense(found)
            assert all(type(found.get_submodule(layer.name)) is FalconLinear for layer in report.layers)
            torch.testing.assert_close(found(ids).logits, logits, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "dense")
    again = FalconForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, logits, rtol=1e-4, atol=1e-5)
    replaced = apply_plan(dense, report.plan)
    assert len(replaced) == 8


def test_at_full_rank_subclasses_give_what_they_gave():
    module = Classifier(nn.Sequential(Product(12, 24), nn.ReLU(), Counting(24, 16), nn.ReLU(), Transposed(3, 16)))
    x = next(iter(feature_loader()))[0]
    expected = module.net(x).detach()
    callback = FascCallback(rank=1.0, layout="factors", align=1, update_weights=False, allocation="uniform")
    fit(module, callback)
    assert len(callback.report.layers) == 3
    torch.testing.assert_close(module.net(x), expected, rtol=1e-4, atol=1e-5)


def test_layers_of_other_forwards_are_named_once():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 0.5 * super().forward(x)

    module = Classifier(nn.Sequential(nn.Linear(12, 24), nn.ReLU(), Tripled(24, 24), Scaled(24, 16), nn.Linear(16, 3)))
    with pytest.warns(
        UserWarning, match=r"2 linear layers of other classes.*Tripled: net\.2; Scaled: net\.3"
    ) as caught:
        fit(module, FascCallback(keep=0.6))
    assert sum("Tripled" in str(warning.message) for warning in caught) == 1
    assert set(compressed_layers(module)) <= {"net.0", "net.4"}
    with pytest.warns(UserWarning, match="Tripled"):
        score(module, feature_loader(), tokens=16)


def test_excluded_and_unasked_layers_are_not_named():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Tripled(4, 4), "c": Tripled(4, 4)})
    assert other_layers(model) == {"Tripled": ["b", "c"]}
    assert other_layers(model, exclude=["b"]) == {"Tripled": ["c"]}
    assert other_layers(model, targets=["a"]) == {}
    assert other_layers(model, targets=["a", "c"]) == {"Tripled": ["c"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["down_proj", "q_porj"]}, r"pattern of `exclude` .*'q_porj' matches no module.* Nearest: q_proj"),
        ({"targets": ["down_proj", "mlp.up_poj"]}, r"pattern of `targets` .*'mlp.up_poj' .* Nearest: mlp.up_proj"),
        ({"exclude": r".*\.q_porj"}, r"`exclude` .* matches no module.* Nearest: q_proj"),
        ({"exclude": "q_proj"}, r"`exclude` .*'q_proj' matches no module.* A string is a regular expression for the"),
        ({"exclude": ["zzzzzz"]}, r"Nearest: model\.layers\.0\.self_attn\.q_proj, "),
        ({"exclude": ["mlp"]}, r"'mlp' matches model.layers.0.mlp, .* not the layers inside.* HINT: r'\.\*\\bmlp"),
        ({"targets": ["q_proj", "mlp"]}, r"`targets` .*'mlp' matches .* and not the layers inside"),
    ],
)
def test_a_pattern_without_a_match_is_refused(options, message):
    model = causal_model()
    for choose in (select_layers, target_layers, lambda model, **options: quantize(model, "int8", **options)):
        with pytest.raises(ValueError, match=message):
            choose(model, **options)


@pytest.mark.parametrize(
    "exclude",
    [["embed_tokens"], ["lm_head", "norm"], r".*norm", ("q_proj",), {"q_proj"}, r".*\bmlp\..*", ["mlp", *MLP], []],
)
def test_a_pattern_of_any_module_is_no_mistake(exclude):
    layers = select_layers(causal_model(), exclude=exclude)
    assert layers
    assert any("mlp" in name for name in layers) == ("mlp" not in str(exclude))


def test_patterns_of_experts_and_of_other_classes_are_known():
    experts = make("mixtral")
    names = [name for name in select_layers(experts) if "experts.0" in name]
    assert names
    assert not set(names) & set(select_layers(experts, exclude=names))
    with pytest.raises(ValueError, match=r"'experts' matches .* and not the layers inside"):
        select_layers(experts, exclude=["experts"])
    assert select_layers(falcon(), targets=["query_key_value", "dense"], exclude=["word_embeddings"])


def test_ordinary_subclasses_are_not_named():
    class TopKRouter(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1), None

    class Packed(nn.Linear):
        def __init__(self, n, m):
            super().__init__(n, m)
            self.weight = nn.Parameter(torch.zeros(n * m // 2, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            raise NotImplementedError

    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(8, 2), "router": TopKRouter(8, 4), "packed": Packed(8, 4)}
    )
    assert other_layers(model) == {}
    assert set(other_layers(model, targets=["router", "packed"])) == {"TopKRouter", "Packed"}
    for family in ("llama", "gpt2"):
        assert other_layers(causal_model(family)) == {}


def test_a_model_of_other_layers_alone_is_refused_by_name():
    with pytest.raises(ValueError, match=r"matches none of the 0 .*2 linear layers of another class.*Tripled: 0, 1"):
        select_layers(nn.Sequential(Tripled(4, 4), Tripled(4, 4)))


def test_a_dense_checkpoint_gives_the_class_back():
    """With the state beside the weights, of which the compressed layer has none."""
    module = Classifier(nn.Sequential(Masked(12, 24), nn.ReLU(), nn.Linear(24, 3)))
    state = copy.deepcopy(module.state_dict())
    assert "net.0.mask" in state
    x = next(iter(feature_loader()))[0]
    expected = module.net(x).detach()
    fit(module, FascCallback(keep=0.5, allocation="uniform", update_weights=False))
    assert "net.0" in compressed_layers(module)
    again = copy.deepcopy(module)
    with pytest.warns(UserWarning, match="is dense now"):
        match_checkpoint(module, {"state_dict": state})
    module.load_state_dict(state)
    assert type(module.net[0]) is Masked
    torch.testing.assert_close(module.net(x), expected, rtol=0, atol=0)
    quantize(again, targets=["0"])
    to_dense(again)
    assert type(again.net[0]) is Masked
    assert torch.equal(again.net[0].mask, state["net.0.mask"])


def test_unknown_buffers_are_not_given_back():
    model = nn.Sequential(Masked(6, 5)).to("meta")
    swap_modules(model, {"0": LowRankLinear(6, 5, 2)})
    assert type(swap_modules(model, {"0": _dense(model[0])})["0"]) is LowRankLinear
    assert type(model[0]) is nn.Linear


# Tied weights.


def test_naming_one_of_two_tied_layers_warns_with_figures():
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5), "c": nn.Linear(6, 5)})
    model["b"].weight = model["a"].weight
    with pytest.warns(UserWarning, match=r"a, b share one weight of 30 .* b is to be .* a keeps it.* 30 numbers more"):
        warn_tied_layers(model, select_layers(model, ["b"]))
    with pytest.warns(UserWarning, match=r"a, b are to be .* each gets its own factors.* 60 numbers in its place"):
        warn_tied_layers(model, select_layers(model, ["a", "b"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_tied_layers(model, select_layers(model))


def test_a_fit_that_names_a_tied_head_warns_and_the_report_tells():
    model = causal_model("llama", tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=r"share one weight of 2,048 .* model\.model\.embed_tokens keeps it"):
        report = compress(model, batches(), keep=0.5, targets=["lm_head"], progress=False)
    assert report.whole["compressed"].parameters > report.whole["dense"].parameters


def test_the_record_of_targeted_layers_holds_modules_and_shapes_of_all_and_of_a_share():
    model = causal_model()
    layers = target_layers(model, ["q_proj", "down_proj"], None, compresses=False)
    assert layers.modules == select_layers(model, ["q_proj", "down_proj"])
    assert layers.shapes == {name: tuple(module.weight.shape) for name, module in layers.modules.items()}
    assert layers.weights == sum(module.weight.numel() for module in layers.modules.values())
    names = list(layers.modules)[::-1][:2]
    share = layers.share(names)
    assert list(share.modules) == list(share.shapes) == names
    assert share == TargetedLayers.of({name: layers.modules[name] for name in names})


class Encoder(nn.Module):
    """Attention of torch, whose output projection is read and never called, a convolution and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(6, 16, 3, padding=1)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x).mT)).mean(1)


def test_the_projection_that_attention_reads_is_left_out():
    model = Encoder()
    assert list(select_layers(model)) == ["block.linear1", "block.linear2", "head"]
    with pytest.raises(ValueError, match="matches none"):
        select_layers(model, ["out_proj"])

    class Calling(nn.MultiheadAttention):
        def forward(self, x):
            return self.out_proj(x)

    assert list(select_layers(Calling(8, 2))) == ["out_proj"]


def test_what_stays_dense_is_said_in_one_line(caplog):
    caplog.set_level(logging.INFO)
    model = nn.ModuleDict({"encoder": Encoder(), "memory": nn.LSTM(4, 4), "pair": nn.Bilinear(2, 2, 2)})
    target_layers(model)
    (line,) = [record.getMessage() for record in caplog.records if "Dense stay" in record.getMessage()]
    total = sum(p.numel() for p in model.parameters())
    share = sum(p.numel() for p in model["encoder"].stem.parameters()) / total
    assert (
        f"Dense stay 1 convolution (encoder.stem; {share:.1%} of the parameters); 1 recurrent module (memory;" in line
    )
    assert "1 bilinear layer (pair;" in line
    assert "1 nn.MultiheadAttention module (encoder.block.self_attn;" in line
    assert "parameters), whose projections are read and never called." in line
    caplog.clear()
    target_layers(nn.Sequential(nn.Linear(3, 3)))
    assert "Dense stay" not in caplog.text


@pytest.mark.parametrize("options", [{"keep": 0.8}, {"monitor": 1}])
def test_lazy_layers_without_weights_are_refused_with_the_remedy(options):
    module = Classifier(nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 3)))
    with pytest.raises(ValueError, match=r"1 lazy layer has none yet: net\.0\. HINT: run the model once on a batch"):
        fit(module, FascCallback(**options))
    with torch.no_grad():
        module(torch.randn(2, 12))
    fit(module, FascCallback(**options))


def test_an_encoder_of_torch_compresses_without_its_read_projection():
    module = Classifier(Encoder())
    callback = FascCallback(keep=0.7, calibration=Calibration(update_weights=False))
    fit(module, callback, feature_loader((6, 8)))
    assert {layer.name for layer in callback.report.layers} == {"net.block.linear1", "net.block.linear2", "net.head"}
    assert callback.report.kept <= 0.7
    x = torch.randn(4, 6, 8)
    with torch.no_grad():  # torch's fast path reads the weights of the low-rank layers, too
        fast = module.eval()(x)
        torch.testing.assert_close(fast, module.train()(x), rtol=1e-4, atol=1e-5)
