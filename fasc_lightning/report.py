"""What a compression did: figures, JSON, a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from torch import nn

from fasc_lightning._files import whole_file
from fasc_lightning._schema import check
from fasc_lightning.expert_report import expert_summary
from fasc_lightning.expert_views import PROJECTIONS, ExpertLinear, is_fused_experts
from fasc_lightning.factorize import LayerPlan
from fasc_lightning.history import RhoRow
from fasc_lightning.lowrank import flops_per_token
from fasc_lightning.report_schema import REPORT
from fasc_lightning.sketch_sizes import SketchFigures


@dataclass(frozen=True)
class Size:
    """Parameters, bytes and FLOPs of a set of layers.

    Attributes:
        parameters: Numbers that are trained; the index of a pivoted layer is not one of them.
        bytes: Memory of parameters and buffers, indices included.
        flops_per_token: Two for each multiply-add of a linear layer, of experts the share that works on a token;
            attention and element-wise work are not counted.
    """

    parameters: int
    bytes: int
    flops_per_token: int


@dataclass(frozen=True)
class LayerReport:
    """One targeted layer; ``rho`` and its companions are NaN where they were not measured.

    ``method`` is the solver that served it, and ``flags`` say why its rho may mislead or is undefined. ``sketches`` has
    the size and the estimated error of the sides whose moments were sketched, "inputs" and "outputs"; it is empty for
    exact ones.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    layout: str
    tokens: int
    rho: float
    rho_null: float
    rho_debiased: float
    loss: float
    method: str
    flags: tuple[str, ...] = ()
    sketches: dict[str, SketchFigures] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: LayerPlan, rho: RhoRow, flags: tuple[str, ...]) -> LayerReport:
        """Put together what became of a layer and what was measured on it."""
        return cls(
            name=plan.name,
            shape=plan.shape,
            rank=plan.rank,
            layout=plan.layout,
            tokens=plan.tokens,
            rho=rho["rho"],
            rho_null=rho["null"],
            rho_debiased=rho["debiased"],
            loss=plan.loss,
            method=plan.method,
            flags=flags,
            sketches=plan.sketches,
        )


@dataclass
class CompressionReport:
    """What was done and what it cost; ``str()`` is a table, :meth:`to_dict` is the JSON form.

    Attributes:
        method: Solver.
        options: The options of the compression.
        seed: Of token subsampling.
        targeted: Sizes of the targeted layers, "dense" and "compressed"; if they were quantised, too, then also
            "unquantized", just before that.
        whole: Sizes of the whole model, alike.
        seconds: By phase: calibrate, factorize, swap, and refit, refine, recover and quantize if there were such.
        moments_bytes: Memory of the statistics.
        peak_memory_bytes: Largest memory of the process (on CUDA: of the device) so far.
        layers: One row a targeted layer.
        refit: What a refit did: layers changed, loss before and after on held-out batches, how many batches there
            were, whether all was put back; None if there was none.
        refine: What a refinement of the blocks did, likewise, in blocks.
        recovery: What a recovery did, the figures of :class:`~fasc_lightning.RecoveryCallback`; None if there was none.
        versions: Of the libraries.
    """

    method: str
    options: dict[str, Any]
    seed: int
    targeted: dict[str, Size]
    whole: dict[str, Size]
    seconds: dict[str, float]
    moments_bytes: int
    peak_memory_bytes: int
    layers: list[LayerReport] = field(repr=False)
    refit: dict[str, Any] | None = None
    refine: dict[str, Any] | None = None
    recovery: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=lambda: library_versions())

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only; sizes are grouped by figure, NaN becomes None."""
        result = asdict(self)
        for row in result["layers"]:
            if not row["sketches"]:  # the rows of exact moments are as they were before there were sketches
                del row["sketches"]
        for name in ("targeted", "whole"):
            sizes: Mapping[str, Size] = getattr(self, name)
            result[name] = {
                figure: {state: getattr(size, figure) for state, size in sizes.items()}
                for figure in ("parameters", "bytes", "flops_per_token")
            }
        return _plain(result)

    def to_json(self, path: str | Path) -> None:
        """Write the report as JSON."""
        write_json(self.to_dict(), path)

    def with_quantized(
        self, model: nn.Module, quantization: str, layers: Iterable[str], seconds: float
    ) -> CompressionReport:
        """Return the report with the sizes of the model as it is now, its layers quantised.

        Args:
            model: The quantised model.
            quantization: How.
            layers: Names of the quantised layers in the model, which are the targeted ones.
            seconds: That it took.
        """
        targeted = measure_layers({name: model.get_submodule(name) for name in layers})
        return replace(
            self,
            options={**self.options, "quantize": quantization},
            targeted={**self.targeted, "unquantized": self.targeted["compressed"], "compressed": targeted},
            whole={**self.whole, "unquantized": self.whole["compressed"], "compressed": measure_model(model)},
            seconds={**self.seconds, "quantize": seconds},
        )

    def with_recovered(self, figures: dict[str, Any]) -> CompressionReport:
        """Return the report with what a recovery did."""
        return replace(
            self,
            recovery=figures,
            seconds={**self.seconds, "recover": figures["seconds"]},
            peak_memory_bytes=max(self.peak_memory_bytes, figures.get("peak_memory_bytes", 0)),
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CompressionReport:
        """Return the report of which :meth:`to_dict` made ``content``.

        Raises:
            ValueError: If it is no such content, naming the entry.
        """
        check(content, REPORT, "The report")
        figures = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        for name in ("targeted", "whole"):
            sizes = content[name]
            states = next(iter(sizes.values()))
            figures[name] = {state: Size(**{figure: sizes[figure][state] for figure in sizes}) for state in states}
        figures["layers"] = [_layer_report(row) for row in content["layers"]]
        return cls(**figures)

    @property
    def plan(self) -> dict[str, dict[str, Any]]:
        """The plan of the compressed model, for :func:`~fasc_lightning.apply_plan`."""
        quantize = self.options.get("quantize")
        form = {} if quantize is None else {"quantize": quantize}
        return {
            layer.name: {"rank": layer.rank, "layout": layer.layout, **form}
            for layer in self.layers
            if layer.layout != "dense" or quantize is not None
        }

    @property
    def kept(self) -> float:
        """Fraction of the targeted layers' parameters that is kept."""
        return self.targeted["compressed"].parameters / self.targeted["dense"].parameters

    def __str__(self) -> str:
        return summary_table(self)


def _layer_report(row: Mapping[str, Any]) -> LayerReport:
    """Return a row as it was before JSON: tuples are no lists, and NaN is not None."""
    figures: dict[str, Any] = {name: float("nan") if value is None else value for name, value in row.items()}
    sketches = {
        side: SketchFigures(size=of["size"], error=float("nan") if of["error"] is None else of["error"])
        for side, of in row.get("sketches", {}).items()
    }
    known = {field.name for field in fields(LayerReport)}
    figures = {name: value for name, value in figures.items() if name in known}
    return LayerReport(**{**figures, "shape": tuple(row["shape"]), "flags": tuple(row["flags"]), "sketches": sketches})


def write_json(content: Any, path: str | Path) -> None:
    """Write JSON whole or not at all."""
    with whole_file(Path(path)) as temporary:
        temporary.write_text(json.dumps(_plain(content), indent=2) + "\n")


def _plain(value: Any) -> Any:
    """Return JSON types: tuples become lists, NaN (which JSON has not) None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)


def log_report(loggers: Iterable[Logger], report: CompressionReport, step: int) -> None:
    """Send a report's figures to loggers; ``self.log`` is not allowed at the end of a fit."""
    for logger in loggers:
        separator = logger.group_separator
        figures: dict[str, float] = {
            f"fasc{separator}kept": report.kept,
            f"fasc{separator}parameters": report.targeted["compressed"].parameters,
            f"fasc{separator}bytes": report.targeted["compressed"].bytes,
            f"fasc{separator}loss": sum(layer.loss for layer in report.layers),
        }
        for layer in report.layers:
            figures[f"fasc_rank{separator}{layer.name}"] = layer.rank
            figures[f"fasc_loss{separator}{layer.name}"] = layer.loss
            if layer.rho == layer.rho:
                # Under a name of its own: monitoring logs rho of other tokens.
                figures[f"fasc_rho{separator}{layer.name}"] = layer.rho
        logger.log_metrics(figures, step=step)
        logger.save()


def measure_layers(layers: Mapping[str, nn.Module]) -> Size:
    """Return the size of some layers, dense or compressed."""
    modules = list({id(m): m for m in layers.values()}.values())
    counts = [_counts(m) for m in modules]
    return Size(
        parameters=sum(parameters for parameters, _ in counts),
        bytes=sum(size for _, size in counts),
        flops_per_token=_flops(modules),
    )


def measure_model(model: nn.Module) -> Size:
    """Return the size of a whole model; shared parameters count once."""
    parameters, size = _counts(model)
    return Size(parameters=parameters, bytes=size, flops_per_token=_flops(_outermost_linear(model)))


def _outermost_linear(model: nn.Module) -> list[nn.Module]:
    """Return linear and low-rank layers, not looking inside the latter."""
    if flops_per_token(model) > 0:
        return [model]
    if is_fused_experts(model):
        one = [ExpertLinear(model, 0, projection) for projection in PROJECTIONS]
        count: Any = model.num_experts  # all of one shape
        return one * count
    return [layer for child in model.children() for layer in _outermost_linear(child)]


def _flops(layers: Iterable[nn.Module]) -> int:
    return round(sum(flops_per_token(layer) * getattr(layer, "expert_share", 1.0) for layer in layers))


def _counts(module: nn.Module) -> tuple[int, int]:
    """Return parameters, and bytes of these and of buffers; each is asked for once, as an expert's is a slice."""
    parameters = list(module.parameters())
    size = sum(t.numel() * t.element_size() for t in (*parameters, *module.buffers()))
    return sum(p.numel() for p in parameters), size


def library_versions() -> dict[str, str]:
    """Return the versions of this package and of what its results depend on."""
    versions = {}
    for package in ("fasc-lightning", "torch", "lightning", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def summary_table(report: CompressionReport) -> str:
    """Return the report as text: one row a kind of layer (the last part of its name), then totals."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.method}: {report.kept:.1%} of the targeted parameters kept")
    for column in ("layers", "count", "dense", "rank / full", "parameters", "kept", "loss share", "rho debiased"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    kinds: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        kinds.setdefault(layer.name.rsplit(".", 1)[-1], []).append(layer)
    total_loss = sum(layer.loss for layer in report.layers) or 1.0
    for kind, rows in kinds.items():
        before = sum(r.shape[0] * r.shape[1] for r in rows)
        after = sum(_weights(r) for r in rows)
        ranks = sorted(r.rank / min(r.shape) for r in rows)
        rhos = sorted(r.rho_debiased for r in rows if r.rho_debiased == r.rho_debiased)
        table.add_row(
            kind,
            str(len(rows)),
            str(sum(r.layout == "dense" for r in rows)),
            f"{ranks[0]:.2f}-{ranks[-1]:.2f}",
            f"{before:,}",
            f"{after / before:.1%}",
            f"{sum(r.loss for r in rows) / total_loss:.1%}",
            f"{rhos[len(rhos) // 2]:.3f}" if rhos else "-",
        )
    console = Console(width=110, file=(text := StringIO()))
    console.print(table)
    lines = [text.getvalue().rstrip()]
    solvers = Counter(layer.method for layer in report.layers)
    gate, by = (report.options.get(name) for name in ("gate", "gate_by"))
    if gate is not None:
        served = ", ".join(f"{solvers[name]} layers" + f" on {name}" for name in sorted({report.method, *solvers}))
        lines.append(f"gate {gate:g} on {by} rho: {served}")
    flags = Counter(flag for layer in report.layers for flag in layer.flags)
    if flags and gate is not None:
        lines.append("rho may mislead: " + ", ".join(f"{flag} ({count} layers)" for flag, count in flags.items()))
    if sketched := sketch_line(report.layers):
        lines.append(sketched)
    for title, sizes in (("targeted layers", report.targeted), ("whole model", report.whole)):
        before_size, after_size = sizes["dense"], sizes["compressed"]
        stages = [sizes[state] for state in ("dense", "unquantized", "compressed") if state in sizes]
        megabytes = " -> ".join(f"{size.bytes / 1e6:.1f}" for size in stages)
        lines.append(
            f"{title}: {before_size.parameters:,} -> {after_size.parameters:,} parameters "
            f"({after_size.parameters / before_size.parameters:.1%}), {megabytes} MB, "
            f"{before_size.flops_per_token / 1e6:.1f} -> {after_size.flops_per_token / 1e6:.1f} MFLOPs a token"
        )
    lines += expert_summary(report.layers)
    if "unquantized" in report.targeted:
        lines.append(f"the last of these sizes is with the targeted layers in {report.options['quantize']}")
    for phase, parts in (("refit", "layers"), ("refine", "blocks")):
        figures = getattr(report, phase)
        if figures is not None:
            loss = figures["loss"]
            lines.append(
                f"{phase}: {outcome(figures, parts)}; held-out loss {loss['before']:.4f} -> {loss['after']:.4f}"
            )
    if report.recovery is not None:
        lines.append(recovery_line(report.recovery))
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in report.seconds.items())
    lines.append(f"{seconds}; peak memory {report.peak_memory_bytes / 1e9:.2f} GB")
    return "\n".join(lines)


def sketch_line(layers: Sequence[LayerReport]) -> str:
    """Return what was sketched and how far off it is thought to be, in a line; "" if nothing was."""
    sides = [side for layer in layers for side in layer.sketches.values()]
    if not sides:
        return ""
    sizes = sorted({side["size"] for side in sides})
    errors = sorted(side["error"] for side in sides if side["error"] == side["error"])
    columns = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    off = f"{errors[len(errors) // 2]:.2%} in the middle, {errors[-1]:.2%} at most" if errors else "not known"
    return (
        f"sketched moments: {len(sides)} sides of {sum(bool(layer.sketches) for layer in layers)} layers in {columns} "
        f"columns; estimated error {off}"
    )


def outcome(figures: Mapping[str, Any], parts: str) -> str:
    """Return what a refit or a refinement did to layers or blocks, in a few words."""
    return "put back" if figures["reverted"] else f"{figures[parts]} {parts} changed"


def recovery_line(figures: Mapping[str, Any]) -> str:
    """Return what a recovery did, in a line."""
    loss = figures["held_out_loss"]
    what = f"recovery ({figures['arm']}{', distilled' if figures['teacher'] else ''}, "
    what += f"{figures['trained_parameters']:,} parameters, {figures['tokens']:,} tokens)"
    diverged = figures.get("diverged_at")
    end = "" if diverged is None else f"; stopped after {diverged} steps, as the numbers were no longer finite"
    if figures["reverted"]:
        return f"{what}: nothing lowered the held-out loss of {loss['before']:.4f}; the factors are what they were{end}"
    return (
        f"{what}: held-out loss {loss['before']:.4f} -> {loss['after']:.4f}, at step {figures['best_step']} of "
        f"{figures['steps']}{end}"
    )


def _weights(layer: LayerReport) -> int:
    m, n = layer.shape
    if layer.layout == "dense":
        return m * n
    return layer.rank * (m + n) - (layer.rank**2 if layer.layout == "pivot" else 0)
