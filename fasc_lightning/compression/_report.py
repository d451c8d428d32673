"""The report of a compression: its figures, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from torch import nn

from fasc_lightning._utils import check, library_versions, plain_values, write_json
from fasc_lightning.compression._figure import allocation_figure
from fasc_lightning.compression._layer_report import LayerReport, _layer_report
from fasc_lightning.compression._report_schema import REPORT
from fasc_lightning.compression._summary import summary_table
from fasc_lightning.layers import Size, layer_sizes, model_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class CompressionReport:
    """The figures of a compression; ``str()`` gives a table and :meth:`to_dict` plain types for JSON.

    Attributes:
        method: Solver.
        options: The options of the compression.
        seed: Seed of token subsampling.
        targeted: Sizes of the targeted layers, "dense" and "compressed". "unquantized" is the size before quantisation,
            if there was one.
        whole: Sizes of the whole model, with the same keys.
        seconds: Seconds by phase: calibrate, factorize and swap; and refit, refine, recover and quantize if they ran.
        moments_bytes: Memory of the statistics.
        peak_memory_bytes: Largest memory of the process (on CUDA: of the device) so far.
        layers: One row a targeted layer.
        refit: Figures of a refit: layers changed, loss before and after on held-out batches, number of batches, whether
            it was reverted; None without a refit.
        refine: Figures of a refinement of the blocks, as ``refit`` but in blocks; None without a refinement.
        recovery: Figures of a recovery (:class:`~fasc_lightning.RecoveryCallback`); None without a recovery.
        validation: The module's own loss on the first batches of its validation loader, before and after the
            compression, and the number of batches; None without a validation loader.
        versions: Versions of the libraries.
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
    validation: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=lambda: library_versions())

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only; sizes are grouped by figure, NaN becomes None."""
        result = asdict(self)
        for row in result["layers"]:
            for figure in ("sketches", "quantize"):  # rows without them keep the format of older reports
                if not row[figure]:
                    del row[figure]
        for name in ("targeted", "whole"):
            sizes: Mapping[str, Size] = getattr(self, name)
            result[name] = {
                figure: {state: getattr(size, figure) for state, size in sizes.items()}
                for figure in ("parameters", "bytes", "flops_per_token")
            }
        return plain_values(result)

    def to_json(self, path: str | Path) -> None:
        """Write the report as JSON."""
        write_json(self.to_dict(), path)

    def with_quantized(
        self, model: nn.Module, quantization: str, layers: Iterable[str], seconds: float
    ) -> CompressionReport:
        """Return the report with the sizes of the quantised model.

        Args:
            model: The quantised model.
            quantization: The kind of quantisation.
            layers: Names of the quantised layers in the model, which are the targeted layers.
            seconds: Duration of the quantisation.
        """
        targeted = layer_sizes({name: model.get_submodule(name) for name in layers})
        return replace(
            self,
            options={**self.options, "quantize": quantization},
            targeted={**self.targeted, "unquantized": self.targeted["compressed"], "compressed": targeted},
            whole={**self.whole, "unquantized": self.whole["compressed"], "compressed": model_size(model)},
            seconds={**self.seconds, "quantize": seconds},
        )

    def with_recovered(self, figures: dict[str, Any]) -> CompressionReport:
        """Return the report with the figures of a recovery."""
        return replace(
            self,
            recovery=figures,
            seconds={**self.seconds, "recover": figures["seconds"]},
            peak_memory_bytes=max(self.peak_memory_bytes, figures.get("peak_memory_bytes", 0)),
        )

    def without_prefix(self, prefix: str) -> CompressionReport:
        """Return the report with the layers' names in a part of the module, for example without "model."."""
        layers = [replace(layer, name=layer.name.removeprefix(prefix)) for layer in self.layers]
        return replace(self, layers=layers)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CompressionReport:
        """Return the report from ``content``, which :meth:`to_dict` made.

        Raises:
            ValueError: If an entry is missing or wrong; the message names it.
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
        rounded_last = self.options.get("quantize") if {"rank", "keep"} & self.options.keys() else None
        plan: dict[str, dict[str, Any]] = {}
        for layer in self.layers:
            form = layer.quantize if layer.quantize is not None else rounded_last
            if layer.layout != "dense" or form is not None:
                plan[layer.name] = {"rank": layer.rank, "layout": layer.layout}
                if form is not None:
                    plan[layer.name]["quantize"] = form
        return plan

    @property
    def kept(self) -> float:
        """The fraction of the targeted layers' parameters that is kept."""
        return self.targeted["compressed"].parameters / self.targeted["dense"].parameters

    def figure(self) -> Figure:
        """Return a picture of the bits that each layer got (:func:`~fasc_lightning.compression.allocation_figure`)."""
        return allocation_figure(self.layers)

    def __str__(self) -> str:
        return summary_table(self)


def log_report(loggers: Iterable[Logger], report: CompressionReport, step: int, *, layers: bool = True) -> None:
    """Send a report's figures to loggers; ``self.log`` is not allowed at the end of a fit.

    Args:
        loggers: The loggers.
        report: The report.
        step: The global step.
        layers: Whether the figures of each layer are logged, too.
    """
    for logger in loggers:
        logger.log_metrics(report_metrics(report, logger.group_separator, layers=layers), step=step)
        logger.save()


def report_metrics(report: CompressionReport, separator: str = "/", *, layers: bool) -> dict[str, float]:
    """Return the figures of a report by the names that logs have.

    Args:
        report: The report.
        separator: Separator between the parts of a name.
        layers: Whether the figures of each layer are among them.
    """
    figures: dict[str, float] = {
        f"fasc{separator}kept": report.kept,
        f"fasc{separator}parameters": report.targeted["compressed"].parameters,
        f"fasc{separator}bytes": report.targeted["compressed"].bytes,
        f"fasc{separator}loss": sum(layer.loss for layer in report.layers),
    }
    if report.validation is not None:
        figures[f"fasc{separator}validation_loss_before"] = report.validation["loss"]["before"]
        figures[f"fasc{separator}validation_loss_after"] = report.validation["loss"]["after"]
    for layer in report.layers if layers else ():
        figures[f"fasc_rank{separator}{layer.name}"] = layer.rank
        figures[f"fasc_loss{separator}{layer.name}"] = layer.loss
        if layer.rho == layer.rho:
            # A name of its own, because monitoring logs rho of other tokens.
            figures[f"fasc_rho{separator}{layer.name}"] = layer.rho
    return figures
