"""The one declaration of a compression's options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import wraps
from inspect import Parameter, signature
from typing import Any, Literal, NotRequired, TypedDict, Unpack, get_type_hints

from fasc_lightning.layers import Layout, Quantization
from fasc_lightning.options._checks import (
    Allocation,
    check_budget,
    check_combinations,
    check_monitor_only,
    check_values,
)
from fasc_lightning.options._groups import (
    Calibration,
    Gate,
    Memory,
    Monitor,
    ReductionKind,
    as_group,
    changed,
    differences,
    represent,
)
from fasc_lightning.options._recovery import FactorRecovery, LoraRecovery, as_recovery, describe_recovery
from fasc_lightning.options._types import check_fields, own

#: "auto" refits where a module allows it and says why where not; True insists.
Refit = bool | Literal["auto"]

#: Of the options that are groups: the class.
GROUPS: dict[str, Any] = {"calibration": Calibration, "memory": Memory, "monitor": Monitor, "gate": Gate}


class Flat:
    """The flat name that an option of a group had before there were groups; it can be read, set and given as ever.

    Args:
        group: Name of the group.
        option: Name in the group.
    """

    def __init__(self, group: str, option: str) -> None:
        self.group, self.option = group, option

    def __get__(self, options: Any, owner: type | None = None) -> Any:
        return self if options is None else getattr(self._group(options), self.option)

    def __set__(self, options: Any, value: Any) -> None:
        setattr(options, self.group, _changed(self.group, self._group(options), {self.option: value}))

    def _group(self, options: Any) -> Any:
        return as_group(self.group, GROUPS[self.group], getattr(options, self.group))


@dataclass(eq=False, repr=False, kw_only=True)
class CompressionOptions:
    """Every option of a compression: of FascCallback, which is one, and of compress, plan and the recipes.

    The flat names that options had before there were groups (``passes``, ``update_weights``, ...) are arguments and
    attributes as well.

    Args:
        rank: The budget, as a rank: a float is a fraction of full rank (1.0 is full), an int is an absolute rank. It
            buys the degrees of freedom of uniform rank-k matrices, the sum of k (m + n - k), and they are spent where
            they matter most. What is kept never exceeds the budget.
        keep: The budget, as the fraction of the targeted layers' parameters to keep; instead of ``rank``. With neither
            of them, rho is monitored and nothing is compressed.
        method: Solver, and with it the statistics that are gathered: "fasc"; "fasc-plain", without coupled moments;
            "svd-llm"; "svd", by the activation covariance; "weight-svd"; "asvd"; "grad-svd"; "fisher-diag"; "fwsvd";
            "gfwsvd", by the one step of its iteration that needs no further pass; and, for comparison only, "fasc-eq6",
            "fasc-eq6-centred" and "fasc-eq6-literal", the eigenproblem as printed. The page of
            ``fasc_lightning.solvers`` says more.
        targets: Patterns of the layers to compress, as in peft: a list of names or last parts, or a regular
            expression. None takes every linear layer but output embeddings and tied weights.
        exclude: Patterns of layers to leave alone.
        allocation: "measured" spends one budget over all layers, by losses that are corrected on an eighth of the
            calibration's batches. "fisher" goes by predicted losses alone. "uniform" gives each layer its own share.
        layout: How a rank-k (m, n) matrix is stored: "pivot" in k (m + n - k) numbers, "factors" in k (m + n). "auto"
            is pivot, except where it saves nothing (low ranks) or is slower than a dense layer as small (high ranks).
        align: Ranks are multiples of this number, within the same budget (layers may stay dense). Matrix products like
            8 or more.
        refit: Whether factors are refitted, block by block, to the inputs that the compressed model gives them, on the
            calibration's batches. "auto" does so where the model's blocks can be run one by one, and says why where
            not. True insists. A refit keeps the moments until the end.
        quantize: "int8" holds the targeted layers in int8 when all else is done, those that stay dense included.
            "int8-dynamic" rounds their inputs as well. What is int8 does not train. None quantises nothing.
        recovery: "lora", "factors" or their options (:class:`~fasc_lightning.LoraRecovery`,
            :class:`~fasc_lightning.FactorRecovery`). This fit compresses; the next one, by a new Trainer with the same
            callback, trains adapters on the factors or the factors, and only then is quantised. None: no recovery
            follows.
        seed: Of the choice of calibration tokens, and of rho's tokens and permutations.
        calibration: The part of the fit that calibrates, and the tokens that count:
            :class:`~fasc_lightning.options.Calibration`.
        memory: How second moments are held that would take too much memory:
            :class:`~fasc_lightning.options.Memory`, or "projected", "range" or "gaussian" alone.
        monitor: What is observed of rho while the module trains: :class:`~fasc_lightning.options.Monitor`, or the
            number of steps from one observation to the next alone.
        gate: Which layers the cheap solver serves: :class:`~fasc_lightning.options.Gate`, or its threshold alone.

    Raises:
        ValueError: If an option is out of range, or options exclude each other.
        TypeError: If an option is of a wrong type.
    """

    # int and float are both spelled out: command lines read the type, and 256 is not 256.0.
    rank: int | float | None = field(default=None, kw_only=False)
    keep: float | None = field(default=None, kw_only=False)
    method: str = "fasc"
    targets: str | list[str] | None = None
    exclude: str | list[str] | None = None
    allocation: Allocation = "measured"
    layout: Layout = "auto"
    align: int = 1
    refit: Refit = "auto"
    quantize: Quantization | None = None
    recovery: Literal["lora", "factors"] | LoraRecovery | FactorRecovery | None = None
    seed: int = 0
    calibration: Calibration | None = None
    memory: Memory | ReductionKind | None = None
    monitor: Monitor | int | None = None
    gate: Gate | float | None = None

    # The flat names: this is their one table.
    calibration_steps = Flat("calibration", "steps")
    update_weights = Flat("calibration", "update_weights")
    token_fraction = Flat("calibration", "token_fraction")
    loss_terms = Flat("calibration", "loss_terms")
    token_mask = Flat("calibration", "token_mask")
    sketch = Flat("memory", "sketch")
    sketch_size = Flat("memory", "sketch_size")
    sketch_above = Flat("memory", "sketch_above")
    moments_device = Flat("memory", "device")
    passes = Flat("memory", "passes")
    monitor_every_n_steps = Flat("monitor", "every_n_steps")
    monitor_tokens = Flat("monitor", "tokens")
    rho_threshold = Flat("monitor", "threshold")
    emergence_observations = Flat("monitor", "observations")
    rho_gradient = Flat("monitor", "gradient")
    gate_threshold = Flat("gate", "threshold")
    gate_by = Flat("gate", "by")
    gate_exclude = Flat("gate", "exclude")

    __repr__ = represent

    def __post_init__(self) -> None:
        for name, group in GROUPS.items():
            setattr(self, name, as_group(name, group, getattr(self, name)))
        check_fields(self, **dict.fromkeys(GROUPS, own))
        self.recovery = as_recovery(self.recovery)
        check_values(self)
        if self.rank is None and self.keep is None and self.monitor_every_n_steps is not None:
            check_monitor_only(self)
        else:
            check_budget(self.rank, self.keep)
        check_combinations(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the options that differ from their defaults as plain data, those of groups under their flat names."""
        found: dict[str, Any] = {}
        for name, value in differences(self).items():
            if name in GROUPS:
                found |= flat(name, value)
            else:
                found[name] = _plain(value)
        return found


def flat(name: str, group: Any) -> dict[str, Any]:
    """Return the options of a group that differ from their defaults as plain data, under their flat names.

    Args:
        name: Of the group among the options.
        group: The group.
    """
    return {flat_name(name, option): _plain(part) for option, part in differences(group).items()}


def flat_name(group: str, option: str) -> str:
    """Return what an option of a group is called beside those of the callback: a gate's threshold is the gate."""
    if (group, option) == ("gate", "threshold"):
        return group
    return next(name for name, part in FLAT.items() if (part.group, part.option) == (group, option))


def options_of(options: CompressionOptions | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of options like given ones, with some changed, for any class of options.

    Args:
        options: Those to begin with; None begins with the defaults.
        changes: Options by name, flat names among them.
    """
    given = {} if options is None else {f.name: getattr(options, f.name) for f in fields(CompressionOptions)}
    return {**given, **changes}


def reported(options: CompressionOptions) -> dict[str, Any]:
    """Return the options as reports of a compression state them; what is not done yet is stated once it is."""
    found = options.to_dict()
    if options.recovery is not None:
        found.pop("quantize", None)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, LoraRecovery | FactorRecovery):
        return describe_recovery(value)
    if isinstance(value, list | tuple | set | frozenset):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else value


def _changed(name: str, group: Any, values: Mapping[str, Any]) -> Any:
    return changed(group, values, {option: flat_name(name, option) for option in vars(group)})


def _take_flat_names(cls: type) -> None:
    """Make the constructor take the flat names beside its own arguments.

    A flat name changes its option in the group that is given, or else in the group's defaults. The signature shows the
    flat names as the keywords of a TypedDict, which jsonargparse reads.
    """
    init: Callable[..., None] = cls.__init__  # type: ignore[misc]

    @wraps(init)
    def construct(self: Any, *args: Any, **given: Any) -> None:
        values: dict[str, dict[str, Any]] = {}
        for name in FLAT.keys() & given.keys():
            values.setdefault(FLAT[name].group, {})[FLAT[name].option] = given.pop(name)
        for name, options in values.items():
            given[name] = _changed(name, as_group(name, GROUPS[name], given.get(name)), options)
        init(self, *args, **given)

    types = {name: NotRequired[get_type_hints(GROUPS[part.group])[part.option]] for name, part in FLAT.items()}
    keywords: Any = TypedDict("FlatOptions", types, total=False)  # type: ignore[misc]
    names = "\n".join(f"    {name}: Another name of {part.group}.{part.option}." for name, part in FLAT.items())
    keywords.__doc__ = f"Names that options had before there were groups.\n\nArgs:\n{names}"
    declared = signature(init)
    keyword = Parameter("flat", Parameter.VAR_KEYWORD, annotation=Unpack[keywords])
    construct.__signature__ = declared.replace(parameters=[*declared.parameters.values(), keyword])  # type: ignore[attr-defined]
    cls.__init__ = construct  # type: ignore[misc]


#: The flat names.
FLAT = {name: part for name, part in vars(CompressionOptions).items() if isinstance(part, Flat)}
_take_flat_names(CompressionOptions)
