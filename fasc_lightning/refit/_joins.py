"""The place where a layer's output joins the stream of hidden states."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fasc_lightning._utils import undoing
from fasc_lightning.refit._blocks import BlockRunner

#: Where a layer's output joins the stream of hidden states: it is added to the block's input on the way ("start"), or
#: to what the block returns ("end"); or neither.
Joins = Literal["start", "end"] | None


@torch.no_grad()
def joins_stream(runner: BlockRunner, block: int, hidden: Tensor, layer: nn.Module) -> Joins:
    """Find out, by trying, where the output of a layer in a block joins the stream.

    What is added to a layer that joins at the end is added to the block's output, no more and no less; of one that
    joins at the start, the sum with the block's input is what some module (a norm) is given.

    Args:
        runner: Of the model.
        block: Which block.
        hidden: Its input on the first batch.
        layer: A linear layer in it.
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
    # The difference from the stream rather than the sum, which a small output hardly changes.
    added = hidden + outputs[0].reshape(hidden.shape) - hidden
    if any(_near(x.reshape(hidden.shape).double() - hidden.double(), added) for x in inputs):
        return "start"
    with undoing() as undo:
        undo.hook(layer.register_forward_hook, disturb)
        changed = runner.run(block, 0, hidden)
    return "end" if _near(changed.double() - usual.double(), noise[0]) else None


def _near(found: Tensor, expected: Tensor) -> bool:
    """Tell whether tensors agree but for what half precision rounds away when the addend meets the stream."""
    expected = expected.reshape(found.shape).double()
    return bool((found - expected).norm() < 0.05 * expected.norm())
