"""The tasks of lm-eval, EleutherAI's evaluation harness, on a model in memory, dense or compressed."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fasc_lightning._utils import evaluating, require

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Metrics of multiple-choice tasks for which guessing scores 1 / choices.
_GUESSED = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task.

    Attributes:
        value: The value from lm-eval: accuracies are fractions, not percent.
        stderr: Its standard error; None if lm-eval gives none (a single item, some aggregations).
        chance: The value of guessing; None if it is not known.
        higher_is_better: The task's statement, or None.
    """

    value: float
    stderr: float | None
    chance: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class HarnessResult:
    """Outcome of :func:`run_harness`.

    Attributes:
        scores: By task or group, then by metric; a metric after one of lm-eval's answer filters is named
            "metric,filter".
        counts: Number of items of each task.
        num_fewshot: Examples in each task's prompts.
        versions: Versions of lm-eval, under "lm_eval", and of each task.
    """

    scores: dict[str, dict[str, HarnessScore]]
    counts: dict[str, int]
    num_fewshot: dict[str, int]
    versions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain dicts and numbers."""
        return asdict(self)


def harness_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = False,
) -> HFLM:
    """Wrap a model that is in memory as lm-eval's ``HFLM``; nothing is saved, reloaded or copied.

    Log-probabilities that are not finite raise an error with the task's name; lm-eval would count the item as answered.

    Args:
        model: Causal language model, dense or with compressed layers. It is put in eval mode, as HFLM does.
        tokenizer: Its tokenizer.
        batch_size: Sequences per forward pass.
        max_length: Longest sequence in tokens; None for the model's own limit.
        progress: Whether to show progress bars.

    Raises:
        ModuleNotFoundError: If lm-eval is not installed.
    """
    _check_installed()
    from lm_eval.models.huggingface import HFLM

    class FiniteHFLM(HFLM):
        """HFLM that refuses log-probabilities that are not finite."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            results = super().loglikelihood(requests, disable_tqdm)
            _check_finite(requests, (value for value, _ in results))
            return results

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            results = super().loglikelihood_rolling(requests, disable_tqdm or not progress)
            _check_finite(requests, results)
            return results

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm or not progress, **options)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return super().generate_until(requests, disable_tqdm or not progress)

    # HFLM warns that its loading options have no effect on a model in memory.
    with _quiet("lm_eval", logging.ERROR):
        return FiniteHFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | PathLike[str] | dict[str, Any]],
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    bootstrap_iters: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> HarnessResult:
    """Run tasks of lm-eval on a model.

    Tasks by name read their data from the hub. A YAML file or a dict of the same form can name local files
    (``dataset_path: json``); then nothing is downloaded. The random states of Python, numpy and torch are restored.

    Args:
        model: Causal language model, dense or with compressed layers; its training mode is restored.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups, paths of YAML files, or task configurations.
        limit: Items of each task: a number, or a fraction below 1; None for all.
        num_fewshot: Examples in a prompt; None for each task's own number. A task that fixes it at 0 keeps that.
        batch_size: Sequences per forward pass.
        max_length: Longest sequence in tokens; None for the model's own limit.
        bootstrap_iters: Resamples for standard errors that have no closed form.
        seed: Seed of the few-shot examples and all other draws.
        progress: Whether to show progress bars and lm-eval's messages.

    Returns:
        Scores with standard errors and chance levels, and versions.

    Raises:
        ModuleNotFoundError: If lm-eval is not installed.
        ValueError: If there are no tasks, or a task is unknown.
        FloatingPointError: If a log-probability or a metric is not finite; the message names the task.
    """
    _check_installed()
    import lm_eval
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    if isinstance(tasks, str | PathLike | dict) or not tasks:
        raise ValueError(f"Expected a list of at least one task but got {tasks!r}.")
    specs = [dict(task) if isinstance(task, dict) else str(task) for task in tasks]
    with evaluating(model), _own_randomness(seed), _quiet("lm_eval", logging.NOTSET if progress else logging.ERROR):
        # lm-eval's thousands of tasks are listed only if a task is asked for by name.
        named = any(isinstance(spec, str) and not spec.endswith((".yaml", ".yml")) for spec in specs)
        try:
            loaded = TaskManager(include_defaults=named).load(specs)
        except KeyError as error:
            raise ValueError(f"Expected tasks that lm-eval knows, YAML files or dicts; got {error.args[0]}.") from None
        for task in loaded["tasks"].values():
            _set_fewshot(task, num_fewshot, seed)
        lm = harness_model(model, tokenizer, batch_size, max_length, progress)
        found: Any = evaluate(lm, loaded, limit=limit, log_samples=False, bootstrap_iters=bootstrap_iters)
    scores = {
        name: _scores(name, values, loaded["tasks"].get(name), found["higher_is_better"].get(name, {}))
        for name, values in {**found["results"], **found.get("groups", {})}.items()
    }
    return HarnessResult(
        scores=scores,
        counts={name: int(count["effective"]) for name, count in found["n-samples"].items()},
        num_fewshot=dict(found["n-shot"]),
        versions={"lm_eval": lm_eval.__version__, **found["versions"]},
    )


def _set_fewshot(task: Any, num_fewshot: int | None, seed: int) -> None:
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)


def _scores(name: str, values: Mapping[str, Any], task: Any, higher: Mapping[str, bool]) -> dict[str, HarnessScore]:
    """Return the metrics of a task or group from lm-eval's "metric,filter" and "metric_stderr,filter" entries."""
    chance = _chance(task)
    scores = {}
    for key, value in values.items():
        metric, comma, answers = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        if not math.isfinite(value):
            raise FloatingPointError(f"Expected a finite {metric} of task {name!r} but got {value}.")
        error = values.get(f"{metric}_stderr,{answers}")
        scores[metric if answers == "none" else key] = HarnessScore(
            value=float(value),
            stderr=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
            chance=chance if metric in _GUESSED else None,
            higher_is_better=higher.get(metric),
        )
    return scores


def _chance(task: Any) -> float | None:
    """Return the mean of 1 / choices over a multiple-choice task's items; None for other kinds of tasks."""
    if task is None or getattr(task, "OUTPUT_TYPE", None) != "multiple_choice":
        return None
    documents = {instance.doc_id: instance.doc for instance in task.instances}.values()
    targets = [task.doc_to_target(document) for document in documents]
    if any(isinstance(target, list) for target in targets):  # several right answers
        return None
    return sum(1 / len(task.doc_to_choice(document)) for document in documents) / len(targets)


def _check_finite(requests: Sequence[Any], values: Iterable[float]) -> None:
    for request, value in zip(requests, values, strict=True):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"Expected finite log-probabilities but item {request.doc_id} of task {request.task_name!r} got "
                f"{value}. The model's weights or activations overflow: check its dtype and the layers that were "
                "replaced."
            )


def _check_installed() -> None:
    require("The evaluation harness needs", "eval", "lm_eval", "accelerate")


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seed Python, numpy and torch, and restore their states afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what lm-eval's tasks draw from
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _quiet(logger: str, level: int) -> Iterator[None]:
    """Suppress a library's messages below a level."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(max(level, before))
    try:
        yield
    finally:
        found.setLevel(before)
