"""The command ``fasc plan``: memory, time and size of a compression, from a configuration alone.

    fasc plan org/model --size 0.27 --memory 24GB

No weight is read. The last line is the command that carries the plan out. The exit code is 0 for a plan, 1 if the
compression cannot fit at all, and 2 for bad input.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from fasc_lightning.cli._models import Dtype, add_dtype_option, dtype_of
from fasc_lightning.cli._options import (
    BUDGETS,
    OPTIONS,
    add_compression_options,
    check_least,
    compression_options,
    frozen_options,
)
from fasc_lightning.cli._program import CommandParser, one_line
from fasc_lightning.compression import wanted_refit
from fasc_lightning.data import load_config
from fasc_lightning.layers import target_layers
from fasc_lightning.options import CompressionOptions, described, holds_moments
from fasc_lightning.planning import CompressionForecast, model_on_meta, plan

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from torch import nn

#: The budget without any other, as ``fasc compress`` has it.
BUDGET = ("quantize", "int4")

#: Exit code of a compression that cannot fit.
TOO_LARGE = 1


def build_parser() -> CommandParser:
    """Return the parser of the command's options."""
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add("model", help="folder, hub id, smollm2, or a config.json")
    add("--memory", type=str, help="of the device, weights included, as 24GB; default: what is available")
    add("--host-memory", type=str, help="of the CPU beside another device, for moments and factors; default: none")
    add_compression_options(parser, f"{BUDGET[0]} {BUDGET[1]}")
    add("--windows", type=int, default=64, help="calibration windows")
    add("--window", type=int, default=512, help="tokens a window")
    add_dtype_option(parser, default=None)
    add("--device", help="default: cuda if there is one; another machine's device needs --memory")
    return parser


def main(arguments: Sequence[str] | None = None) -> CompressionForecast:
    """Run the command and return the forecast."""
    options = build_parser().parse_args(list(sys.argv[1:] if arguments is None else arguments))
    check_least(options, {"windows": 1, "window": 2, "batch_size": 1})
    if all(options[name] is None for name in BUDGETS):
        options[BUDGET[0]] = BUDGET[1]
    compression = CompressionOptions(**frozen_options(options))  # refuses wrong values
    config = load_config(options.model)
    options.dtype = options.dtype or config_dtype(config)
    model = model_on_meta(config, dtype_of(options.dtype))
    try:
        forecast, refit = forecast_of(options, compression, model)
    except MemoryError as error:
        print(one_line(error), file=sys.stderr)
        sys.exit(TOO_LARGE)
    print(forecast)
    print(f"\nNext: {compress_command(options, {**forecast.options, 'refit': refit})}")
    return forecast


def config_dtype(config: Any) -> Dtype:
    """Return the type that a configuration names; float32 if it names none that the commands take."""
    named = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return next((dtype for dtype in get_args(Dtype) if dtype == named), "float32")


def forecast_of(
    options: Namespace, compression: CompressionOptions, model: nn.Module
) -> tuple[CompressionForecast, bool | str]:
    """Return the forecast, and the option ``refit`` with which the compression fits.

    A refit holds all moments until the end. An automatic one is left out if that does not fit.

    Raises:
        MemoryError: If the compression does not fit.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokens = options.windows * options.window
    common: dict[str, Any] = {
        "memory": options.memory,
        "host_memory": options.host_memory,
        "device": device,
        "batch_tokens": options.batch_size * options.window,
        "tokens": tokens,
    }
    layers = target_layers(model, compression.targets, compression.exclude).modules
    automatic = wanted_refit(model, layers, compression) == "auto"
    if not (automatic and holds_moments(compression.passes, compression.sketch)):
        return plan(model, compression, **common), compression.refit
    try:
        return plan(model, compression, keeps_moments=True, **common), "auto"
    except MemoryError:
        without = CompressionOptions(**{**frozen_options(options), "refit": False})
        forecast = plan(model, without, **common)
    # Several passes and projected moments rule a refit out by themselves.
    ruled_out = not holds_moments(forecast.passes, forecast.options.get("sketch"))
    return forecast, "auto" if ruled_out else False


def compress_command(options: Namespace, planned: Mapping[str, Any]) -> str:
    """Return the command that carries a plan out.

    Args:
        options: The options of the plan.
        planned: Options of the compression that the plan chose; they override the given ones.
    """
    path = Path(options.model)
    model = str(path.parent) if path.is_file() else options.model
    chosen = {**compression_options(options), **{name: planned[name] for name in OPTIONS if name in planned}}
    words = ["fasc", "compress", "--model", model, *option_words(chosen)]
    defaults = {"windows": 64, "window": 512, "batch_size": 1, "dtype": "float32", "device": None}
    for name, default in defaults.items():
        if options[name] != default:
            words += [f"--{name.replace('_', '-')}", f"{options[name]}"]
    return shlex.join([*words, "--output", f"{Path(model).resolve().name}-compressed"])


def option_words(chosen: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options of a compression that differ from their defaults, as words of a command line."""
    for name, value in chosen.items():
        if value != described(name).default:
            yield f"--{name.replace('_', '-')}"
            yield value if isinstance(value, str) else json.dumps(value)
