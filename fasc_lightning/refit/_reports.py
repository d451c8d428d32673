"""Reports of an anchored refit, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerRefit:
    """The refit of one layer.

    Attributes:
        name: Dotted name of the layer.
        block: Number of its block.
        before: Error of the former factors on the choosing batches, relative to the error of an output of zero.
        after: Error of the chosen factors; equal to ``before`` if none were better.
        anchor: lambda of the chosen factors; NaN if none were chosen.
        accepted: Whether the layer ended with new factors.
    """

    name: str
    block: int
    before: float
    after: float
    anchor: float
    accepted: bool

    def undone(self) -> LayerRefit:
        """Return the report of the same layer after it was put back."""
        return replace(self, accepted=False)


@dataclass(frozen=True)
class RefitReport:
    """The report of a refit.

    Attributes:
        layers: The refitted layers in order of execution.
        skipped: Layers that could not be refitted: they ran never, more than once, or on other tokens than the block.
        loss_before: The model's mean loss before, in nats, on batches that factors were neither fitted to nor chosen
            by.
        loss_after: The same loss after the refit.
        loss_error: Standard error of the change over these batches. Factors are kept if the loss falls by more than
            two standard errors.
        reverted: Whether the last check put everything back.
        fit_batches: Number of batches that factors were fitted to or chosen by.
        held_batches: Number of batches that only the last check read.
        seconds: Duration.
    """

    layers: list[LayerRefit]
    skipped: list[str]
    loss_before: float
    loss_after: float
    loss_error: float
    reverted: bool
    fit_batches: int
    held_batches: int
    seconds: float

    @property
    def accepted(self) -> int:
        """Number of layers that ended with new factors."""
        return sum(layer.accepted for layer in self.layers)

    def __str__(self) -> str:
        """Return a summary in one line."""
        if self.reverted:
            return (
                f"Refit: put back, since the held-out loss would have gone from {self.loss_before:.4f} to "
                f"{self.loss_after:.4f} (±{self.loss_error:.4f}, {self.seconds:.0f} s)."
            )
        return (
            f"Refit: {self.accepted} of {len(self.layers) + len(self.skipped)} layers, held-out loss "
            f"{self.loss_before:.4f} to {self.loss_after:.4f} (±{self.loss_error:.4f}, {self.held_batches} of "
            f"{self.fit_batches + self.held_batches} batches held out, {self.seconds:.0f} s)."
        )
