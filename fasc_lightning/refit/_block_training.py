"""Refinement: training of each block's factors, for a few steps, towards the output of the dense model's block.

A closed form (``refit/_anchored.py``) sees one layer at a time, with linear targets. The steps here see a whole block
with its attention and its activation functions. Blocks are trained one after the other. The input x^ of a block is the
compressed model's, after the refinement of earlier blocks. The steps minimise

    mean over tokens of |f(x^; factors) - t|^2 / |t|^2,

where t is the output of the dense block. ``target`` chooses the dense block's input. With "dense" it is the input in
the dense model, so that a block also corrects errors of earlier blocks. With "drifted" it is x^ itself. A trained model
of six blocks had a loss of 0.960, of 1.533 compressed and of 1.322 refitted. 256 steps for each block (lr 0.01) led to
1.155 on text of its own with "dense", and to 1.239 with "drifted", although the errors of "drifted" fell by more. At
four tenths instead of a quarter of full rank the losses were 1.081 compressed, 1.037 refitted, 1.007 and 1.025.

Only one block is trained at a time: the backward pass and the optimizer's states are of one block.
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

#: Last sentence of errors about models whose blocks cannot be run one by one.
WITHOUT_REFINEMENT = "Recover it without refinement (refine_steps=0)."


def check_refine(model: nn.Module, layers: Iterable[str]) -> None:
    """Check that a model's layers can be refined block by block, without running the model.

    Args:
        model: The model, dense or compressed.
        layers: Names of the layers that are or will be compressed.

    Raises:
        RefitError: If no single stack of blocks holds all layers, or a layer or one of its parameters is used in two
            places: training it for one would change the other.
        ValueError: If factors are int8.
        TypeError: If factors carry adapters.
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
    block whether the new factors stay. The model's loss on them is the last check, of all blocks together. Rejected
    factors are put back, as is everything if anything fails. Steps train float32 copies; the checks use the copies
    rounded to the model's own type. Ranks, layouts, identities and flags of layers and parameters stay, as do modes and
    random generators.

    Memory beyond the model, the dense layers and the batches: the hidden states of ``tokens`` tokens, twice; the other
    arguments of blocks (masks, position embeddings), once for equal ones; for the current block a copy (in half
    precision of the whole block, else of its factors), and gradients and two Adam moments of its factors; and the
    activations of one batch in it.

    Args:
        model: The compressed model.
        dense: The dense layer of each compressed one by name, on the model's device, as
            :func:`~fasc_lightning.layers.swap_modules` returns them. Layers that are not compressed are not named.
        batches: Batches to fit to and to judge by, on the model's device; ``tokens`` bounds how many are consumed.
            Tokens whose "attention_mask" is 0 do not count. Only the last check uses labels.
        steps: Optimizer steps for each block, as in :class:`RefineOptions`.
        lr: Learning rate, as in :class:`RefineOptions`.
        target: Input of the dense block, as in :class:`RefineOptions`.
        holdout: Share of held-out batches, as in :class:`RefineOptions`.
        tokens: Most tokens to hold, as in :class:`RefineOptions`.
        seed: Seed of the order of batches, as in :class:`RefineOptions`.
        loss: Function that sends a batch through the model and returns its mean loss.
        progress: Wrapper of the loop over blocks.

    Returns:
        A report of the refinement.

    Raises:
        RefitError: If the model's blocks cannot be run one by one, or layers are shared.
        ValueError: If an option is out of range, there are too few batches, layers do not match or are int8.
        TypeError: If factors carry adapters.
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
        # Both streams start from the same embeddings. The exact stream holds the dense blocks' outputs, the targets.
        self.exact = list(runner.inputs)
        self.drifted, runner.inputs = runner.inputs, []  # the runner holds no third copy
        self.blocks: list[BlockRefine] = []

    def run(self) -> RefineReport:
        """Go through all blocks."""
        tokens = sum(hidden.shape[:-1].numel() for hidden in self.drifted)
        before = self._model_loss()
        order = _passes(self.fit, self.options.seed)
        numbers = [str(i) for i in range(len(self.runner.blocks))]
        for number in self.progress(numbers, "Refinement"):
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
            # The stream is replaced in place, so that there is no third one.
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
        """Return the error of a block's present output on the held-out batches."""
        with torch.no_grad():
            errors = [
                float(relative_error(self.runner.run(block, i, self.drifted[i]), self.exact[i], self.rows[i]))
                for i in self.held
            ]
        return sum(errors) / len(errors)

    def _model_loss(self) -> float:
        """Return the present model's mean loss on the held-out batches."""
        return sum(self.runner.loss(i) for i in self.held) / len(self.held)


def _passes(batches: list[int], seed: int) -> Iterator[int]:
    """Yield batches for ever, in passes over all of them, each in a new random order."""
    generator = torch.Generator().manual_seed(seed)
    for _ in itertools.count():
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


def _put_back(layers: Mapping[str, CompressedLinear], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, layer in layers.items():
        layer.load_state_dict(saved[name])
