"""The groups of options (Calibration, Memory, Monitor, Gate) and their short forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

from fasc_lightning.batches import LossTerms, TokenMask
from fasc_lightning.dependence import MIN_TOKENS
from fasc_lightning.layers import Gradient
from fasc_lightning.options._types import check_fields, check_word, own, plain
from fasc_lightning.statistics import MomentsDevice

#: Width above which the paper uses sketches (Shihab et al., section 2.3).
SKETCH_ABOVE = 4096

#: Ways to hold second moments that are too large to hold whole.
ReductionKind = Literal["projected", "range", "gaussian"]

#: Columns of a sketch, or "auto" (``calibration/_sketch_policy.py``).
SketchSize = int | Literal["auto"]

#: Scores that a gate can compare with its threshold.
GateScore = Literal["debiased", "pooled", "rho"]
GATE_BY: tuple[GateScore, ...] = get_args(GateScore)

#: ``Gate(exclude="paper")``: early attention and the last projections.
PAPER = "paper"


def represent(options: Any) -> str:
    """Return a dataclass of options as text: its name and the options that differ from the defaults."""
    return f"{type(options).__name__}({', '.join(f'{name}={value!r}' for name, value in differences(options).items())})"


def differences(options: Any) -> dict[str, Any]:
    """Return the options of a dataclass that differ from their defaults."""
    found = {field.name: (getattr(options, field.name), field.default) for field in fields(options)}
    return {
        name: value
        for name, (value, default) in found.items()
        if value != (type(value)() if type(value) in SHORTHANDS else default)
    }


@dataclass(frozen=True, repr=False)
class Calibration:
    """When the fit calibrates, and which tokens count.

    Args:
        steps: Number of optimizer steps at the end of the fit that calibrate (batches in manual optimisation). None
            calibrates in the last epoch. A number is required if the last epoch is not known in advance: with
            max_steps, max_time or early stopping. An early stop waits for the calibration (Lightning then reports that
            min_steps has not been met). A stream's length is learned from its epochs. A fit that would end before its
            calibration runs this many more steps.
        update_weights: Whether the weights keep training during calibration. False freezes them: eval mode, no
            optimizer or scheduler step, no weight gradients.
        token_fraction: Share of the tokens that enters the moments. Fewer tokens are faster and less accurate.
        stages: 2 runs the calibration's batches once more, in the model compressed halfway to the budget, and adds
            their moments to the dense model's. It takes the time of a second calibration and lowers perplexity by 2 to
            3 % at keep=0.6 (docs/results.md). It needs a budget of ranks, and whole moments in one pass.
        loss_terms: How the loss averages: "mean", "sum", or a callable that returns the number of averaged terms of a
            batch. None uses the module's ``loss_terms`` method (CausalLMModule has one), else "mean". The number of
            terms of a mean comes from the loss's autograd graph. If the graph does not show it (fused losses), the
            terms are the tokens of ``token_mask``, else the samples, and a batch of tokens logs a warning.
        token_mask: Callable that returns True for the real tokens of a batch, shape (samples, length), or None. Without
            it the module's ``token_mask`` method decides; without either, every token counts.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of a wrong type.
    """

    steps: int | None = None
    update_weights: bool = True
    token_fraction: float = 1.0
    stages: int = 1
    loss_terms: LossTerms | None = None
    token_mask: TokenMask | None = None

    __repr__ = represent

    def __post_init__(self) -> None:
        check_fields(self)
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise ValueError(f"Expected `steps` to be a positive int but got {self.steps!r}.")
        if not 0 < self.token_fraction <= 1:
            raise ValueError(f"Expected `token_fraction` to be in (0, 1] but got {self.token_fraction}.")
        if type(self.stages) is not int or self.stages not in (1, 2):
            raise ValueError(f"Expected `stages` to be 1 or 2 but got {self.stages!r}.")


@dataclass(frozen=True, repr=False)
class Memory:
    """How to hold large second moments. A sketch's name alone stands for the group.

    Args:
        sketch: None holds all second moments whole. "projected" holds the moment of a layer's wider side as the weight
            sees it, W A W^T or W^T G W: as small as the narrower side, and exact for method="fasc". It needs frozen
            weights and rules out a refit. "range" sketches moments that are too wide, in a single pass. "gaussian" is
            the paper's projection with lifting, whose span is random; for comparison only.
        sketch_size: Columns of a sketch. "auto" takes 4 times the rank that the budget means for a layer, at most half
            the width. It takes 2 times if this fit's monitor observed a rho of at most its threshold before the
            calibration.
        sketch_above: Sides of layers up to this width are held whole. Wider sides are too, if a sketch would not be
            clearly smaller.
        device: "cpu" holds moments and factors on the CPU and copies rows during the backward pass. None holds them on
            the device of the fit.
        passes: Number of last epochs that calibrate, each for a share of the layers. The moments then take about
            1 / passes of the memory. The factors are the same and wait on disk. Several passes need frozen weights and
            rule out a refit, which needs all moments at once.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of a wrong type.
    """

    sketch: ReductionKind | None = None
    sketch_size: SketchSize = "auto"
    sketch_above: int = SKETCH_ABOVE
    device: MomentsDevice | None = None
    passes: int = 1

    __repr__ = represent

    def __post_init__(self) -> None:
        check_fields(self, device=own)
        if self.sketch is not None:
            check_word("sketch", self.sketch, get_args(ReductionKind), ", or None,")
        size = self.sketch_size
        if size != "auto" and (type(size) is not int or size < 1):
            raise ValueError(f'Expected `sketch_size` to be "auto" or an int of at least 1 but got {size!r}.')
        if self.device not in (None, "cpu"):
            raise ValueError(
                f"Expected `device` to be None (the device of the fit) or 'cpu' but got {self.device!r}. HINT: which "
                "device a fit is on is the Trainer's to say (accelerator=, devices=)."
            )
        if type(self.passes) is not int or self.passes < 1:
            raise ValueError(f"Expected `passes` to be a positive int but got {self.passes!r}.")


def holds_moments(passes: int, sketch: str | None) -> bool:
    """Return whether the whole moments of all layers exist at the end, which a refit reads."""
    return passes == 1 and sketch != "projected"


@dataclass(frozen=True, repr=False)
class Monitor:
    """How to observe rho during training. An int alone stands for ``every_n_steps``.

    Args:
        every_n_steps: Observe rho at optimizer steps 0, n, 2n, ... (batches in manual optimisation). None never
            observes it.
        tokens: Tokens of each batch to observe, at most a quarter of them from one sequence.
        threshold: Plain rho above which logs and summaries count a layer as high. Chance alone reaches it with few
            ``tokens``, so compare with the null.
        observations: A layer emerges if rho stays above the threshold and its null, and the interval of its debiased
            rho above zero, for this many observations.
        gradient: "input" couples x with g = W^T h, the gradient at the layer's input (the paper's definition). "output"
            couples x with h, the gradient at the layer's output.
        log_layers: Whether loggers get the figures of each layer, of rho and of the report, or only means and totals: a
            model has hundreds of layers. The history and the report hold the figures in any case. None logs them in
            Lightning, and not in a Trainer of transformers, which prints its log.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of a wrong type.
    """

    every_n_steps: int | None = None
    tokens: int = 512
    threshold: float = 0.3
    observations: int = 3
    gradient: Gradient = "input"
    log_layers: bool | None = None

    __repr__ = represent

    def __post_init__(self) -> None:
        check_fields(self)
        least = {"every_n_steps": 1, "tokens": MIN_TOKENS, "observations": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if name == "every_n_steps" and value is None:
                continue
            if type(value) is not int or value < minimum:
                raise ValueError(f"Expected `{name}` to be an int of at least {minimum} but got {value!r}.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"Expected `threshold` to be in [0, 1], as rho is, but got {self.threshold}.")
        if self.gradient not in get_args(Gradient):
            raise ValueError(
                f"Expected `gradient` to be 'input' (g = W^T h, the paper's) or 'output' (h) but got {self.gradient!r}."
            )


@dataclass(frozen=True, repr=False)
class Gate:
    """Which layers get the cheap solver. A number alone stands for ``threshold``.

    Args:
        threshold: Layers with a rho up to this get the cheap solver ("svd") instead of ``method``. None uses ``method``
            for all layers. A gate scores every batch, on as many tokens as the monitor.
        by: Score to compare with the threshold. "debiased" is signed, and around 0 for unrelated x and g. "pooled" is
            the paper's rho over all tokens and adds a third to the work of the moments. "rho" is the rho of
            minibatches; chance alone can take it past 0.3.
        exclude: Layers that get the cheap solver whatever their rho, as patterns. "paper" stands for the attention of
            blocks 0 to 2 and the output projections of the last block.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of a wrong type.
    """

    threshold: float | None = None
    by: GateScore = "debiased"
    exclude: str | list[str] | None = None

    __repr__ = represent

    def __post_init__(self) -> None:
        check_fields(self)
        check_word("by", self.by, GATE_BY)
        if self.threshold is None and self.exclude is not None:
            raise ValueError(
                f"Expected `exclude` together with a `threshold` but got {self.exclude!r} alone: without a gate every "
                "layer gets the same solver. HINT: gate=Gate(0.3, exclude=...), or FascCallback(exclude=...) to leave "
                "layers alone altogether."
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"Expected `threshold` to be in [0, 1], as rho is, but got {self.threshold}.")


#: Of every group: the option that a bare value sets, the type of that value, and the type in words.
SHORTHANDS: dict[type, tuple[str, type | tuple[type, ...], str] | None] = {
    Calibration: None,
    Memory: ("sketch", str, "the name of a sketch"),
    Monitor: ("every_n_steps", int, "an int"),
    Gate: ("threshold", (int, float), "a number in [0, 1]"),
}

Group = TypeVar("Group", Calibration, Memory, Monitor, Gate)


def as_group(name: str, group: type[Group], value: Any) -> Group:
    """Return the group that a value stands for.

    Args:
        name: Name of the option.
        group: Class of the group.
        value: A group, its short form, or None for the defaults.

    Raises:
        TypeError: If the value is neither.
        ValueError: If the value is out of range.
    """
    if isinstance(value, group):
        return value
    if value is None:
        return group()
    short, value = SHORTHANDS[group], plain(value)
    if short is None or isinstance(value, bool) or not isinstance(value, short[1]):
        accepted = f"a {group.__name__}" + ("" if short is None else f" or {short[2]}")
        raise TypeError(f"Expected `{name}` to be {accepted} but got {value!r:.200}.")
    return changed(group(), {short[0]: value}, {short[0]: name})


def changed(group: Group, values: Mapping[str, Any], names: Mapping[str, str]) -> Group:
    """Return a group with some options changed; errors use the caller's names of the options.

    Args:
        group: The group.
        values: New values by option.
        names: The caller's name of each option.
    """
    try:
        return replace(group, **values)
    except (TypeError, ValueError) as error:
        message = str(error)
        for option, name in names.items():
            message = message.replace(f"`{option}`", f"`{name}`")
        raise type(error)(message) from None
