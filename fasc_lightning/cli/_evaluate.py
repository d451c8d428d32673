"""The command ``fasc evaluate``: perplexity and facts of a model, alone or beside another one.

    fasc evaluate compressed --eval-text news=news.txt --against org/model --report report.json

Both models answer the same questions. The divergence KL(other || model) is the mean over the first windows of each
text.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fasc_lightning._utils import Clock, library_versions, return_freed_memory, write_json
from fasc_lightning.cli._models import add_dtype_option, device_of, dtype_of, load_any
from fasc_lightning.cli._options import TEXT_SIZE, add_evaluation_options, check_evaluation, check_least
from fasc_lightning.cli._program import CommandParser
from fasc_lightning.cli._run import facts_lines, measurements, pairs_lines, perplexity_line, quality_line, questions_of
from fasc_lightning.data import check_window, load_config, model_folder
from fasc_lightning.evaluation import Quality, Questions
from fasc_lightning.layers import dequantized, model_size
from fasc_lightning.models import is_compressed_config

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from transformers import PreTrainedModel


#: Options in the report.
REPORTED = ("eval_text", "eval_facts", "minimal_pairs", "eval_windows", "window", "kl_windows", "dtype", "seed")


def build_parser() -> CommandParser:
    """Return the parser of the command's options."""
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add("model", help="folder, hub id, or smollm2: a dense model, or one that was compressed")
    add("--against", help="another model on the same questions, for example the dense one")
    add_evaluation_options(parser, windows=TEXT_SIZE["eval_windows"], kl_windows=8)
    add("--window", type=int, default=TEXT_SIZE["window"], help="tokens a window")
    add_dtype_option(parser)
    add("--seed", type=int, default=0, help="of the choice of built-in facts")
    add("--report", help="JSON file for the figures")
    add("--device", help="default: cuda if there is one")
    return parser


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command and return the content of its report."""
    options = build_parser().parse_args(list(sys.argv[1:] if arguments is None else arguments))
    if options.against == options.model:
        raise ValueError(f"Expected --against to name another model than {options.model} but got the same.")
    names = [name for name in (options.against, options.model) if name is not None]
    compressed = {name: is_compressed_config(load_config(name)) for name in names}  # refuses missing models, too
    check_evaluation(options)
    check_least(options, {"window": 2})
    device = device_of(options.device)
    clock = Clock()
    measured = measure(names, options, device, clock)
    content = {
        "model": options.model,
        "against": options.against,
        "sizes": measured.sizes,
        **measurements(measured.states),
        "kl": measured.states[options.model].divergence,
        "options": {name: options[name] for name in REPORTED},
        "seconds": clock.seconds,
        "versions": library_versions(),
    }
    if len(names) > 1:
        print("", *comparison_lines(content), sep="\n")
    if options.report:
        write_json(content, options.report)
        print(f"The figures are in {options.report}")
    print("", *loading_lines(options.model, compressed[options.model]), sep="\n")
    return content


@dataclass
class Measured:
    """Figures of models on the same questions.

    Attributes:
        sizes: Size of each model by its name.
        states: Quality of each model by its name.
    """

    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    states: dict[str, Quality] = field(default_factory=dict)


def measure(names: Sequence[str], options: Namespace, device: torch.device, clock: Clock) -> Measured:
    """Load and measure one or two models, one after the other, and print a line about each.

    Raises:
        ValueError: If they read the texts as different tokens.
        FloatingPointError: If a loss is not finite.
    """
    found = Measured()
    asked: Questions | None = None
    for name in names:
        with clock("load"):
            model, tokenizer = load_any(name, dtype_of(options.dtype))
            model.eval().to(device)
            check_window(options.window, tokenizer, model)
            questions = questions_of(options, tokenizer)
            if asked is not None:
                check_same_tokens(asked, questions, options)
                questions = asked
            found.sizes[name] = size_of(name, model)
        print(f"Evaluating {name}: {size_text(found.sizes[name])}", flush=True)
        with clock("evaluate"), dequantized(model):
            found.states[name] = questions.measure(model, tokenizer)
            if asked is None and len(names) > 1:
                asked = questions.compared_with(model)
        print(quality_line(found.states[name]), flush=True)
        del model  # before the next one is loaded
        return_freed_memory()
    return found


def check_same_tokens(first: Questions, second: Questions, options: Namespace) -> None:
    """Refuse two models that read the texts as different tokens, because their perplexities do not compare.

    Raises:
        ValueError: If they do.
    """
    for name, windows in first.texts.items():
        if not torch.equal(windows, second.texts[name]):
            raise ValueError(
                f"Expected {options.model} and {options.against} to have one tokenizer, because perplexities of "
                f"different tokens do not compare, but they read {name} differently. Leave out --against."
            )


def size_of(name: str, model: PreTrainedModel) -> dict[str, int]:
    """Return the parameters of a model and, of a local folder, the bytes of its files of weights."""
    size = {"parameters": model_size(model).parameters}
    folder = Path(model_folder(name))
    if folder.is_dir():
        size["saved_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return size


def size_text(size: Mapping[str, int]) -> str:
    """Return a model's size in words."""
    saved = f", {size['saved_bytes'] / 1e6:.1f} MB of weights on disk" if size.get("saved_bytes") else ""
    return f"{size['parameters'] / 1e6:,.1f} million parameters{saved}"


def comparison_lines(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of two models side by side."""
    yield f"{content['against']} -> {content['model']}"
    for name, values in content["perplexity"].items():
        yield perplexity_line(name, values)
    for name, value in (content["kl"] or {}).items():
        yield f"KL to {content['against']} on {name}: {value:.4f} nats a token"
    yield from facts_lines(content["facts"])
    yield from pairs_lines(content["minimal_pairs"])


def loading_lines(name: str, compressed: bool) -> Iterator[str]:
    """Yield the lines that show how to load a model in Python."""
    yield "Load it in Python:"
    if compressed:
        yield "  from fasc_lightning import load_compressed"
        yield f"  model = load_compressed({name!r})"
    else:
        yield "  from fasc_lightning.data import load_model"
        yield f"  model, tokenizer = load_model({name!r})"
