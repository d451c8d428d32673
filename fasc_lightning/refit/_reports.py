"""What an anchored refit did, layer by layer and block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerRefit:
    """What the refit did to one layer.

    Attributes:
        name: Dotted name.
        block: Number of its block.
        before: Error of the factors as they were on the batches that choose, relative to that of an output of zero.
        after: That of the factors chosen; equal to ``before`` if none were better.
        anchor: lambda of the factors chosen; NaN if none.
        variant: Which factors moved; "" if none.
        accepted: Whether the layer ended with new factors.
    """

    name: str
    block: int
    before: float
    after: float
    anchor: float
    variant: str
    accepted: bool

    def undone(self) -> LayerRefit:
        """Return the same for a layer that was put back."""
        return replace(self, accepted=False)


@dataclass(frozen=True)
class BlockRefit:
    """The judge's verdict on one block: the model's mean loss on batches that choose, in nats.

    Attributes:
        block: Its number.
        before: With the block's factors as they were, those of earlier blocks refitted.
        after: With the block's new factors.
        accepted: Whether they stayed.
    """

    block: int
    before: float
    after: float
    accepted: bool


@dataclass(frozen=True)
class RefitReport:
    """What a refit did.

    Attributes:
        layers: In order of execution.
        blocks: The verdicts.
        skipped: Layers that could not be refitted: not reached, run more than once, or on other tokens than the block.
        loss_before: The model's mean loss before, in nats, on batches that nothing was fitted to or chosen by.
        loss_after: And after.
        loss_error: Standard error of the change over those batches. Factors are kept if it falls by two of
            these.
        reverted: Whether the last check put everything back.
        fit_batches: How many batches factors were fitted to or chosen by.
        held_batches: How many only the last check read.
        seconds: What it took.
    """

    layers: list[LayerRefit]
    blocks: list[BlockRefit]
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
        """One line."""
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
