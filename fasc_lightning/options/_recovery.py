"""The options of a recovery: trained parameters, length and target of the training after a compression."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from fasc_lightning._utils import require
from fasc_lightning.layers import SCALE_DTYPE, compressed_layers
from fasc_lightning.options._block_training import RefineOptions
from fasc_lightning.options._distillation import Distillation
from fasc_lightning.options._types import check_fields

#: Source of the loss: the labels alone, the dense model, or the dense model with given options.
TeacherOption = Literal["dense"] | Distillation | None

#: Precisions of a Trainer that do not convert the model's own weights.
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

#: Learning rates by arm and by whether there is a teacher. A slightly compressed model predicts nearly the same as its
#: teacher. Steps that pay off with labels of new text would at first lead away from there.
RATES = {("lora", False): 5e-4, ("lora", True): 2e-4, ("factors", False): 5e-5, ("factors", True): 2e-5}

#: Initialisations of peft that leave the factors unchanged: an adapter adds nothing before it is trained.
_NEUTRAL_INITS = (True, "gaussian", "orthogonal")

_ADAPTERS_ONLY = "recovery trains adapters on the factors and nothing else. HINT: FactorRecovery trains the factors."
_NOT_MERGED = "such adapters are no sum with a factor, and cannot be merged into it."

#: Restricted arguments of a LoraConfig: the only allowed value, and the reason.
_REFUSED: dict[str, tuple[Any, str]] = {
    "bias": ("none", _ADAPTERS_ONLY),
    "lora_bias": (False, _ADAPTERS_ONLY),
    "modules_to_save": (None, _ADAPTERS_ONLY),
    "trainable_token_indices": (None, _ADAPTERS_ONLY),
    "target_parameters": (None, _ADAPTERS_ONLY),
    "layer_replication": (None, _ADAPTERS_ONLY),
    "inference_mode": (False, "that would freeze the adapters, too, and nothing could be trained."),
    "alora_invocation_tokens": (None, _NOT_MERGED),
    "arrow_config": (None, _NOT_MERGED),
    "kasa_config": (None, _NOT_MERGED),
    "monteclora_config": (None, _NOT_MERGED),
    "use_bdlora": (None, _NOT_MERGED),
}


class _Taught:
    """Properties derived from the options that every recovery has."""

    #: Name of the recovery in reports.
    arm: ClassVar[str]
    teacher: TeacherOption
    learning_rate: float | None

    @property
    def rate(self) -> float:
        """The learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return RATES[self.arm, self.teacher is not None]

    @property
    def distillation(self) -> Distillation | None:
        """The options of the teacher, if there is one."""
        return Distillation() if self.teacher == "dense" else self.teacher


@dataclass(frozen=True)
class LoraRecovery(_Taught):
    """Options of a recovery that trains adapters on the factors and merges them; all other weights are frozen.

    Each adapter is merged into its own factor, so ranks do not change. Layers that stayed dense get no adapters.

    Attributes:
        r: Rank of the adapters. A rank above the factor's own gains nothing.
        alpha: An adapter's product is multiplied by alpha / r; None for alpha = 2 r.
        dropout: Dropout of an adapter's input.
        config: A peft ``LoraConfig``, or its arguments, in place of the three. Its ``target_modules`` (all if it has
            none) and ``exclude_modules`` select compressed layers, or their factors, as ``targets`` does. Its
            ``rank_pattern`` and ``alpha_pattern`` use the same names.
        teacher: None (labels), "dense" (the dense model's predictions, with the defaults of
            :class:`~fasc_lightning.Distillation`), or a ``Distillation``.
        refine_steps: Steps that first train each block's factors towards the dense block's output
            (``refit/_block_training.py``); 0 for none. They use the calibration batches, after the layers have been
            replaced; in ``recover``, its own batches.
        learning_rate: Learning rate of AdamW in ``compress`` and ``recover``, for a transformers model; None for the
            rate in :data:`RATES`. A LightningModule uses its own optimizers, there and in a Trainer of yours.
        epochs: Epochs of training in ``compress`` and ``recover``.
        precision: Precision of the Trainer in ``compress`` and ``recover``, for example "bf16-mixed", but none that
            converts the model; None for the Trainer's default.
        validate_every: Optimizer steps between measurements of the held-out loss; None for eight measurements in a fit,
            or one an epoch if its length is not known.
        patience: Stop after this many measurements without an improvement; None never stops early.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of a wrong type.
        ModuleNotFoundError: If peft is not installed.
    """

    arm: ClassVar[str] = "lora"

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    config: Any = None
    teacher: TeacherOption = None
    refine_steps: int = 0
    learning_rate: float | None = None
    epochs: int = 1
    precision: Precision | None = None
    validate_every: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        _check_common(self)
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"Expected `r` to be a positive int but got {self.r!r}.")
        if not (self.alpha is None or 0 < self.alpha < math.inf):
            raise ValueError(f"Expected `alpha` to be positive or None but got {self.alpha!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Expected `dropout` to be in [0, 1) but got {self.dropout!r}.")
        require("Recovery by LoRA needs", "recovery", "peft", instead="or train the factors: recovery='factors'")
        if self.config is not None:
            if (self.r, self.alpha, self.dropout) != (8, None, 0.0):
                raise ValueError("Expected `config` or (`r`, `alpha`, `dropout`) but got both. Give one.")
            _check_config(self.lora_config())

    def lora_config(self) -> Any:
        """Return the peft ``LoraConfig``, a copy that may be changed."""
        from copy import deepcopy

        from peft import LoraConfig

        if isinstance(self.config, Mapping):
            try:
                return LoraConfig(**self.config)
            except TypeError as error:
                raise TypeError(f"Expected `config` to be arguments of a peft LoraConfig but: {error}") from error
        if self.config is not None:
            return deepcopy(self.config)
        alpha = 2 * self.r if self.alpha is None else self.alpha
        return LoraConfig(
            r=self.r,
            lora_alpha=alpha,  # type: ignore[arg-type] # a float does as well
            lora_dropout=self.dropout,
        )


@dataclass(frozen=True)
class FactorRecovery(_Taught):
    """Options of a recovery that trains the factors themselves, with their biases; all other weights are frozen.

    Attributes:
        norms: Whether normalisation layers are trained, too.
        teacher: As in :class:`LoraRecovery`.
        refine_steps: As in :class:`LoraRecovery`.
        learning_rate: As in :class:`LoraRecovery`.
        epochs: As in :class:`LoraRecovery`.
        precision: As in :class:`LoraRecovery`.
        validate_every: As in :class:`LoraRecovery`.
        patience: As in :class:`LoraRecovery`.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of a wrong type.
    """

    arm: ClassVar[str] = "factors"

    norms: bool = False
    teacher: TeacherOption = None
    refine_steps: int = 0
    learning_rate: float | None = None
    epochs: int = 1
    precision: Precision | None = None
    validate_every: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        _check_common(self)


Recovery = LoraRecovery | FactorRecovery


def as_recovery(option: Literal["lora", "factors"] | Recovery | None) -> Recovery | None:
    """Return the options that a short form stands for.

    Raises:
        ValueError: If the option is no recovery.
    """
    if option is None or isinstance(option, Recovery):
        return option
    if option == "lora":
        return LoraRecovery()
    if option == "factors":
        return FactorRecovery()
    raise ValueError(
        f"Expected `recovery` to be 'lora', 'factors', a LoraRecovery or a FactorRecovery but got {option!r}."
    )


def refine_options(recovery: Recovery | None, seed: int) -> RefineOptions | None:
    """Return the options of the refinement before a recovery trains the whole model; None if there is none."""
    if recovery is None or recovery.refine_steps == 0:
        return None
    return RefineOptions(steps=recovery.refine_steps, seed=seed)


def describe_recovery(recovery: Recovery) -> dict[str, Any]:
    """Return the options in plain types, for reports and model cards."""
    options = {name: getattr(recovery, name) for name in recovery.__dataclass_fields__}
    if options.pop("config", None) is not None:
        assert isinstance(recovery, LoraRecovery)
        config = recovery.lora_config()
        options |= {"r": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        options["config"] = _differences(config)
    options["learning_rate"] = recovery.rate
    teacher = recovery.distillation
    options["teacher"] = None if teacher is None else {k: _text(v) for k, v in asdict(teacher).items()}
    return {"arm": recovery.arm, **options}


def _differences(config: Any) -> dict[str, Any]:
    """Return the arguments of a LoraConfig that differ from the defaults; sets are sorted, alike in every process."""
    defaults = type(config)()
    found = {field.name: getattr(config, field.name) for field in fields(config)}
    return {
        name: sorted(value) if isinstance(value, set) else value if isinstance(value, dict | list) else _text(value)
        for name, value in found.items()
        if value != getattr(defaults, name)
    }


def trained_factors(model: nn.Module, recovery: FactorRecovery) -> dict[str, nn.Parameter]:
    """Return the parameters that FactorRecovery trains, by name: compressed layers and, if asked for, norms.

    Of a rounded matrix these are its scales, if they have been widened.
    """
    layers = {
        id(p)
        for layer in compressed_layers(model).values()
        for name, p in layer.named_parameters()
        if p.is_floating_point() and not (name.endswith("weight_scale") and p.dtype == SCALE_DTYPE)
    }
    norms = {
        id(p)
        for module in model.modules()
        if recovery.norms and "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }
    return {name: p for name, p in model.named_parameters() if id(p) in layers or id(p) in norms}


def _text(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def check_precision(precision: Precision | None) -> None:
    """Refuse a precision that is unknown, or that would convert the model itself.

    Raises:
        ValueError: If it is not one of :data:`Precision`, nor None.
    """
    if precision not in (None, *get_args(Precision)):
        raise ValueError(
            f"Expected `precision` to be one of {', '.join(get_args(Precision))} or None but got {precision!r}. "
            "(Lightning's true precisions would convert the model itself, for good. HINT: convert it before, "
            "`model.to(torch.bfloat16)`, and give None.)"
        )


def _check_common(recovery: Recovery) -> None:
    check_fields(recovery)
    teacher = recovery.teacher
    if not (teacher is None or teacher == "dense" or isinstance(teacher, Distillation)):
        raise ValueError(f"Expected `teacher` to be None, 'dense' or a Distillation but got {teacher!r}.")
    if recovery.learning_rate is not None and not 0 < recovery.learning_rate < math.inf:
        raise ValueError(f"Expected `learning_rate` to be positive but got {recovery.learning_rate!r}.")
    check_precision(recovery.precision)
    if type(recovery.refine_steps) is not int or recovery.refine_steps < 0:
        raise ValueError(f"Expected `refine_steps` to be an int of at least 0 but got {recovery.refine_steps!r}.")
    for name in ("epochs", "validate_every", "patience"):
        value = getattr(recovery, name)
        if value is None and name != "epochs":
            continue
        if type(value) is not int or value < 1:
            raise ValueError(f"Expected `{name}` to be a positive int but got {value!r}.")


def _check_config(config: Any) -> None:
    """Refuse adapters that would train more than the factors, or change the factors before the first step."""
    from peft import LoraConfig

    if type(config) is not LoraConfig:  # its subclasses attach or merge adapters in other ways
        raise TypeError(f"Expected `config` to be a peft LoraConfig or its arguments but got {config!r:.100}.")
    for name, (allowed, reason) in _REFUSED.items():
        value = getattr(config, name, allowed)
        if value != allowed:
            raise ValueError(f"Expected a LoraConfig with {name}={allowed!r} but got {value!r}: {reason}")
    if config.init_lora_weights not in _NEUTRAL_INITS:
        raise ValueError(
            f"Expected `init_lora_weights` to be one of {', '.join(map(repr, _NEUTRAL_INITS))} but got "
            f"{config.init_lora_weights!r}, which changes the factors, or the model's output, before the first step: "
            "the gain of the recovery could not be measured, and the change not undone."
        )
