"""Anchored refit: compressed layers fitted to the inputs that they get in the compressed model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fasc_lightning._utils import Progress, evaluating, undoing
from fasc_lightning.layers import (
    CompressedLinear,
    linear_shape,
    linear_weight,
    quantization_of,
)
from fasc_lightning.refit._batch_loss import BatchLoss, batch_losses, causal_loss, real_tokens
from fasc_lightning.refit._blocks import BlockRunner
from fasc_lightning.refit._candidates import Candidates, FactorCandidates, GridCandidates
from fasc_lightning.refit._checks import check_refit, refittable_layers
from fasc_lightning.refit._drift import DriftRows, OutputBasis
from fasc_lightning.refit._joins import Joins, joins_stream
from fasc_lightning.refit._reports import LayerRefit, RefitReport
from fasc_lightning.refit._shares import Change, shares
from fasc_lightning.refit._solve import anchor_moments, mixed_with_anchor
from fasc_lightning.refit._token_weights import Lengths, gradient_lengths, token_weights
from fasc_lightning.solvers import SHRINK_A, SHRINK_COUPLED_G, shrink
from fasc_lightning.statistics import moment_dtype

#: The target of a layer: "layer" is the dense layer's output. "stream" adds, for layers whose output is added to the
#: stream of hidden states, the stream's error so far.
Target = Literal["layer", "stream"]

#: The anchor of a refit: "dense" is the dense layer, in the moments that the factors were made with. A layer whose bias
#: moves, or a refit without these moments, uses "factors" instead: the factors before the refit.
Anchor = Literal["dense", "factors"]

#: The weights of tokens: "gradient" is the length of the loss's gradient at the layer's output (``_token_weights.py``);
#: "equal" weighs all tokens alike.
TokenWeights = Literal["gradient", "equal"]

#: The low-rank layers that are refitted: "last" is the last of each block, which corrects the block's error, and layers
#: with the same input; "all" is slower, and was no better (docs/results.md). Rounded layers are always all refitted.
RefittedFactors = Literal["last", "all"]

#: Fewest batches of a refit: with fewer, too few remain to fit to, beside the batches that choose and that check.
MIN_BATCHES = 4


@dataclass(frozen=True)
class RefitOptions:
    """Options of a refit.

    Attributes:
        anchors: Values of lambda to choose from, layer by layer, by the error on the choosing batches.
        towards: See :data:`Anchor`.
        target: See :data:`Target`.
        bias: Whether existing biases move, too.
        holdout: One batch in ``holdout`` chooses and another one checks, but at least one and two (``shares``).
        weights: See :data:`TokenWeights`.
        factors: See :data:`RefittedFactors`.
    """

    anchors: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    towards: Anchor = "dense"
    target: Target = "stream"
    bias: bool = True
    holdout: int = 8
    weights: TokenWeights = "gradient"
    factors: RefittedFactors = "last"

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.anchors or not all(0 <= anchor < math.inf for anchor in self.anchors):
            raise ValueError(f"Expected `anchors` to be finite numbers of at least 0 but got {self.anchors}.")
        words = {"towards": Anchor, "target": Target, "weights": TokenWeights, "factors": RefittedFactors}
        for name, kind in words.items():
            first, second = get_args(kind)
            if (value := getattr(self, name)) not in (first, second):
                raise ValueError(f'Expected `{name}` to be "{first}" or "{second}" but got {value!r}.')
        if self.holdout < 3:
            raise ValueError(f"Expected `holdout` of at least 3 but got {self.holdout}.")


def refit(
    model: nn.Module,
    dense: Mapping[str, nn.Module],
    G: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    inputs: Mapping[str, Tensor] | None = None,
    lengths: Sequence[Lengths] | None = None,
    options: RefitOptions | None = None,
    loss: BatchLoss = causal_loss,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> RefitReport:
    """Refit layers of a compressed model, block by block in order of execution, in place.

    Rounded layers, and the last low-rank layers of each block, are fitted to the inputs that they get in the model
    compressed so far, with the dense model's outputs as the target and an anchor (``refit/_solve.py``). Batches are in
    three shares (``shares``). Factors are fitted to the first share. The second share chooses lambda and decides layer
    by layer; accepted factors are then fitted to both shares. Only the last check reads the third share: there the
    model's loss, with all layers together, has to fall by more than two standard errors of its change over the batches.
    Tokens weigh by the lengths of their gradients. G and the anchor's A come from all batches, as for the factors
    before the refit. Rejected factors are put back, as is everything if anything fails. Shapes, ranks, layouts and the
    layers' identities stay.

    Memory: the hidden states of the first two shares at one block's input, twice; the inputs of its layers in the dense
    model, and in the compressed one for a layer whose output joins the end of its block; and the moments of one group
    of layers that share an input.

    Args:
        model: The compressed model.
        dense: The dense layer of each compressed one by name, on the model's device, as
            :func:`~fasc_lightning.layers.swap_modules` returns them.
        G: G = E[h h^T] of each layer by name, shape (m, m), from the calibration. Shrunk here, by as much as "fasc"
            does.
        batches: The calibration's batches, on the model's device, to fit to, to choose by and to check by. Tokens whose
            "attention_mask" is 0 do not count.
        inputs: A = E[x x^T] of each layer by name, shape (n, n), from the calibration, as the factors were made with.
            Shrunk here, by as much as "fasc" does.
        lengths: Lengths of the gradients of each batch, by which tokens weigh, as a calibration keeps them. Layers
            without lengths of as many tokens as are real weigh all tokens alike. None computes the lengths.
        options: Options of the refit.
        loss: Function that sends a batch through the model and returns its mean loss.
        device: Device to solve on; by default each layer's own.
        progress: Wrapper of the loop over blocks.

    Returns:
        A report of the refit.

    Raises:
        RefitError: If the model's blocks cannot be run one by one.
        ValueError: If there are too few batches, or layers do not match.
    """
    start = time.perf_counter()
    options = options or RefitOptions()
    batches = list(batches)
    layers = refittable_layers(model, dense, G, "refit")
    if len(batches) < MIN_BATCHES:
        raise ValueError(
            f"Expected at least {MIN_BATCHES} batches, some of which are held out, but got {len(batches)}. Use smaller "
            "batches."
        )
    fit, choose, check = shares(len(batches), options.holdout)
    check_refit(model, dense)
    with undoing() as undo:
        for layer in layers.values():
            undo.add(layer.load_state_dict, layer_state(layer))
        with evaluating(model):
            before = batch_losses(model, [batches[i] for i in check], loss)
            read = sorted(fit + choose)
            runner = BlockRunner(model, dense, [batches[i] for i in read], loss)
            held = [read.index(i) for i in choose]
            known: Sequence[Lengths] = []  # all tokens weigh alike
            if options.weights == "gradient":
                known = gradient_lengths(runner, dense, loss) if lengths is None else [lengths[i] for i in read]
            work = _Refit(runner, layers, dense, G, inputs, options, device, progress, held, known)
            work.run()
            changed = any(layer.accepted for layer in work.reports)
            after = batch_losses(model, [batches[i] for i in check], loss) if changed else before
        change = Change.of(before, after)
        reverted = changed and not change.is_gain
        if not reverted:
            undo.forget()
    reports = [layer.undone() for layer in work.reports] if reverted else work.reports
    done = {layer.name for layer in reports} | set(work.left_out)
    return RefitReport(
        layers=reports,
        skipped=[name for name in layers if name not in done],
        loss_before=change.before,
        loss_after=change.after,
        loss_error=change.error,
        reverted=reverted,
        fit_batches=len(read),
        held_batches=len(check),
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class _Tokens:
    """The tokens of layers that share an input.

    Attributes:
        fit: Moments of the tokens to fit to.
        held: Moments of the tokens that choose.
        present: Weight and bias, before the refit, of a layer that joins the end of the block; else None.
        inputs: Drifted inputs of each batch, shape (tokens, n), of such a layer; else empty.
        outputs: Outputs of the drifted block for each batch of such a layer; else empty.
    """

    fit: DriftRows
    held: DriftRows
    present: tuple[Tensor, Tensor] | None
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class _Refit:
    """One refit: the two streams of hidden states, and the loop over blocks."""

    def __init__(
        self,
        runner: BlockRunner,
        layers: Mapping[str, CompressedLinear],
        dense: Mapping[str, nn.Module],
        G: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor] | None,
        options: RefitOptions,
        device: torch.device | str | None,
        progress: Progress | None,
        held: Sequence[int],
        lengths: Sequence[Lengths],
    ) -> None:
        self.runner = runner
        self.layers = layers
        self.dense = dense
        self.G = G
        self.inputs = inputs
        self.options = options
        self.device = device
        self.progress = progress or (lambda names, description: names)
        self.held = held
        self.lengths = lengths
        self.rows = [real_tokens(batch) for batch in runner.batches]
        pairs = zip(self.rows, runner.inputs, strict=True)
        #: Number of real tokens of each batch.
        self.counts = [hidden.shape[:-1].numel() if rows is None else int(rows.sum()) for rows, hidden in pairs]
        # Both streams start from the same embeddings.
        self.exact = list(runner.inputs)
        self.drifted = list(runner.inputs)
        self.reports: list[LayerRefit] = []
        self.left_out: list[str] = []  # layers that the options leave as they are

    def run(self) -> None:
        """Go through all blocks."""
        numbers = [str(i) for i in range(len(self.runner.blocks))]
        for number in self.progress(numbers, "Refit"):
            self._block(int(number))

    def _block(self, block: int) -> None:
        """Refit one block and push both streams past it."""
        prefix = self.runner.prefix(block)
        inside = {name: layer for name, layer in self.layers.items() if name.startswith(prefix) and _moves(layer)}
        groups = self.runner.groups(block, self.drifted[0], inside) if inside else []
        if self.options.factors == "last":
            self.left_out += [name for group in groups[:-1] for name in group if not self._is_rounded(name)]
            groups = [kept for group in groups if (kept := [name for name in group if name not in self.left_out])]
        first = [self.dense[group[0]] for group in groups]
        with self.runner.dense():
            seen = [self.runner.run_and_see(block, i, hidden, first) for i, hidden in enumerate(self.exact)]
        exact, inputs = [output for _, output in seen], [inputs for inputs, _ in seen]
        del seen
        outputs: list[Tensor] = []  # of the drifted block, as long as they are known
        for group in groups:  # each group's inputs are freed after it
            outputs = self._group(block, group, exact, [batch.pop(0) for batch in inputs], outputs)
        if not outputs:
            outputs = [self.runner.run(block, i, hidden) for i, hidden in enumerate(self.drifted)]
        self.exact, self.drifted = exact, outputs

    def _group(
        self,
        block: int,
        group: Sequence[str],
        exact: Sequence[Tensor],
        inputs: Sequence[Tensor],
        outputs: list[Tensor],
    ) -> list[Tensor]:
        """Refit layers that share an input.

        Args:
            block: Number of the block.
            group: Names of the layers.
            exact: The dense block's outputs.
            inputs: The layers' inputs in the dense model.
            outputs: The drifted block's outputs; empty if they are not known.

        Returns:
            The drifted block's outputs; empty if they are not known any more.
        """
        first = group[0]
        joins: Joins = None
        if self.options.target == "stream" and len(group) == 1:
            joins = joins_stream(self.runner, block, self.drifted[0], self.layers[first])
        tokens = self._tokens(block, group, joins, exact, inputs)
        reports = [self._layer(block, name, tokens) for name in group]
        self.reports += reports
        if not any(report.accepted for report in reports):
            return tokens.outputs or outputs
        if tokens.present is None:
            return []
        # The layer's output is added to the block's, so that its change is, too.
        W, bias = (new - old for new, old in zip(_affine(self.layers[first]), tokens.present, strict=True))
        return [
            (output + (x_hat @ W.T + bias).view(output.shape)).to(output.dtype)
            for output, x_hat in zip(tokens.outputs, tokens.inputs, strict=True)
        ]

    def _layer(self, block: int, name: str, tokens: _Tokens) -> LayerRefit:
        """Try all candidates on one layer and keep the best if it beats the present factors."""
        layer, fit, held = self.layers[name], tokens.fit, tokens.held
        device = self.device or next(layer.parameters()).device
        W = linear_weight(self.dense[name]).detach().to(device).double()
        G = shrink(self.G[name].to(device).double(), SHRINK_COUPLED_G)
        bias = self._moves_bias(layer)
        rounded = self._is_rounded(name)
        A = None if bias else self._calibrated(name)
        basis = OutputBasis.of(W, G, whole=rounded or fit.measured or A is None)
        level = fit.level.to(device)
        own, judged = fit.moments(basis), held.moments(basis)
        fitted = own.shrunk(basis, SHRINK_A, level)
        candidates: Candidates = GridCandidates(layer, basis) if rounded else FactorCandidates(layer, basis, bias)
        if A is not None:
            A = shrink(A.to(device).double(), SHRINK_A)
            anchor = anchor_moments(basis.F, A * (level / A.diagonal().mean()))  # in the unit of the tokens
        else:
            A, mean = (value.to(device) for value in fit.inputs())
            anchor = anchor_moments(basis.F if rounded else candidates.start, shrink(A, SHRINK_A), mean)
        scale = float(judged.energy) or 1.0
        before = judged.error(candidates.start) / scale
        # The choice is made in half of the time in float32; what the layer takes is solved in float64.
        problem = partial(mixed_with_anchor, fitted.single(), anchor.single())
        choice, error = candidates.choose(self.options.anchors, problem, judged.single())
        if not error / scale < before:
            return LayerRefit(name, block, before, before, math.nan, False)
        both = own.mixed(judged, held.count / (fit.count + held.count)).shrunk(basis, SHRINK_A, level)
        candidates.take(mixed_with_anchor(both, anchor, choice))
        return LayerRefit(name, block, before, error / scale, choice, True)

    def _is_rounded(self, name: str) -> bool:
        return quantization_of(self.layers[name]) is not None

    def _calibrated(self, name: str) -> Tensor | None:
        """Return the calibration's A of a layer if the anchor is the dense layer in it."""
        return None if self.inputs is None or self.options.towards == "factors" else self.inputs[name]

    def _moves_bias(self, layer: CompressedLinear) -> bool:
        return self.options.bias and layer.bias is not None and quantization_of(layer) is None

    def _tokens(
        self, block: int, group: Sequence[str], joins: Joins, exact: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> _Tokens:
        """Return the moments of the tokens of layers that share an input.

        Args:
            block: Number of the block.
            group: Names of the layers.
            joins: Where the one layer's output joins the stream; the layer then has to correct the stream's error.
            exact: The dense block's outputs.
            inputs: The dense layer's inputs.
        """
        layer, original = self.layers[group[0]], self.dense[group[0]]
        m, n = linear_shape(layer)
        dtype, device = moment_dtype([layer]), next(layer.parameters()).device
        own = any(self._moves_bias(self.layers[name]) or self._calibrated(name) is None for name in group)
        fit, held = (
            DriftRows((m, n), joins is not None, energy=chooses, inputs=own, dtype=dtype, device=device)
            for chooses in (False, True)
        )
        W = linear_weight(original).detach().to(dtype)
        tokens = _Tokens(fit, held, _affine(layer) if joins == "end" else None)
        weights = token_weights(self.lengths, group, self.counts) if self.lengths else []
        for i, rows in enumerate(self.rows):
            x, v = inputs[i].reshape(-1, n).to(dtype), None
            if tokens.present is not None:
                (x_hat,), drifted = self.runner.run_and_see(block, i, self.drifted[i], [layer])
                missing = exact[i] - drifted
            else:
                x_hat = self.runner.layer_input(block, i, self.drifted[i], layer)
                missing = self.exact[i] - self.drifted[i]
            x_hat = x_hat.reshape(-1, n).to(dtype)
            if tokens.present is not None:
                tokens.inputs.append(x_hat)
                tokens.outputs.append(drifted)
                # At the end of the block, the drifted stream includes this layer's present output.
                v = x_hat @ tokens.present[0].T + missing.reshape(-1, m).to(dtype)
            elif joins is not None:
                v = x @ W.T + missing.reshape(-1, m).to(dtype)
            w = weights[i] if weights else None
            if rows is not None:
                real = rows.to(device)
                x, x_hat, v = x[real], x_hat[real], None if v is None else v[real]
            (held if i in self.held else fit).update(x, x_hat, v, w)
        return tokens


def _affine(layer: CompressedLinear) -> tuple[Tensor, Tensor]:
    """Return a layer's weight (m, n) and bias (m,), in the type of its moments."""
    W = layer.to_weight().detach().to(moment_dtype([layer]), copy=True)
    return W, W.new_zeros(len(W)) if layer.bias is None else layer.bias.detach().to(W.dtype, copy=True)


def _moves(layer: CompressedLinear) -> bool:
    """Return whether a layer can be refitted; int8 factors beside bits cannot: their rounding is their last step."""
    return layer.layout in ("dense", "residual") or quantization_of(layer) is None


def layer_state(layer: CompressedLinear) -> dict[str, Tensor]:
    """Return a copy of a layer's state dict, from which the layer can be restored."""
    return {key: value.detach().clone() for key, value in layer.state_dict().items()}
