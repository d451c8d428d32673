from __future__ import annotations

import json
import os
import resource
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hub_cases import assert_same, compressed, compressed_with_report, make_truncated
from huggingface_hub import ModelCard
from tiny import byte_tokenizer, causal_model, causal_module, mlp, token_loader
from transformers import AutoTokenizer

from fasc_lightning import FascCallback, compress, load_compressed, save_compressed, to_dense
from fasc_lightning._utils import write_json
from fasc_lightning.layers import swap_modules

MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "README.md"}


def names(folder):
    return {path.name for path in folder.iterdir()}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def full_disk(size):
    """Files cannot grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def unprivileged():
    """Root may write anywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_everything_is_in_the_folder(tmp_path):
    model, report = compressed_with_report()
    tokenizer = byte_tokenizer()
    folder = save_compressed(model, str(tmp_path / "deep" / "small"), report=report, tokenizer=tokenizer)
    assert folder == tmp_path / "deep" / "small"
    assert names(folder) == MODEL_FILES | {"tokenizer.json", "tokenizer_config.json"}
    assert names(folder.parent) == {"small"}
    assert_same(load_compressed(folder), model)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    assert "How it was made" in ModelCard.load(folder / "README.md").text


def test_the_model_alone_is_enough_and_a_reloaded_one_too(tmp_path):
    model = compressed()
    save_compressed(model, tmp_path / "small")
    reloaded = load_compressed(tmp_path / "small")
    save_compressed(reloaded, tmp_path / "again")
    assert names(tmp_path / "again") == MODEL_FILES
    assert_same(load_compressed(tmp_path / "again"), model)
    save_compressed(reloaded, tmp_path / "small")  # over its own files
    assert_same(load_compressed(tmp_path / "small"), model)


def test_layers_that_were_swapped_by_hand(tmp_path):
    model = causal_model().eval()
    name = "model.layers.0.mlp.up_proj"
    swap_modules(model, {name: make_truncated(model.get_submodule(name))})
    save_compressed(model, tmp_path / "small")
    assert_same(load_compressed(tmp_path / "small"), model)


def test_earlier_weights_of_any_form_are_gone_and_other_files_stay(tmp_path):
    model, folder = compressed(), tmp_path / "small"
    causal_model().save_pretrained(folder)  # a single file of dense weights
    (folder / "pytorch_model.bin").write_text("")
    (folder / "eval").mkdir()
    (folder / "eval" / "results.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text("")
    mine = {"eval", "adapter_model.safetensors"}
    save_compressed(model, folder, max_shard_size="20KB")
    assert "model.safetensors.index.json" in names(folder)
    assert not {"model.safetensors", "pytorch_model.bin"} & names(folder)
    assert_same(load_compressed(folder), model)
    save_compressed(model, folder)  # and back
    assert names(folder) == MODEL_FILES | mine
    assert_same(load_compressed(folder), model)


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_leaves_what_there_was(tmp_path, earlier):
    model, report = compressed_with_report()
    folder = tmp_path / "small"
    if earlier:
        save_compressed(compressed("opt"), folder)
    before = contents(tmp_path)
    with full_disk(20_000), pytest.raises(OSError, match=r"(?i)could not write the weights.*too large.*unchanged"):
        save_compressed(model, folder, report=report)
    assert contents(tmp_path) == before
    assert names(tmp_path) == ({"small"} if earlier else set())
    save_compressed(model, folder, report=report)
    assert_same(load_compressed(folder), model)


def test_a_disk_that_is_full_before_the_weights_are_written(tmp_path):
    save_compressed(compressed("opt"), tmp_path / "small")
    before = contents(tmp_path)
    with full_disk(100), pytest.raises(OSError, match="too large"):
        save_compressed(compressed(), tmp_path / "small")
    assert contents(tmp_path) == before


def test_a_folder_that_may_not_be_written_to():
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        save_compressed(compressed("opt"), parent / "small")
        before = contents(parent)
        parent.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
        with unprivileged(), pytest.raises(PermissionError):
            save_compressed(compressed(), parent / "small")
        parent.chmod(stat.S_IRWXU)
        assert contents(parent) == before


def test_a_failure_after_the_weights_leaves_what_there_was(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise RuntimeError("no tokenizer")

    save_compressed(compressed("opt"), tmp_path / "small")
    before = contents(tmp_path)
    with pytest.raises(RuntimeError, match="no tokenizer"):
        save_compressed(compressed(), tmp_path / "small", tokenizer=Broken())
    assert contents(tmp_path) == before


def test_reports_survive_a_full_disk(tmp_path):
    report = compressed_with_report()[1]
    report.to_json(tmp_path / "r.json")
    before = contents(tmp_path)
    with full_disk(200), pytest.raises(OSError, match="too large"):
        write_json({**report.to_dict(), "seed": 1}, tmp_path / "r.json")
    assert contents(tmp_path) == before
    assert json.loads((tmp_path / "r.json").read_text())["seed"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["pivot", "factors"])
def test_disk_and_memory_fall_by_what_the_report_promises(tmp_path, dtype, layout):
    model = causal_model(hidden_size=384, intermediate_size=768, num_hidden_layers=1).to(dtype)
    model.save_pretrained(tmp_path / "dense")
    batches = token_loader(samples=24, length=32, batch_size=8)  # as many tokens as features
    report = compress(model, batches, keep=0.6, layout=layout, refit=False, progress=False)
    save_compressed(model, tmp_path / "small", report=report)
    disk = {name: sum(map(len, contents(tmp_path / name).values())) for name in ("dense", "small")}
    promised = {state: size.bytes for state, size in report.whole.items()}
    assert disk["small"] == pytest.approx(promised["compressed"], rel=0.01)
    assert disk["dense"] - disk["small"] == pytest.approx(promised["dense"] - promised["compressed"], rel=0.01)
    reloaded = load_compressed(tmp_path / "small")
    held = [*reloaded.parameters(), *reloaded.buffers()]
    assert sum(t.numel() * t.element_size() for t in held) == pytest.approx(promised["compressed"], rel=0.001)


# What is refused, before anything is written


def refused(tmp_path, model, error, match, folder="small", **options):
    before = contents(tmp_path)
    with pytest.raises(error, match=match):
        save_compressed(model, tmp_path / folder, **options)
    assert contents(tmp_path) == before


def test_models_that_are_not_compressed_or_not_of_transformers(tmp_path):
    refused(tmp_path, causal_model(), ValueError, "LlamaForCausalLM is dense")
    refused(tmp_path, to_dense(compressed()), ValueError, "is dense")
    refused(tmp_path, mlp(), TypeError, r"got Classifier.*trainer\.save_checkpoint")
    refused(tmp_path, causal_module(), TypeError, r"got CausalLMModule.*`module\.model`")
    assert names(tmp_path) == set()


def test_floating_point_types_that_a_folder_cannot_hold(tmp_path):
    model = compressed().bfloat16()
    model.lm_head.float()
    refused(tmp_path, model, ValueError, r"one floating-point type.*bfloat16 \('model.*float32 \('lm_head\.weight'\)")
    # What transformers itself holds in float32 is loaded so; some of it beside float16 alone.
    model._keep_in_fp32_modules = {"lm_head"}
    refused(tmp_path, model, ValueError, "one floating-point type")
    model._keep_in_fp32_modules_strict = {"lm_head"}
    save_compressed(model, tmp_path / "small")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # asked for by peft
def test_adapters_are_not_saved_in_place_of_the_model(tmp_path):
    from peft import LoraConfig

    model = compressed()
    save_compressed(model, tmp_path / "small")
    before = sorted(tmp_path.glob("small/*"))
    model.add_adapter(LoraConfig(r=2, target_modules=["basis"]))
    refused(tmp_path, model, ValueError, "without adapters but it carries some")
    assert sorted(tmp_path.glob("small/*")) == before


def test_a_mount_point_cannot_be_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "small")
    refused(tmp_path, compressed(), OSError, "is a mount point. Use a folder inside")


def test_folders_that_are_not_to_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    refused(tmp_path, compressed(), NotADirectoryError, "is a file", folder="file")
    refused(tmp_path, compressed(), FileExistsError, "holds other files. Save to a folder inside", folder="mine")
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "inner")
    refused(tmp_path, compressed(), ValueError, "working directory", folder="empty/inner")
    monkeypatch.chdir(tmp_path)
    save_compressed(compressed(), Path("empty", "inner"))
    assert names(tmp_path / "empty" / "inner") == MODEL_FILES


def test_a_report_of_another_model(tmp_path):
    other = compressed_with_report(keep=0.5)[1]
    refused(tmp_path, compressed(), ValueError, "Give the report of this compression", report=other)


def test_after_a_fit_of_a_trainer(tmp_path, make_trainer):
    module, callback = causal_module(), FascCallback(keep=0.7)
    make_trainer(callback).fit(module, token_loader(samples=16))
    save_compressed(module.model, tmp_path / "small", report=callback.report)
    assert_same(load_compressed(tmp_path / "small"), module.model.eval())
