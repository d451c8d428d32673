"""The place where a layer's output joins the stream of hidden states."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fasc_lightning._utils import undoing
from fasc_lightning.refit._blocks import BlockRunner

#: Where a layer's output joins the stream of hidden states: "start" if it is added to the block's input inside of the
#: block, "end" if it is added to the block's output, None otherwise.
Joins = Literal["start", "end"] | None


@torch.no_grad()
def joins_stream(runner: BlockRunner, block: int, hidden: Tensor, layer: nn.Module) -> Joins:
    """Find by experiment where the output of a layer in a block joins the stream.

    If a layer joins at the end, noise added to its output appears unchanged in the block's output. If it joins at the
    start, some module (a norm) gets the sum of its output and the block's input.

    Args:
        runner: Runner of the model.
        block: Number of the block.
        hidden: Input of the block on the first batch.
        layer: A linear layer in the block.
    """
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    noise: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel() == hidden.numel():
            inputs.append(args[0])

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output)

    def disturb(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        noise.append(drawn * output.double().square().mean().sqrt().to(output))
        return output + noise[0]

    with undoing() as undo:
        for module in runner.blocks[block].modules():
            if module is not runner.blocks[block]:
                undo.hook(module.register_forward_pre_hook, note, with_kwargs=True)
        undo.hook(layer.register_forward_hook, keep)
        usual = runner.run(block, 0, hidden)
    if outputs[0].numel() != hidden.numel():
        return None
    # Differences from the stream are compared: a small output hardly changes the sum.
    added = hidden + outputs[0].reshape(hidden.shape) - hidden
    if any(_near(x.reshape(hidden.shape).double() - hidden.double(), added) for x in inputs):
        return "start"
    with undoing() as undo:
        undo.hook(layer.register_forward_hook, disturb)
        changed = runner.run(block, 0, hidden)
    return "end" if _near(changed.double() - usual.double(), noise[0]) else None


def _near(found: Tensor, expected: Tensor) -> bool:
    """Return whether tensors agree within the rounding of a sum with the stream in half precision."""
    expected = expected.reshape(found.shape).double()
    return bool((found - expected).norm() < 0.05 * expected.norm())
