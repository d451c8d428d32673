from __future__ import annotations

import pytest
import torch
from refit_cases import Stack, compressed_case, stack_loss
from tiny import FAMILIES, causal_model, mlp
from torch import nn

from fasc_lightning.layers import make_lowrank, select_layers, swap_modules
from fasc_lightning.refit import RefitError, causal_loss, find_blocks
from fasc_lightning.refit._blocks import BlockRunner
from fasc_lightning.refit._joins import joins_stream


def test_blocks_are_the_list_that_holds_all_layers():
    model = causal_model()
    name, blocks = find_blocks(model, select_layers(model))
    assert name == "model.layers"
    assert blocks is model.model.layers


def test_blocks_compute_nothing_after_the_first_batch():
    case = compressed_case(steps=3)
    ran = []
    handle = case.model.model.layers[0].mlp.register_forward_hook(lambda *args: ran.append(args[0]))
    runner = BlockRunner(case.model, case.dense, case.batches[:4], causal_loss)
    handle.remove()
    assert len(runner.inputs) == 4
    assert len(ran) == 3  # the first batch with compressed layers, and with dense ones by the model and block by block


def test_the_outermost_list_is_taken():
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    model = nn.ModuleList([experts])
    name, blocks = find_blocks(model, ["0.experts.0", "0.experts.1"])
    assert name == ""
    assert blocks is model


def test_models_without_a_stack_of_blocks_are_refused():
    with pytest.raises(RefitError, match=r"blocks form a ModuleList.*Classifier has none"):
        find_blocks(mlp(), ["net.0"])


def test_layers_outside_of_the_blocks_are_refused_by_name():
    model = causal_model()
    with pytest.raises(RefitError, match=r"1 are outside of 'model.layers' \(for example 'lm_head'\)"):
        find_blocks(model, [*select_layers(model), "lm_head"])


def test_encoder_decoders_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(RefitError, match="encoder-decoder"):
        find_blocks(T5ForConditionalGeneration(config), ["decoder.block.0.layer.0.SelfAttention.q"])


def test_a_block_that_is_used_twice_is_refused():
    block = nn.Sequential(nn.Linear(2, 2))
    model = nn.ModuleDict({"blocks": nn.ModuleList([block, block])})
    with pytest.raises(RefitError, match="registered several times"):
        find_blocks(model, ["blocks.0.0"])


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_by_one_are_the_model(family):
    case = compressed_case(family, steps=3)
    runner = BlockRunner(case.model, case.dense, case.batches[:2], causal_loss)
    for batch in range(2):  # no block computes anything while the arguments of the second batch are noted
        ends = []
        handle = runner.blocks[-1].register_forward_hook(lambda module, args, output, ends=ends: ends.append(output))
        runner.loss(batch)
        handle.remove()
        hidden = runner.inputs[batch]
        for block in range(len(runner.blocks)):
            hidden = runner.run(block, batch, hidden)
        torch.testing.assert_close(hidden, ends[0][0] if isinstance(ends[0], tuple) else ends[0])
    assert all(type(block).__name__ != "_Skip" for block in runner.blocks)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]),
        ("gpt2", [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}]),
        ("opt", [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}]),
        ("gpt_neox", [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}]),
    ],
)
def test_groups_share_an_input_and_come_in_order_of_execution(family, expected):
    case = compressed_case(family, steps=3, layout="factors", rank=0.3)
    runner = BlockRunner(case.model, case.dense, case.batches[:1], causal_loss)
    layers = {name: case.model.get_submodule(name) for name in case.dense if name.startswith(f"{runner.name}.1.")}
    groups = runner.groups(1, runner.run(0, 0, runner.inputs[0]), layers)
    names = [{name.rpartition(".")[2] for name in group} for group in groups]
    present = {name.rpartition(".")[2] for name in layers}
    assert names == [kept for group in expected if (kept := group & present)]
    assert sum(map(len, groups)) == len(layers)


def test_a_layers_input_is_that_of_the_whole_model_with_either_kind_of_layer():
    case = compressed_case(steps=3)
    runner = BlockRunner(case.model, case.dense, case.batches[:1], causal_loss)
    name = next(name for name in case.dense if name.endswith("1.mlp.down_proj"))
    for kind in ("dense", "compressed"):
        layer = case.dense[name] if kind == "dense" else case.model.get_submodule(name)
        seen = []
        handle = layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        if kind == "dense":
            with runner.dense():
                runner.loss(0)
                x = runner.layer_input(1, 0, runner.run(0, 0, runner.inputs[0]), layer)
        else:
            runner.loss(0)
            x = runner.layer_input(1, 0, runner.run(0, 0, runner.inputs[0]), layer)
        handle.remove()
        torch.testing.assert_close(x, seen[0])


def test_inputs_of_several_layers_are_seen_in_one_run():
    case = compressed_case(steps=3)
    runner = BlockRunner(case.model, case.dense, case.batches[:1], causal_loss)
    layers = [case.model.get_submodule(f"model.layers.0.{name}") for name in ("self_attn.q_proj", "mlp.down_proj")]
    inputs, output = runner.run_and_see(0, 0, runner.inputs[0], layers)
    for x, layer in zip(inputs, layers, strict=True):
        torch.testing.assert_close(x, runner.layer_input(0, 0, runner.inputs[0], layer))
    torch.testing.assert_close(output, runner.run(0, 0, runner.inputs[0]))
    assert not any(module._forward_pre_hooks for module in case.model.modules())


def test_an_input_that_is_modified_in_place_is_seen_as_it_was():
    case = compressed_case(steps=3)
    runner = BlockRunner(case.model, case.dense, case.batches[:1], causal_loss)
    layer = case.model.get_submodule("model.layers.0.mlp.down_proj")
    expected = runner.layer_input(0, 0, runner.inputs[0], layer).clone()

    def overwrite(module, args, output):
        args[0].zero_()

    handle = layer.register_forward_hook(overwrite)
    (seen,), _ = runner.run_and_see(0, 0, runner.inputs[0], [layer])
    handle.remove()
    torch.testing.assert_close(seen, expected)


def test_compressed_layers_are_back_whatever_happens():
    case = compressed_case(steps=3)
    runner = BlockRunner(case.model, case.dense, case.batches[:1], causal_loss)
    name = next(iter(case.dense))
    layer = case.model.get_submodule(name)

    def interrupted():
        with runner.dense():
            assert case.model.get_submodule(name) is case.dense[name]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert case.model.get_submodule(name) is layer


def stack_case(**settings):
    model = Stack(**settings).double()
    dense = swap_modules(
        model,
        {
            f"blocks.{i}.linear": make_lowrank(torch.randn(6, 2).double(), torch.randn(2, 6).double(), layout="factors")
            for i in range(len(model.blocks))
        },
    )
    x = torch.randn(4, 3, 6).double()
    return model, dense, [{"x": x, "y": x}]


def test_a_model_that_does_something_between_its_blocks_is_refused():
    BlockRunner(*stack_case(), stack_loss)
    model, dense, batches = stack_case(between=0.5)
    with pytest.raises(RefitError, match="something between them"):
        BlockRunner(model, dense, batches, stack_loss)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_block_that_is_not_run_once_is_refused():
    model, dense, batches = stack_case()
    model.blocks.append(nn.Identity())
    model.forward = lambda x: model.blocks[1](model.blocks[0](x))
    with pytest.raises(RefitError, match="run the 3 blocks of 'blocks' once each but it ran 2"):
        BlockRunner(model, dense, batches, stack_loss)


def test_blocks_without_positional_hidden_states_are_refused():
    model, dense, batches = stack_case(blocks=1)
    model.forward = lambda x: model.blocks[0](hidden=x)
    with pytest.raises(RefitError, match="first argument is the hidden states"):
        BlockRunner(model, dense, batches, stack_loss)


def test_equal_masks_and_position_embeddings_are_held_once():
    case = compressed_case("llama", steps=3)
    runner = BlockRunner(case.model, case.dense, case.batches, causal_loss)
    held = {
        id(item) for calls in runner._calls for call in calls for item in (call.kwargs["position_embeddings"] or ())
    }
    assert len(held) == 2  # cosines and sines


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"o_proj": "start", "down_proj": "end"}),
        ("gpt2", {"attn.c_proj": "start", "mlp.c_proj": "end"}),
        ("opt", {"out_proj": "start", "fc2": "end"}),
        ("gpt_neox", {"dense": "end", "dense_4h_to_h": "end"}),  # attention and MLP side by side
        ("gemma2", {}),  # a norm comes before the stream
    ],
)
def test_where_layers_join_the_stream_is_found_by_trying(family, expected):
    case = compressed_case(family, steps=3, layout="factors", rank=0.3)
    runner = BlockRunner(case.model, case.dense, case.batches[:1], causal_loss)
    hidden = runner.run(0, 0, runner.inputs[0])
    for name in case.dense:
        if name.startswith(f"{runner.name}.1."):
            joins = next((where for end, where in expected.items() if name.endswith(f".{end}")), None)
            assert joins_stream(runner, 1, hidden, case.model.get_submodule(name)) == joins, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_keys_and_values_is_not_added_to(family):
    """A training step of others does not tell the model to do without one."""
    case = compressed_case(family, steps=3, rank=0.2)

    def loss(model, batch):
        return model(**batch).loss

    case.model.eval()
    runner = BlockRunner(case.model, case.dense, case.batches[:1], loss)
    plain = BlockRunner(case.model, case.dense, case.batches[:1], causal_loss)
    hidden = runner.inputs[0]
    for block in range(len(runner.blocks)):
        expected = plain.run(block, 0, hidden)
        for _ in range(2):
            torch.testing.assert_close(runner.run(block, 0, hidden), expected)
        hidden = expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_runs_differentiably_with_other_parameters_and_is_itself_again(family):
    case = compressed_case(family, steps=3)
    runner = BlockRunner(case.model, case.dense, case.batches[:1], causal_loss)
    hidden, block = runner.inputs[0], runner.blocks[0]
    own = dict(block.named_parameters())
    others = {name: (p.detach() * 1.5).double().requires_grad_() for name, p in own.items()}
    output = runner.run_with(0, 0, hidden.double(), others)
    output.sum().backward()
    assert output.dtype == torch.float64
    assert all(p.grad is not None for p in others.values())
    assert all(p is own[name] for name, p in block.named_parameters())
    usual = runner.run(0, 0, hidden)
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(others[name])
    assert not torch.allclose(runner.run(0, 0, hidden), usual)
    torch.testing.assert_close(runner.run(0, 0, hidden), output.detach().float(), rtol=1e-3, atol=1e-4)


def test_no_more_tokens_are_held_than_wanted():
    case = compressed_case(steps=3)  # batches of 48 tokens
    left = iter(case.batches)
    runner = BlockRunner(case.model, case.dense, left, causal_loss, tokens=100)
    assert len(runner.batches) == len(runner.inputs) == len(runner._calls) == 2
    assert next(left) is case.batches[3]
    assert BlockRunner(case.model, case.dense, case.batches, causal_loss, tokens=40).batches == []
