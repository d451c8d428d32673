"""Reports of a refinement by gradient steps, block by block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockRefine:
    """The refinement of one block.

    Attributes:
        block: Number of the block.
        layers: Names of the layers whose factors were trained.
        before: Held-out error of the block's output with its former factors, relative to an output of zero, after the
            refinement of earlier blocks.
        after: The same error with the trained factors; NaN if training failed.
        accepted: Whether the trained factors stayed: only if the error is lower.
    """

    block: int
    layers: tuple[str, ...]
    before: float
    after: float
    accepted: bool


@dataclass(frozen=True)
class RefineReport:
    """The report of a refinement.

    Attributes:
        blocks: The blocks with compressed layers, in order.
        loss_before: The model's mean loss on the held-out batches before, in nats.
        loss_after: The same loss after the refinement.
        reverted: Whether the last check, of all blocks together, put everything back.
        steps: Optimizer steps for each block.
        tokens: Tokens of the batches used, padding included.
        fit_batches: Number of batches that the steps used.
        held_batches: Number of held-out batches.
        seconds: Duration.
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
        """Return a summary in one line."""
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
