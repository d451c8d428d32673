"""A report as text: the summary of a compression."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fasc_lightning._utils import amount
from fasc_lightning.compression._expert_report import expert_summary
from fasc_lightning.compression._layer_report import LayerReport
from fasc_lightning.options import Gate

if TYPE_CHECKING:
    from fasc_lightning.compression._report import CompressionReport

#: The phases of a compression by their names in ``CompressionReport.seconds``.
PHASES = {
    "calibrate": "calibration",
    "factorize": "factorising",
    "refine": "refinement",
    "recover": "recovery",
    "quantize": "quantising",
}


def summary_table(report: CompressionReport) -> str:
    """Return the report as text: one row per kind of layer (the last part of its name), then totals."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    rounded = any(layer.bits is not None for layer in report.layers)
    kept = f"{bytes_kept(report.layers):.1%} of the targeted layers' bytes in 16 bits"
    if not rounded:
        kept = f"{report.kept:.1%} of the targeted parameters"
    table = Table(title=f"{report.method}: {kept} kept")
    form = "bits" if rounded else "rank / full"
    for column in ("layers", "count", "dense", form, "parameters", "kept", "loss share", "rho debiased"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    kinds: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        kinds.setdefault(layer.name.rsplit(".", 1)[-1], []).append(layer)
    total_loss = sum(layer.loss for layer in report.layers) or 1.0
    for kind, rows in kinds.items():
        before = sum(r.shape[0] * r.shape[1] for r in rows)
        after = sum(_weights(r) for r in rows)
        ranks = sorted(r.rank / min(r.shape) for r in rows)
        share = bytes_kept(rows) if rounded else after / before
        rhos = sorted(r.rho_debiased for r in rows if r.rho_debiased == r.rho_debiased)
        table.add_row(
            kind,
            str(len(rows)),
            str(sum(r.layout == "dense" and r.bits is None for r in rows)),
            _bits_text(rows) if rounded else f"{ranks[0]:.2f}-{ranks[-1]:.2f}",
            f"{before:,}",
            f"{share:.1%}",
            f"{sum(r.loss for r in rows) / total_loss:.1%}",
            f"{rhos[len(rhos) // 2]:.3f}" if rhos else "-",
        )
    console = Console(width=110, file=(text := StringIO()), force_terminal=False, force_jupyter=False)
    console.print(table)
    lines = [text.getvalue().rstrip()]
    solvers = Counter(layer.method for layer in report.layers)
    gate, by = report.options.get("gate"), report.options.get("gate_by", Gate.by)
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
        sizes_text = " -> ".join(amount(size.bytes, "B") for size in stages)
        lines.append(
            f"{title}: {before_size.parameters:,} -> {after_size.parameters:,} parameters "
            f"({after_size.parameters / before_size.parameters:.1%}), {sizes_text}, "
            f"{amount(before_size.flops_per_token, 'FLOPs')} -> {amount(after_size.flops_per_token, 'FLOPs')} a token"
        )
    lines += expert_summary(report.layers)
    if "unquantized" in report.targeted:
        lines.append(f"the last of these sizes is with the targeted layers in {report.options['quantize']}")
    for phase, parts in (("refit", "layers"), ("refine", "blocks")):
        figures = getattr(report, phase)
        if figures is not None:
            loss = figures["loss"]
            lines.append(
                f"{PHASES.get(phase, phase)}: {outcome(figures, parts)}; "
                f"held-out loss {loss['before']:.4f} -> {loss['after']:.4f}"
            )
    if report.recovery is not None:
        lines.append(recovery_line(report.recovery))
    if report.validation is not None:
        loss, batches = report.validation["loss"], report.validation["batches"]
        lines.append(
            f"validation loss {loss['before']:.4f} -> {loss['after']:.4f}, over {batches} batch{'es' * (batches > 1)}"
        )
    names = {**PHASES, "factorize": "rounding"} if rounded else PHASES
    seconds = ", ".join(f"{names.get(phase, phase)} {value:.1f} s" for phase, value in report.seconds.items())
    lines.append(f"{seconds}; peak memory {amount(report.peak_memory_bytes, 'B')}")
    return "\n".join(lines)


def sketch_line(layers: Sequence[LayerReport]) -> str:
    """Return one line on the sketched moments and their estimated error; "" if all moments are exact."""
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
    """Return the outcome of a refit or a refinement of layers or blocks, in a few words."""
    return "put back" if figures["reverted"] else f"{figures[parts]} {parts} changed"


def recovery_line(figures: Mapping[str, Any]) -> str:
    """Return the outcome of a recovery, in one line."""
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


def bytes_kept(layers: Sequence[LayerReport]) -> float:
    """Return the bytes of layers' matrices over their bytes in 16 bits; numbers in floating point have 16 bits."""
    return sum(layer.nbytes for layer in layers) / sum(2 * layer.shape[0] * layer.shape[1] for layer in layers)


def _bits_text(layers: Sequence[LayerReport]) -> str:
    """Return the number of layers at each number of bits: "20 x 4, 10 x 3 and rank 8-16, 2 x rank 48-64"."""
    kinds: dict[tuple[int, str], list[int]] = {}
    for layer in layers:
        bits = 16 if layer.bits is None else layer.bits
        low = layer.bits is not None and layer.layout not in ("dense", "residual")
        kinds.setdefault((0 if low else bits, layer.layout), []).append(layer.rank)
    parts = {}
    for (bits, layout), ranks in sorted(kinds.items(), reverse=True):
        span = f"rank {min(ranks)}" if min(ranks) == max(ranks) else f"rank {min(ranks)}-{max(ranks)}"
        parts[span if bits == 0 else f"{bits} and {span}" if layout == "residual" else str(bits)] = len(ranks)
    if len(parts) == 1:
        return next(iter(parts))
    return ", ".join(f"{count} x {what}" for what, count in parts.items())


def _weights(layer: LayerReport) -> int:
    m, n = layer.shape
    if layer.layout == "dense":
        return m * n
    if layer.layout == "residual":
        return m * n + layer.rank * (m + n)
    return layer.rank * (m + n) - (layer.rank**2 if layer.layout == "pivot" else 0)
