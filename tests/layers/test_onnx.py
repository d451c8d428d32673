from __future__ import annotations

import pytest
import torch
from tiny import causal_model, token_loader
from torch import nn
from torch.export import Dim

from fasc_lightning import compress, load_compressed
from fasc_lightning.layers import quantized_layer

EXTRA = "not installed (extra `export`)"
onnxruntime = pytest.importorskip("onnxruntime", reason=f"onnxruntime is {EXTRA}")
pytest.importorskip("onnxscript", reason=f"onnxscript is {EXTRA}")

IDS = torch.arange(3, 17).reshape(2, 7)

pytestmark = [
    # The exporter's own use of torch.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnx_ir.*"),
]


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("family", "layout", "quantization"),
    [
        ("llama", "pivot", None),
        ("gpt2", "factors", None),
        ("llama", "factors", "int8"),
        ("llama", "pivot", "int8-dynamic"),
    ],
)
def test_logits_in_onnxruntime_are_those_in_torch(family, layout, quantization, tmp_path):
    model = causal_model(family, num_hidden_layers=1) if family == "llama" else causal_model(family)
    options = {"layout": layout, "quantize": quantization, "refit": False, "progress": False}
    compress(model.eval(), list(token_loader(samples=16)), keep=0.7, **options)
    model.save_pretrained(tmp_path / "compressed")
    model = load_compressed(tmp_path / "compressed")
    model.config.use_cache = False
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    with torch.no_grad():
        torch.onnx.export(
            model,
            (),
            tmp_path / "model.onnx",
            kwargs={"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
            dynamic_shapes={"input_ids": free, "attention_mask": free},
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    run = session(tmp_path / "model.onnx")
    for ids in (IDS, torch.arange(3, 48).reshape(5, 9)):  # other shapes, too, than it was exported with
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=mask).logits
        (logits,) = run.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        real = mask.bool()
        # Between two steps of int8, the rounding of the floats before decides to which an activation goes.
        atol = 1e-4 if quantization != "int8-dynamic" else 0.02 * float(wanted.abs().max())
        torch.testing.assert_close(torch.from_numpy(logits)[real], wanted[real], rtol=0, atol=atol)


def test_the_file_of_an_int8_layer_holds_int8(tmp_path):
    layer = quantized_layer(nn.Linear(256, 256), "int8").eval()
    with torch.no_grad():
        torch.onnx.export(layer, (torch.randn(4, 256),), tmp_path / "layer.onnx", dynamo=True, verbose=False)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1.3 * 256 * 256
