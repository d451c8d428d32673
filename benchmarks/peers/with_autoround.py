"""Quantise with AutoRound, which trains the rounding of every block.

    pip install torch==2.13.0 transformers==5.24.0 auto-round==0.16.1
    python with_autoround.py --model MODEL --tokens TOKENS --bits 4 --output OUT

The defaults are its own: 200 steps with 8 windows each, symmetric. For 2 bits it recommends ``--extended``. Its light
recipe is ``--steps 50 --rate 5e-3``.
"""

from __future__ import annotations

from auto_round import AutoRound
from common import Clock, Quantised, calibration, decoder_layers, load, packed_bytes, parser, write
from transformers import AutoTokenizer


def main() -> None:
    """Quantise and write."""
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=200, help="of training for every block")
    arguments.add_argument("--rate", type=float, help="learning rate; by default 1 / steps")
    arguments.add_argument("--batch", type=int, default=8, help="windows a step")
    arguments.add_argument("--extended", action="store_true", help="enable_alg_ext")
    options = arguments.parse_args()
    tokens = calibration(options)
    settings = {
        "scheme": f"W{options.bits}A16",
        "group_size": options.group,
        "sym": True,
        "iters": options.steps,
        "lr": options.rate,
        "batch_size": options.batch,
        "nsamples": len(tokens),
        "seqlen": tokens.shape[1],
        "enable_alg_ext": options.extended,
    }
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    peer = AutoRound(
        load(options.model),
        tokenizer,
        dataset=list(tokens.split(options.batch)),
        device_map="cpu",
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
        **settings,
    )
    with Clock() as clock:
        model, _ = peer.quantize()
    layers = {}
    for name in decoder_layers(load(options.model)):
        linear = model.get_submodule(name)
        size = packed_bytes(linear.weight, options.bits, linear.scale.half())
        layers[name] = Quantised(linear.weight, size, size)
    write(options, layers, "auto-round", settings, "codes at their bits, scales of float16", clock)


if __name__ == "__main__":
    main()
