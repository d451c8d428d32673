"""The forecast of a compression, as a record and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fasc_lightning._utils import amount, table_text
from fasc_lightning.layers import Size
from fasc_lightning.planning._memory import Peak
from fasc_lightning.planning._time import Seconds


@dataclass(frozen=True)
class LayerForecast:
    """One layer of a plan.

    Attributes:
        name: Dotted name.
        shape: (m, n) = (outputs, inputs).
        moments: "exact" for whole moments, else the option ``sketch``: "projected", "range" or "gaussian".
        place: Place of the moments, "device" or "cpu".
        bytes: Bytes of the moments.
        rank: Rank in a uniform allocation of the same budget; min(m, n) if the layer would stay dense.
        layout: Layout in a uniform allocation: "pivot", "factors" or "dense".
        bits: Bits of a rounded matrix, in a uniform allocation; None for a matrix in floating point.
    """

    name: str
    shape: tuple[int, int]
    moments: str
    place: Literal["device", "cpu"]
    bytes: int
    rank: int
    layout: str
    bits: int | None = None


@dataclass(frozen=True)
class CompressionForecast:
    """Memory and time of a compression, and sizes after it; ``str()`` gives a table, :meth:`to_dict` plain data.

    Attributes:
        layers: One row per targeted layer.
        device: Device that gathers the moments.
        memory: Bytes of the device.
        host_memory: Bytes of the CPU that moments and factors may take beside another device.
        peak: Largest memory of the compression, on the device and on the CPU.
        parts: Bytes of each part of the peak: "weights", "training", "activations", "moments", "factors" and
            "workspace". They do not exist all at one time, so the peak is less than their sum.
        factors_place: Place of finished factors until the last: "device", "cpu" or, in several passes, "disk".
        passes: Number of passes over the data.
        options: Options of :class:`~fasc_lightning.FascCallback` that hold moments as planned.
        targeted: Sizes of the targeted layers, "dense" and "compressed".
        whole: Sizes of the whole model, "dense" and "compressed".
        seconds: Estimated seconds; None without a probe.
    """

    layers: list[LayerForecast] = field(repr=False)
    device: str
    memory: int
    host_memory: int
    peak: Peak
    parts: dict[str, int]
    factors_place: Literal["device", "cpu", "disk"]
    passes: int
    options: dict[str, Any]
    targeted: dict[str, Size]
    whole: dict[str, Size]
    seconds: Seconds | None = None

    @property
    def moments_bytes(self) -> int:
        """Bytes of the moments of all layers, in any place."""
        return sum(layer.bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the forecast as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        kinds: dict[tuple[Any, ...], list[LayerForecast]] = {}
        for layer in self.layers:
            key = layer.name.rpartition(".")[2], layer.shape, layer.moments, layer.place
            kinds.setdefault(key, []).append(layer)
        rows = [
            {
                "layers": name,
                "count": len(rows),
                "outputs": shape[0],
                "inputs": shape[1],
                "moments": moments,
                "place": place,
                "size": amount(sum(row.bytes for row in rows), "B"),
                **(
                    {"rank": rows[0].rank, "layout": rows[0].layout} if rows[0].bits is None else {"bits": rows[0].bits}
                ),
            }
            for (name, shape, moments, place), rows in kinds.items()
        ]
        what = "ranks" if all(layer.bits is None for layer in self.layers) else "bits"
        parts = ", ".join(f"{name} {amount(size, 'B')}" for name, size in self.parts.items() if size)
        beside = f" and {amount(self.peak.host, 'B')} beside it on the CPU" if self.peak.host else ""
        lines = [
            table_text(f"Plan of a compression; {what} are those of a uniform allocation", rows),
            f"peak memory: {amount(self.peak.device, 'B')} of {amount(self.memory, 'B')} on {self.device}{beside} "
            f"({parts}; factors on the {self.factors_place}), {self.passes} pass{'' if self.passes == 1 else 'es'}",
        ]
        if self.options:
            lines.append(f"options: {', '.join(f'{name}={value!r}' for name, value in self.options.items())}")
        for title, sizes in (("targeted layers", self.targeted), ("whole model", self.whole)):
            before, after = sizes["dense"], sizes["compressed"]
            lines.append(
                f"{title}: {before.parameters:,} -> {after.parameters:,} parameters "
                f"({after.parameters / before.parameters:.1%}), "
                f"{amount(before.bytes, 'B')} -> {amount(after.bytes, 'B')}"
            )
        if self.seconds is not None:
            known = self.seconds.calibrate
            calibrate = f"{self.seconds.per_1000_tokens:.2g} s per 1,000 tokens" if known is None else f"{known:,.1f} s"
            end = "factorise" if what == "ranks" else "round"
            lines.append(f"about {calibrate} to calibrate, {self.seconds.factorize:,.1f} s to {end}")
        return "\n".join(lines)
