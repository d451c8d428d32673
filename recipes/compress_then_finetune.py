"""Compress a language model, then recover its quality by training: one small, merged model, measured at each stage.

The defaults need no data and no network: SmolLM2-135M-Instruct from an installed wheel is compressed on text that it
samples itself. It then learns from the dense model on more sampled text:

    python recipes/compress_then_finetune.py

With your own data, instructions or plain text; only the answers of instructions are learnt:

    python recipes/compress_then_finetune.py --model FOLDER_OR_HUB_ID --keep 0.8 --data a.txt instructions.jsonl \
        --tokens 400000 --checkpoints checkpoints --eval-text news=news.txt --eval-facts facts.jsonl \
        --output recovered --report report.json

The part of the data that is trained on is calibrated on as well, unless --calibration names something else, and its
labels are the target. Text that the model samples has the dense model's predictions as the target.

A tenth of the data is held out and never trained on (nor calibrated on, if plain text is long enough). The dense, the
compressed and the recovered model are measured on the held-out data, the texts and the facts. The report's `drift`
shows the losses and gains on the data's own domain and on others. An eighth of the rest chooses the state that is kept.
A run that was stopped continues from its --checkpoints when it is started again. Every option can also stand in a YAML
file given as `--config FILE`; recipes/configs has examples.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import Tensor

from fasc_lightning import CausalLMModule, FascCallback
from fasc_lightning.cli import (
    DATA,
    KERNEL_CACHE,
    Clock,
    CommandParser,
    add_compression_options,
    add_evaluation_options,
    add_output_options,
    add_source_options,
    calibration_of,
    check_run,
    device_of,
    frozen_options,
    mapping,
    measurement_lines,
    measurements,
    on_device,
    perplexity_line,
    plain,
    quality_line,
    questions_of,
    read_json,
    run_fit,
    run_program,
    save_results,
    write_json,
)
from fasc_lightning.data import (
    EMPTY,
    OVERLONG,
    SELF,
    FinetuneData,
    check_data_options,
    check_sources,
    check_window,
    finetune_data,
    load_model,
    window_loader,
)
from fasc_lightning.evaluation import BUILTIN_TEXT, HELD_OUT, Quality, Questions, compare_heldout, retention
from fasc_lightning.options import RATES, CompressionOptions, Distillation, FactorRecovery, LoraRecovery, Precision

#: The default budget.
BUDGET = ("rank", 0.5)
ARMS = {"lora": LoraRecovery, "factors": FactorRecovery}
#: Tokens to read by default: of data, twenty minutes of training for the bundled model on two cores; of sampled text.
TOKENS, SAMPLED_TOKENS = 100_000, 16_384
#: Options that have no effect beside others.
UNUSED = {
    ("recovery", "lora"): ("norms",),
    ("recovery", "factors"): ("r", "alpha"),
    ("teacher", "none"): ("temperature", "teacher_weight", "teacher_blocks", "teacher_cache"),
}
#: Options that name places and do not change the result.
PLACES = frozenset({"config", "output", "report", "licence", "device", "checkpoints", "checkpoint_every"})
#: Options that do not change the model. Texts change it where examples that share a passage with them are left out.
MEASURING = frozenset({"eval_facts", "in_domain", "kl_windows", "minimal_pairs"})
MEASURING_TEXTS = frozenset({"eval_text", "eval_windows"})


def build_parser() -> CommandParser:
    """Return the parser of this recipe's options."""
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add_source_options(parser, windows=32)
    parser.set_defaults(calibration=None)
    add_compression_options(parser, f"{BUDGET[0]} {BUDGET[1]}")
    add(
        "--recovery",
        choices=list(ARMS),
        help="what is trained: the factors, or adapters on them. Default: the factors, unless --r or --alpha is given",
    )
    add(
        "--teacher",
        choices=["dense", "none"],
        help="whose outputs are the target; none: the labels'. Default: none, but dense on text that the model samples "
        "and beside other options of the teacher",
    )
    add("--temperature", type=float, default=1.0, help="of the teacher's and the student's distributions")
    add("--teacher-weight", type=float, default=1.0, help="of the teacher's predictions against the labels'")
    add("--teacher-blocks", type=float, default=0.0, help="weight of the outputs of the teacher's blocks")
    add("--teacher-cache", help="folder for the teacher's largest logits, instead of asking it again at each step")
    add("--r", type=int, default=8, help="rank of the adapters")
    add("--alpha", type=float, help="adapters are multiplied by alpha / r; default: 2 r")
    add("--norms", type=bool, default=False, help="whether norms are trained beside the factors")
    add("--refine-steps", type=int, default=0, help="steps towards each dense block's output before all is trained")
    add("--data", nargs="+", help="what to recover on, named like --calibration; its training part is calibrated on")
    add("--weights", type=float, nargs="+", help="each source's part of --tokens, as 3 1; default: equal parts")
    amount = f"{TOKENS:,}, or {SAMPLED_TOKENS:,} of text that the model samples"
    add("--tokens", type=int, help=f"most tokens of the data to read, the held-out ones included; default: {amount}")
    add("--heldout", type=float, default=0.1, help="share of the data that is only measured on")
    add("--answers-only", type=bool, default=True, help="whether instructions themselves are learnt")
    add("--pack", type=bool, default=True, help="whether examples share a window, and then see those before them")
    add("--overlong", default="cut", choices=list(OVERLONG), help="what becomes of instructions beyond a window")
    add("--empty", default="error", choices=list(EMPTY), help="what becomes of instructions without an answer")
    add("--deduplicate", type=bool, default=True, help="leave out examples that share 32 tokens with --eval-text")
    add("--streaming", type=bool, default=True, help="whether hub data sets are read row by row")
    add("--epochs", type=int, default=1, help="passes over the data")
    add("--steps", type=int, help="most optimizer steps of the recovery")
    add("--accumulate", type=int, default=1, help="batches an optimizer step")
    rates = ", ".join(f"{rate:g} for {arm} {('by labels', 'by a teacher')[by]}" for (arm, by), rate in RATES.items())
    add("--lr", type=float, help=f"learning rate at its highest; default: {rates}")
    add("--precision", choices=get_args(Precision), help="of the recovery's fit; default: the Trainer's")
    add("--validate-every", type=int, help="optimizer steps from one held-out loss to the next; default: 8 in a fit")
    add("--patience", type=int, help="stop after so many held-out losses that were no better")
    add("--checkpoints", help="folder for the recovery's last checkpoint; one that is there is gone on from")
    add("--checkpoint-every", type=int, default=50, help="optimizer steps from one checkpoint to the next")
    add_evaluation_options(parser, windows=16, kl_windows=4)
    add("--in-domain", nargs="+", default=[], help="names of those texts that are of the data's domain")
    add_output_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns the report that it writes."""
    parser = build_parser()
    options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    fill_in(options, parser)
    check_used(options, parser)
    recovery = check(options)
    if options.precision == "bf16-mixed":
        for name, value in KERNEL_CACHE.items():
            os.environ.setdefault(name, value)
    device, clock = device_of(options.device), Clock()
    with clock("load"):
        model, tokenizer = load_model(options.model)
        model.eval().to(device)
        check_window(options.window, tokenizer, model)
        questions = questions_of(options, tokenizer)
    with clock("data"):
        calibration = None if options.calibration == [DATA] else calibration_of(options, tokenizer, model)
        data = recovery_data(options, model, tokenizer, calibration, questions)
        if calibration is None:
            batches: Any = list(islice(data.train, -(-options.windows // options.batch_size)))
        else:
            batches = window_loader(calibration, options.batch_size)
    print(f"Data: {data.summary}")
    questions = replace(questions, heldout=data.heldout or ())
    states: dict[str, Quality] = {}

    with clock("evaluate"):
        print("Evaluating the dense model")
        states["dense"] = questions.measure(model, tokenizer)
        questions = questions.compared_with(model)
        print(quality_line(states["dense"]))

    callback = FascCallback(**frozen_options(options), recovery=recovery)
    module = CausalLMModule(model, recovery.rate, schedule="cosine")
    rows = options.windows if calibration is not None else min(options.windows, data.summary.windows)
    print(f"Compressing on {rows} windows of {options.window} tokens from {', '.join(options.calibration)}")
    run_fit(module, batches, callback, progress=True, epochs=callback.passes)

    with clock("evaluate"):
        print("Evaluating the compressed model")
        states["compressed"] = questions.measure(model, tokenizer)
        print(quality_line(states["compressed"]))

    print(f"Recovering on {', '.join(options.data)}")
    try:
        recover(options, recovery, module, callback, data)
        with clock("evaluate"):
            print("Evaluating the recovered model")
            states["recovered"] = questions.measure(model, tokenizer)
            print(quality_line(states["recovered"]))
    except BaseException:  # the compression took most of the time and must not be lost
        print("The recovery failed. This is the compressed model:")
        finish(options, model, tokenizer, full_report(options, callback, data, clock.seconds, states), callback)
        raise
    content = full_report(options, callback, data, clock.seconds, states)
    finish(options, model, tokenizer, content, callback)
    return content


def finish(options: Namespace, model: Any, tokenizer: Any, content: dict[str, Any], callback: FascCallback) -> None:
    """Print the measurements, and save the model and the report if asked for."""
    print(f"\n{callback.report}\n", *report_lines(content), sep="\n")
    print(save_results(options, model, tokenizer, content))


def fill_in(options: Namespace, parser: CommandParser) -> None:
    """Fill in the sources, the tokens, the teacher and the trained parameters that were not given.

    Labels of real text win more back than the dense model's predictions do (docs/results.md).
    """

    def given(*names: str) -> bool:
        return any(options[name] != parser.get_default(name) for name in names)

    if options.calibration is None:
        options.calibration = [DATA] if options.data else [SELF]
    options.data = options.data or list(options.calibration)
    sampled = set(options.data) == {SELF}
    if options.tokens is None:
        options.tokens = SAMPLED_TOKENS if sampled else TOKENS
    if options.recovery is None:
        options.recovery = "lora" if given(*UNUSED["recovery", "factors"]) else "factors"
    if options.teacher is None:
        options.teacher = "dense" if sampled or given(*UNUSED["teacher", "none"]) else "none"


def check_used(options: Namespace, parser: CommandParser) -> None:
    """Refuse options without effect.

    Raises:
        ValueError: If such an option is not at its default.
    """
    for (name, value), unused in UNUSED.items():
        for other in unused if options[name] == value else ():
            if options[other] != parser.get_default(other):
                raise ValueError(
                    f"Expected no --{_dashed(other)} together with --{name} {value}, which does not use it, but got "
                    f"{options[other]}. Leave one of them out."
                )


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def check(options: Namespace) -> LoraRecovery | FactorRecovery:
    """Fill in options that depend on others, and refuse invalid ones before anything is loaded.

    Returns:
        The recovery.

    Raises:
        ValueError: If an option is out of range.
        FileNotFoundError: If a file is missing.
        FileExistsError: If --output holds files but no saved model.
    """
    check_run(options, BUDGET, ("tokens", "epochs", "steps", "accumulate", "checkpoint_every"))
    check_data_options(options.data, options.tokens, options.heldout, weights=options.weights)
    check_sources(options.data)
    check_in_domain(options)
    teacher = None
    if options.teacher == "dense":
        teacher = Distillation(
            temperature=options.temperature,
            weight=options.teacher_weight,
            blocks=options.teacher_blocks,
            cache=options.teacher_cache,
        )
    common = {name: options[name] for name in ("refine_steps", "epochs", "precision", "validate_every", "patience")}
    common["teacher"] = teacher
    if options.lr is not None:
        common["learning_rate"] = options.lr
    recovery: LoraRecovery | FactorRecovery
    if options.recovery == "lora":
        recovery = LoraRecovery(r=options.r, alpha=options.alpha, **common)
    else:
        recovery = FactorRecovery(norms=options.norms, **common)
    CompressionOptions(**frozen_options(options), recovery=recovery)  # refuses adapters on rounded matrices
    options.lr = recovery.rate
    check_checkpoints(options)
    return recovery


def check_in_domain(options: Namespace) -> None:
    """Refuse names of in-domain texts that are not among the evaluation texts.

    Raises:
        ValueError: If there are such names.
    """
    builtin = not (options.eval_text or options.eval_facts)
    names = [BUILTIN_TEXT] if builtin else list(options.eval_text)
    if unknown := set(options.in_domain) - set(names):
        raise ValueError(f"Expected --in-domain to name some of {names} but got {sorted(unknown)}.")


def check_checkpoints(options: Namespace) -> None:
    """Refuse to continue a run with other options, because its model would be mixed with this one.

    Raises:
        ValueError: If the checkpoint comes from such a run.
    """
    if not options.checkpoints or not _last(options).is_file():
        return
    expected, found = _resumed_options(options), {}
    if _options_file(options).is_file():
        found = read_json(_options_file(options), mapping(plain))
    if other := [name for name in expected if name not in found or found[name] != expected[name]]:
        values = (f"--{_dashed(name)} {found.get(name)} and not {expected[name]}" for name in other[:3])
        raise ValueError(
            f"Expected --checkpoints to hold a checkpoint of this very run but {_last(options)} is of one with "
            f"{', '.join(values)}. Give the same options, another folder, or delete that file to begin again."
        )


def _last(options: Namespace) -> Path:
    return Path(options.checkpoints) / "last.ckpt"


def _options_file(options: Namespace) -> Path:
    return Path(options.checkpoints) / "options.json"


def _resumed_options(options: Namespace) -> dict[str, Any]:
    """Return the options that a checkpoint depends on, in their JSON form."""
    measuring = MEASURING if options.deduplicate else MEASURING | MEASURING_TEXTS
    return {name: value for name, value in _stated(options).items() if name not in measuring}


def _stated(options: Namespace) -> dict[str, Any]:
    """Return the options that change the result."""
    return {name: value for name, value in vars(options).items() if name not in PLACES}


def recovery_data(
    options: Namespace, model: Any, tokenizer: Any, calibration: Tensor | None, questions: Questions
) -> FinetuneData:
    """Return the data of the recovery; held-out data was not calibrated on either, if there is enough text."""
    return finetune_data(
        options.data,
        tokenizer,
        window=options.window,
        tokens=options.tokens,
        heldout=options.heldout,
        batch_size=options.batch_size,
        pack=options.pack,
        answers_only=options.answers_only,
        overlong=options.overlong,
        empty=options.empty,
        streaming=options.streaming,
        # Sampled text must differ from the calibration text.
        seed=options.seed + 1,
        model=model,
        calibrated=calibration,
        weights=options.weights,
        evaluated=questions.texts.values() if options.deduplicate else (),
    )


def recover(
    options: Namespace,
    recovery: LoraRecovery | FactorRecovery,
    module: pl.LightningModule,
    callback: FascCallback,
    data: FinetuneData,
) -> None:
    """Fit again with the callback that compressed the module; it trains the recovery's parameters and merges them."""
    device = next(module.parameters()).device
    callbacks: list[pl.Callback] = [callback]
    last = None
    if options.checkpoints:
        last = _last(options) if _last(options).is_file() else None
        write_json(_resumed_options(options), _options_file(options))
        callbacks.append(
            ModelCheckpoint(
                options.checkpoints,
                filename="last",
                every_n_train_steps=options.checkpoint_every,
                enable_version_counter=False,
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # advice on loader workers and loggers
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        trainer = pl.Trainer(
            **on_device(device),
            max_epochs=recovery.epochs,
            precision=recovery.precision,
            max_steps=options.steps or -1,
            accumulate_grad_batches=options.accumulate,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=bool(options.checkpoints),
            enable_model_summary=False,
            callbacks=callbacks,
        )
        if last is not None:  # not as an argument of `fit`, because callbacks would see it too late
            trainer.ckpt_path = last
        try:
            trainer.fit(module, data.train)
        finally:
            module.to(device)  # Lightning moves modules to the CPU when a fit ends


def full_report(
    options: Namespace,
    callback: FascCallback,
    data: FinetuneData,
    seconds: dict[str, float],
    states: dict[str, Quality],
) -> dict[str, Any]:
    """Return the compression's report with the model, the recipe's options, the data and the evaluation."""
    assert callback.report is not None
    content = callback.report.to_dict()
    for layer in content["layers"]:
        layer["name"] = layer["name"].removeprefix("model.")  # the name of the model in its module
    content["model"] = options.model
    content["options"] = {**_stated(options), **content["options"], "recovery": options.recovery}
    content["data"] = asdict(data.summary)
    content |= measurements(states)
    content["held_out"] = compare_heldout(states)
    content["drift"] = retention(states, options.in_domain)
    content["seconds"] = {**seconds, **content["seconds"]}
    return content


def report_lines(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line per measurement: dense, compressed, recovered."""
    if content["held_out"]:
        yield perplexity_line(f"{HELD_OUT} data", content["held_out"])
    yield from measurement_lines(content)


if __name__ == "__main__":
    run_program(main)
