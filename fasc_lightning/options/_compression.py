"""The declaration of all options of a compression."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, Unpack, get_type_hints

from fasc_lightning.layers import Grid, Layout
from fasc_lightning.options._allocations import measures_losses
from fasc_lightning.options._checks import (
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
from fasc_lightning.options._rounding import Quantize, QuantizeWord, grids_of, is_calibrated, rounds
from fasc_lightning.options._spellings import own_spelling
from fasc_lightning.options._types import check_fields, check_keywords, own

#: Share of the tokens in G where all layers get the same bits.
OUTPUT_SHARE = 0.25

#: "auto" refits if the module allows it and logs the reason if not; True raises an error instead.
Refit = bool | Literal["auto"]

#: Class of each option that is a group.
GROUPS: dict[str, Any] = {"calibration": Calibration, "memory": Memory, "monitor": Monitor, "gate": Gate}


class Flat:
    """The flat name of an option in a group, from before there were groups; an attribute and an argument.

    Args:
        group: Name of the group.
        option: Name of the option in the group.
    """

    def __init__(self, group: str, option: str) -> None:
        self.group, self.option = group, option

    def __get__(self, options: Any, owner: type | None = None) -> Any:
        return self if options is None else getattr(getattr(options, self.group), self.option)

    def __set__(self, options: Any, value: Any) -> None:
        setattr(options, self.group, _changed(self.group, getattr(options, self.group), {self.option: value}))


@dataclass(eq=False, repr=False, kw_only=True)
class CompressionOptions:
    """All options of a compression; FascCallback, compress, plan and the recipes take them.

    The flat names from before there were groups (``passes``, ``update_weights``, ...) also work, as arguments and as
    attributes.

    Args:
        rank: Budget as a rank: a float is a fraction of full rank (1.0 is full), an int is an absolute rank. The budget
            is the number of parameters of uniform rank-k (m, n) matrices, the sum of k (m + n - k). ``allocation``
            spends it and never exceeds it.
        keep: Budget as the fraction of the targeted layers' parameters to keep, instead of ``rank``.
        size: Budget in bytes, instead of ``rank``: a fraction of the targeted layers' bytes in 16 bits (0.27), or the
            bytes of the whole model ("90MB"), with other numbers in 16 bits. Each layer gets 2, 3, 4, 8 or 16 bits, few
            bits and a low-rank residual in int8, or a low rank in int8, where the budget lowers the loss most. Without
            any of ``rank``, ``keep``, ``size`` and ``quantize``, the callback monitors rho and compresses nothing.
        method: Solver, which also decides the statistics to gather: "fasc"; "fasc-plain" (no coupled moments);
            "svd-llm"; "svd" (activation covariance); "weight-svd"; "asvd"; "grad-svd"; "fisher-diag"; "fwsvd"; "gfwsvd"
            (only the step of its iteration that needs no further pass). For comparison only: "fasc-eq6",
            "fasc-eq6-centred" and "fasc-eq6-literal", the eigenproblem as printed. ``fasc_lightning.solvers`` documents
            each, and ``fasc_lightning.solvers.register_solver`` adds others.
        targets: Layers to compress, as patterns of peft: a list of names or last parts of names, or a regular
            expression. None takes every linear layer except output embeddings and tied weights.
        exclude: Layers to leave alone, as patterns like those in ``targets``. ``ignore`` is another name of it.
        allocation: "measured" spends one budget over all layers by predicted losses, which it corrects on an eighth of
            the calibration batches. "fisher" uses predicted losses alone. "uniform" gives each layer its own
            budget; of a size, it gives all layers the same bits. ``fasc_lightning.compression.register_allocation``
            adds others.
        layout: Storage of a rank-k (m, n) matrix: "pivot" takes k (m + n - k) numbers, "factors" takes k (m + n).
            "auto" is pivot, except where pivot saves nothing (low ranks) or where a dense layer is faster and no larger
            (high ranks).
        align: Ranks are multiples of this number, within the same budget; layers may stay dense. Matrix products run
            faster with 8 or more.
        refit: Whether to refit the factors, block by block, to the inputs that they get in the compressed model, on the
            calibration batches. "auto" refits if the model's blocks can run one by one, and logs the reason if not.
            True raises an error instead. A refit keeps all moments until the end. "auto" refits rounded layers below a
            quarter of the bytes in 16 bits: above, it takes longer than all else, and gains little (docs/bytes.md).
        quantize: Bits of all targeted layers: "int8", "int4", "int3", "int2", or
            :class:`~fasc_lightning.options.Quantize` for other grids. Layers keep their full rank, and are rounded by
            the calibration. Beside ``rank`` or ``keep``, "int8" rounds the factors as the last step, and layers that
            stayed dense; "int8-dynamic" also rounds their inputs.
        recovery: "lora", "factors" or their options (:class:`~fasc_lightning.LoraRecovery`,
            :class:`~fasc_lightning.FactorRecovery`). This fit compresses. The next fit, by a new Trainer with the same
            callback, trains adapters on the factors ("lora") or the factors; int8 waits for its end. None recovers
            nothing.
        seed: Seed of the choice of calibration tokens, and of rho's tokens and permutations.
        calibration: When the fit calibrates, and which tokens count: :class:`~fasc_lightning.options.Calibration`.
        memory: How to hold large second moments: :class:`~fasc_lightning.options.Memory`, or only its sketch
            ("projected", "range" or "gaussian").
        monitor: How to observe rho during training: :class:`~fasc_lightning.options.Monitor`, or only its number of
            steps between observations.
        gate: Which layers get the cheap solver: :class:`~fasc_lightning.options.Gate`, or only its threshold.

    Raises:
        ValueError: If an option is out of range, or if options exclude each other.
        TypeError: If an option is of a wrong type.
    """

    # Command lines read this type. It names both int and float because 256 is not 256.0.
    rank: int | float | None = field(default=None, kw_only=False)
    keep: float | None = field(default=None, kw_only=False)
    size: float | str | None = None
    method: str = "fasc"
    targets: str | list[str] | None = None
    exclude: str | list[str] | None = None
    allocation: str = "measured"
    layout: Layout = "auto"
    align: int = 1
    refit: Refit = "auto"
    quantize: QuantizeWord | Quantize | None = None
    recovery: Literal["lora", "factors"] | LoraRecovery | FactorRecovery | None = None
    seed: int = 0
    calibration: Calibration | None = None
    memory: Memory | ReductionKind | None = None
    monitor: Monitor | int | None = None
    gate: Gate | float | None = None

    # The only table of flat names.
    calibration_steps = Flat("calibration", "steps")
    update_weights = Flat("calibration", "update_weights")
    token_fraction = Flat("calibration", "token_fraction")
    stages = Flat("calibration", "stages")
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
    log_layers = Flat("monitor", "log_layers")
    gate_threshold = Flat("gate", "threshold")
    gate_by = Flat("gate", "by")
    gate_exclude = Flat("gate", "exclude")

    __repr__ = represent

    def __post_init__(self) -> None:
        check_fields(self, **dict.fromkeys(GROUPS, own))
        check_values(self)
        if not self.compresses and self.monitor_every_n_steps is not None:
            check_monitor_only(self)
        elif not self.rounds:
            check_budget(self.rank, self.keep)
        check_combinations(self)

    @property
    def ignore(self) -> str | list[str] | None:
        """Another name of ``exclude``."""
        return self.exclude

    @ignore.setter
    def ignore(self, value: str | list[str] | None) -> None:
        self.exclude = value

    @property
    def compresses(self) -> bool:
        """Whether there is a budget."""
        return not (self.rank is None and self.keep is None) or self.rounds

    @property
    def rounds(self) -> bool:
        """Whether layers of full rank are rounded by the calibration, in place of being factorised."""
        return rounds(self)

    @property
    def measures(self) -> bool:
        """Whether layers' losses are measured on batches: not if there is nothing to choose."""
        return measures_losses(self.allocation) and not (self.rounds and self.size is None)

    @property
    def output_share(self) -> float:
        """Share of the tokens whose gradients enter G: a part where G only tells how large the losses are.

        The same bits in all layers are that case, unless a refit follows, as "auto" may below 4 bits.
        """
        told = self.rounds and self.size is None and self.refit is not True and min(g.bits for g in self.grids) >= 4
        return OUTPUT_SHARE if told else 1.0

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grids that layers of full rank may get; none if layers are factorised."""
        return grids_of(self)

    @property
    def offers_ranks(self) -> bool:
        """Whether a size is spent over low ranks and residuals in int8, too."""
        return self.size is not None

    @property
    def is_calibrated(self) -> bool:
        """Whether rounding follows the calibration's moments."""
        return is_calibrated(self)

    if not TYPE_CHECKING:  # type checkers would otherwise allow every attribute

        def __setattr__(self, name: str, value: Any) -> None:
            """Set an option; short forms of groups and of a recovery become what they stand for."""
            if name in GROUPS:
                value = as_group(name, GROUPS[name], value)
            super().__setattr__(name, as_recovery(value) if name == "recovery" else value)

    def to_dict(self) -> dict[str, Any]:
        """Return the options that differ from their defaults as plain data; options of groups have their flat names."""
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
        name: Name of the group among the options.
        group: The group.
    """
    return {flat_name(name, option): _plain(part) for option, part in differences(group).items()}


def flat_name(group: str, option: str) -> str:
    """Return the flat name of an option of a group; for a gate's threshold it is "gate"."""
    if (group, option) == ("gate", "threshold"):
        return group
    return next(name for name, part in FLAT.items() if (part.group, part.option) == (group, option))


def options_of(
    options: CompressionOptions | None, changes: Mapping[str, Any], caller: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Return the arguments that make options like the given ones with some changes, for any class of options.

    Args:
        options: The given options; None for the defaults.
        changes: Changed options by name; flat names are allowed.
        caller: The function whose keywords they are, for messages; None leaves names to the class of options.

    Raises:
        TypeError: If the given options are none, or if a name is unknown.
    """
    if not isinstance(options, CompressionOptions | None):
        raise TypeError(
            f"Expected `options` to be a CompressionOptions but got {options!r:.200}. HINT: single options are "
            "keywords, as in rank=0.5."
        )
    if caller is not None:
        check_keywords(caller, changes, [*signature(caller).parameters, *_NAMES])
    given = {} if options is None else {f.name: getattr(options, f.name) for f in fields(CompressionOptions)}
    return {**given, **own_spelling(changes, "ignore")}


def reported(options: CompressionOptions) -> dict[str, Any]:
    """Return the options as a compression's report states them; int8 is left out if a recovery comes first."""
    found = options.to_dict()
    found.pop("log_layers", None)  # it does not change the compression
    if options.recovery is not None and not options.rounds:
        found.pop("quantize", None)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, LoraRecovery | FactorRecovery):
        return describe_recovery(value)
    if isinstance(value, Quantize):
        return asdict(value)
    if isinstance(value, list | tuple | set | frozenset):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    return named(value)


def named(value: Any) -> Any:
    """Return an option in plain data. A callable becomes the name of its code, because files hold no code."""
    if not callable(value):
        return value
    code = value if hasattr(value, "__qualname__") else type(value)
    return f"{code.__module__}.{code.__qualname__}"


def _changed(name: str, group: Any, values: Mapping[str, Any]) -> Any:
    return changed(group, values, {option: flat_name(name, option) for option in vars(group)})


def _take_flat_names(cls: type) -> None:
    """Make the constructor take the flat names and the other spelling of ``exclude`` beside its own arguments.

    A flat name changes its option in the given group, or else in the group's defaults. The signature shows the flat
    names as keywords of a TypedDict, which jsonargparse reads.
    """
    init: Callable[..., None] = cls.__init__  # type: ignore[misc]

    @wraps(init)
    def construct(self: Any, *args: Any, **given: Any) -> None:
        values: dict[str, dict[str, Any]] = {}
        check_keywords(type(self), given, _NAMES)
        given = own_spelling(given, "ignore")
        for name in FLAT.keys() & given.keys():
            values.setdefault(FLAT[name].group, {})[FLAT[name].option] = given.pop(name)
        for name, options in values.items():
            given[name] = _changed(name, as_group(name, GROUPS[name], given.get(name)), options)
        init(self, *args, **given)

    types = {name: NotRequired[get_type_hints(GROUPS[part.group])[part.option]] for name, part in FLAT.items()}
    types["ignore"] = NotRequired[get_type_hints(cls)["exclude"]]
    keywords: Any = TypedDict("FlatOptions", types, total=False)  # type: ignore[misc]
    names = "\n".join(f"    {name}: Another name of {part.group}.{part.option}." for name, part in FLAT.items())
    names += "\n    ignore: Another name of exclude."
    keywords.__doc__ = f"Names that options had before there were groups, and another spelling.\n\nArgs:\n{names}"
    declared = signature(init)
    keyword = Parameter("flat", Parameter.VAR_KEYWORD, annotation=Unpack[keywords])
    construct.__signature__ = declared.replace(parameters=[*declared.parameters.values(), keyword])  # type: ignore[attr-defined]
    cls.__init__ = construct  # type: ignore[misc]


#: Flat names and the options they stand for.
FLAT = {name: part for name, part in vars(CompressionOptions).items() if isinstance(part, Flat)}
#: All names of options as keywords.
_NAMES = (*(f.name for f in fields(CompressionOptions)), *FLAT, "ignore")
_take_flat_names(CompressionOptions)
