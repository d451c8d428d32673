"""What a refinement by gradient steps did, block by block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockRefine:
    """What the steps did to one block.

    Attributes:
        block: Its number.
        layers: Names of the layers whose factors were trained.
        before: Held-out error of the block's output with the factors as they were, relative to an output of zero;
            earlier blocks refined.
        after: With the factors that the steps led to; NaN if they led nowhere.
        accepted: Whether those stayed, which they do only if the error is lower.
    """

    block: int
    layers: tuple[str, ...]
    before: float
    after: float
    accepted: bool


@dataclass(frozen=True)
class RefineReport:
    """What a refinement did.

    Attributes:
        blocks: Those that hold compressed layers, in order.
        loss_before: The model's mean loss on the held-out batches before, in nats.
        loss_after: And after.
        reverted: Whether the last check, of all blocks together, put everything back.
        steps: Optimizer steps of each block.
        tokens: Tokens of the batches used, padding included.
        fit_batches: How many batches the steps were taken on.
        held_batches: How many were held out.
        seconds: What it took.
    """

    blocks: list[BlockRefine]
    loss_before: float
    loss_after: float
    reverted: bool
    steps: int
    tokens: int
    fit_batches: int
    held_batches: int
    seconds: float

    @property
    def accepted(self) -> int:
        """Number of blocks that ended with new factors."""
        return 0 if self.reverted else sum(block.accepted for block in self.blocks)

    def __str__(self) -> str:
        """One line."""
        if self.reverted:
            return (
                f"Refinement: put back, since the held-out loss would have gone from {self.loss_before:.4f} to "
                f"{self.loss_after:.4f} ({self.seconds:.0f} s)."
            )
        return (
            f"Refinement: {self.accepted} of {len(self.blocks)} blocks, {self.steps} steps each, held-out loss "
            f"{self.loss_before:.4f} to {self.loss_after:.4f} ({self.held_batches} of "
            f"{self.fit_batches + self.held_batches} batches held out, {self.seconds:.0f} s)."
        )
