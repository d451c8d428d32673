"""The command ``fasc score``: rho of every layer of a model, without training.

    fasc score org/model --text news.txt --output rho.csv

rho says how strongly a layer's inputs and the gradients there are coupled. Read it beside its null, which chance alone
exceeds in 5 of 100 cases, and beside the debiased value with its 95 % interval.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fasc_lightning._utils import Row, table_text
from fasc_lightning.cli._models import add_dtype_option, device_of, dtype_of, load_any
from fasc_lightning.cli._options import check_least
from fasc_lightning.cli._program import CommandParser
from fasc_lightning.data import calibration_windows, check_sources, check_window, text_windows, window_loader
from fasc_lightning.dependence import MIN_TOKENS, RhoHistory, describe
from fasc_lightning.evaluation import BUILTIN_TEXT, builtin_text
from fasc_lightning.layers import dequantized
from fasc_lightning.score import score

#: Columns of the printed table.
SHOWN = ("layer", "rho", "null", "debiased", "low", "high", "tokens")


def build_parser() -> CommandParser:
    """Return the parser of the command's options."""
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add("model", help="folder, hub id, or smollm2")
    add(
        "--text",
        nargs="+",
        default=[],
        help="text or jsonl files (also .xz), hub data set ids, or self: text sampled from the model. Default: the "
        "Python reference",
    )
    add("--checkpoints", nargs="+", help="Lightning checkpoints, folders or hub ids of one training run, in its order")
    add("--windows", type=int, default=32, help="windows of the text")
    add("--window", type=int, default=128, help="tokens a window")
    add("--batch-size", type=int, default=8, help="windows a forward pass")
    add("--tokens", type=int, default=512, help="tokens of each batch to score")
    add_dtype_option(parser)
    add("--seed", type=int, default=0, help="of sampling, the choice of tokens, and permutations")
    add("--output", help="CSV file for the table")
    add("--device", help="default: cuda if there is one")
    return parser


def main(arguments: Sequence[str] | None = None) -> RhoHistory:
    """Run the command and return the table."""
    options = build_parser().parse_args(list(sys.argv[1:] if arguments is None else arguments))
    check_sources(options.text)
    check_least(options, {"windows": 1, "window": 2, "batch_size": 1, "tokens": MIN_TOKENS})
    device = device_of(options.device)
    model, tokenizer = load_any(options.model, dtype_of(options.dtype))
    model.eval().to(device)
    check_window(options.window, tokenizer, model)
    if options.text:
        windows = calibration_windows(
            options.text, tokenizer, windows=options.windows, window=options.window, seed=options.seed, model=model
        )
    else:
        windows = text_windows(builtin_text(), tokenizer, options.windows, options.window)
    read = ", ".join(options.text) or BUILTIN_TEXT
    print(f"Scoring {options.model} on {options.windows} windows of {options.window} tokens of {read}", flush=True)
    with dequantized(model):
        history = score(
            model,
            window_loader(windows, options.batch_size),
            options.checkpoints,
            tokens=options.tokens,
            seed=options.seed,
            progress=sys.stderr.isatty(),
        )
    last = [{name: row[name] for name in SHOWN} for row in map(Row, history.at().values())]
    print(table_text(f"rho at step {history.steps[-1]}", last), describe(history), sep="\n\n")
    if options.output:
        history.to_csv(Path(options.output))
        print(f"The table is in {options.output}")
    return history
