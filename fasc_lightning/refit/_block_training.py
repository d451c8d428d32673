"""Refinement: the factors of each block trained for a few steps towards what the dense model's block gives.

A closed form (``refit/_anchored.py``) sees one layer at a time, and linear targets. The steps taken here see a
whole block, its attention and its activation functions. Blocks are taken one after the other. What goes into one is
what the compressed model really gives it, x^, earlier blocks refined; the steps minimise

    mean over tokens of |f(x^; factors) - t|^2 / |t|^2,

with t the output of the dense block. On what input that is, ``target`` says. With "dense" it is what the dense model
gives the block, so that a block also makes good what went wrong before it. On a trained model of six blocks whose loss
was 0.960, compressed to 1.533 and refitted to 1.322, 256 steps a block (lr 0.01) led to 1.155 on text of its own;
"drifted", the dense block's output on x^ itself, led to 1.239, although its own errors fell by more. At four tenths
instead of a quarter of full rank it was 1.081, 1.037, 1.007 and 1.025.

No more than one block is ever trained, so that there is the backward pass, and there are the optimizer's states, of
one block.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fasc_lightning._utils import Progress, evaluating, same_rng, undoing
from fasc_lightning.layers import CompressedLinear
from fasc_lightning.options import RefineOptions, Target
from fasc_lightning.refit._anchored import MIN_BATCHES, layer_state
from fasc_lightning.refit._batch_loss import BatchLoss, causal_loss, real_tokens
from fasc_lightning.refit._block_stack import RefitError
from fasc_lightning.refit._block_steps import FactorCopies, relative_error, train_copies
from fasc_lightning.refit._block_training_report import BlockRefine, RefineReport
from fasc_lightning.refit._blocks import BlockRunner
from fasc_lightning.refit._checks import check_refit, refittable_layers

#: What to do with a model whose blocks cannot be run one by one.
WITHOUT_REFINEMENT = "Recover it without refinement (refine_steps=0)."


def check_refine(model: nn.Module, layers: Iterable[str]) -> None:
    """Refuse models whose layers cannot be refined block by block; changes nothing and computes nothing.

    Args:
        model: The model, dense or compressed.
        layers: Names of the layers that are or will be compressed.

    Raises:
        RefitError: If there is no one stack of blocks that holds all layers, or a layer, or a parameter of one, is
            also registered elsewhere: training it for one place would change the other.
        ValueError: If factors are int8.
        TypeError: If there are adapters on them.
    """
    layers = list(layers)
    check_refit(model, layers, WITHOUT_REFINEMENT)
    places: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(key)
    for name in layers:
        layer = model.get_submodule(name)
        for parameter in layer.parameters():
            other = next((key for key in places[id(parameter)] if not key.startswith(f"{name}.")), None)
            if other is not None:
                raise RefitError(
                    f"Expected parameters of its own in {name!r} but one is also {other!r}: training it for one place "
                    f"would change the other. {WITHOUT_REFINEMENT} Or exclude it."
                )
            if isinstance(layer, CompressedLinear) and not parameter.is_floating_point():
                raise ValueError(
                    f"Expected factors that can be trained but those of {name!r} are {parameter.dtype}. Refine first "
                    "and quantise then."
                )
        if isinstance(layer, CompressedLinear):
            layer.factors()  # refuses adapters


def refine(
    model: nn.Module,
    dense: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    steps: int = RefineOptions.steps,
    lr: float = RefineOptions.lr,
    target: Target = "dense",
    holdout: int = RefineOptions.holdout,
    tokens: int = RefineOptions.tokens,
    seed: int = RefineOptions.seed,
    loss: BatchLoss = causal_loss,
    progress: Progress | None = None,
) -> RefineReport:
    """Train the factors of a compressed model, block by block in order of execution, in place.

    All parameters of compressed layers are trained, biases included, and nothing else. Held-out batches decide block by
    block whether the new factors stay, and the model's loss on them is the last check, of all blocks together. What is
    not accepted stays as it was, as does everything if anything fails. Steps are taken on float32 copies, and judged is
    what those are in the model's own type. Ranks, layouts, identities and flags of layers and parameters stay, as do
    modes and random generators.

    Memory, beyond the model, the dense layers and the batches: the hidden states of ``tokens`` tokens, twice; what
    blocks are given beside them (masks, position embeddings), once where batches or blocks are given the same; of the
    block at hand a copy (in half precision; else of its factors), gradients and two moments of Adam for its
    factors; and the activations of one batch in it.

    Args:
        model: The compressed model.
        dense: The dense layer of each compressed one by name, on the model's device, as
            :func:`~fasc_lightning.layers.swap_modules` returns them. Layers of the model that are not compressed are
            not named, and help as they are.
        batches: What to fit to and to judge by, on the model's device; no more are asked for than ``tokens`` allows.
            Tokens whose "attention_mask" is 0 do not count. Labels serve the last check alone.
        steps: See :class:`RefineOptions`, as for all that follows.
        lr: Likewise.
        target: Likewise.
        holdout: Likewise.
        tokens: Likewise.
        seed: Likewise.
        loss: Sends a batch through the model and returns its mean loss.
        progress: Wraps the loop over blocks.

    Returns:
        What was done.

    Raises:
        RefitError: If the model's blocks cannot be run one by one, or layers are shared.
        ValueError: If an option is out of range, there are too few batches, layers do not match or are int8.
        TypeError: If there are adapters on factors.
        FloatingPointError: If the model's own activations are not finite.
    """
    start = time.perf_counter()
    options = RefineOptions(steps, lr, target, holdout, tokens, seed)
    layers = refittable_layers(model, dense, None, "refine")
    check_refine(model, layers)
    with undoing() as undo:
        for layer in layers.values():
            undo.add(layer.load_state_dict, layer_state(layer))
        with same_rng(), evaluating(model):
            runner = BlockRunner(model, dense, batches, loss, options.tokens, WITHOUT_REFINEMENT)
            if len(runner.batches) < MIN_BATCHES:
                raise ValueError(
                    f"Expected at least {MIN_BATCHES} batches, some of which are held out, within {options.tokens} "
                    f"tokens but got {len(runner.batches)}. Use smaller batches, or more `tokens`."
                )
            report = _Refinement(runner, layers, options, progress).run()
        done = replace(report, seconds=time.perf_counter() - start)
        if not report.reverted:
            undo.forget()
    return done


class _Refinement:
    """One refinement: the two streams of hidden states, and the loop over blocks."""

    def __init__(
        self,
        runner: BlockRunner,
        layers: Mapping[str, CompressedLinear],
        options: RefineOptions,
        progress: Progress | None,
    ) -> None:
        self.runner = runner
        self.layers = layers
        self.options = options
        self.progress = progress or (lambda names, description: names)
        count = len(runner.batches)
        every = min(options.holdout, count)
        self.held = list(range(every - 1, count, every))
        self.fit = [i for i in range(count) if i not in self.held]
        self.rows = [real_tokens(batch) for batch in runner.batches]
        # Both streams start from the same embeddings. What the dense blocks give is the one that is aimed at.
        self.exact = list(runner.inputs)
        self.drifted, runner.inputs = runner.inputs, []  # not held a third time
        self.blocks: list[BlockRefine] = []

    def run(self) -> RefineReport:
        """Go through all blocks."""
        tokens = sum(hidden.shape[:-1].numel() for hidden in self.drifted)
        before = self._model_loss()
        order = _passes(self.fit, self.options.seed)
        numbers = [str(i) for i in range(len(self.runner.blocks))]
        for number in self.progress(numbers, "Refining"):
            self._block(int(number), order)
        changed = any(block.accepted for block in self.blocks)
        after = self._model_loss() if changed else before
        return RefineReport(
            blocks=self.blocks,
            loss_before=before,
            loss_after=after,
            reverted=changed and not after <= before,  # NaN, too
            steps=self.options.steps,
            tokens=tokens,
            fit_batches=len(self.fit),
            held_batches=len(self.held),
            seconds=0.0,
        )

    def _block(self, block: int, order: Iterator[int]) -> None:
        """Refine one block and push both streams past it."""
        runner, prefix = self.runner, self.runner.prefix(block)
        inside = {name: layer for name, layer in self.layers.items() if name.startswith(prefix)}
        with runner.dense():
            # In place, so that no third stream is alive.
            source = self.exact if self.options.target == "dense" else self.drifted
            for i, hidden in enumerate(source):
                self.exact[i] = runner.run(block, i, hidden)
        if inside:
            self.blocks.append(self._refine(block, inside, order))
        for i, hidden in enumerate(self.drifted):
            self.drifted[i] = runner.run(block, i, hidden)

    def _refine(self, block: int, layers: Mapping[str, CompressedLinear], order: Iterator[int]) -> BlockRefine:
        """Train a block's factors and keep them if the held-out error is lower."""
        runner, options = self.runner, self.options
        before = self._held_error(block)
        if not math.isfinite(before):
            raise FloatingPointError(
                f"Expected finite hidden states but the held-out error of block {block} is {before}. The refinement "
                "is undone."
            )
        prefix = runner.prefix(block)
        copies = FactorCopies(
            runner.blocks[block], {name.removeprefix(prefix): layer for name, layer in layers.items()}
        )

        def error(i: int) -> Tensor:
            output = runner.run_with(block, i, self.drifted[i].to(copies.dtype), copies.tensors)
            return relative_error(output, self.exact[i], self.rows[i])

        saved = {name: layer_state(layer) for name, layer in layers.items()}
        after = math.nan
        if train_copies(copies, error, order, options.steps, options.lr):
            copies.store()
            after = self._held_error(block)
        accepted = after < before
        if not accepted:
            _put_back(layers, saved)
        return BlockRefine(block, tuple(layers), before, after, accepted)

    def _held_error(self, block: int) -> float:
        """Return the error of a block's output as the block is, over the held-out batches."""
        with torch.no_grad():
            errors = [
                float(relative_error(self.runner.run(block, i, self.drifted[i]), self.exact[i], self.rows[i]))
                for i in self.held
            ]
        return sum(errors) / len(errors)

    def _model_loss(self) -> float:
        """Return the mean loss of the held-out batches in the model as it is."""
        return sum(self.runner.loss(i) for i in self.held) / len(self.held)


def _passes(batches: list[int], seed: int) -> Iterator[int]:
    """Yield batches for ever, all of them in an order of its own before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    for _ in itertools.count():
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


def _put_back(layers: Mapping[str, CompressedLinear], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, layer in layers.items():
        layer.load_state_dict(saved[name])
