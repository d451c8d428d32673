"""Statistics for `fasc_variants.py` that the package does not gather, kept on disk.

A statistic has two matrices per layer, A (n, n) of its inputs and G (m, m) of its gradients. The names are:

* `plain`, `weight-0.5`, `coupled` (the package's own, power 1), `weight-1.5`, `weight-2`: tokens weigh |h|^a in A and
  |x|^a in G; `weight-2-clipped`: at most 4 times a window's mean; `mahalanobis`: lengths in the metrics of G^-1 and
  A^-1;
* `sequence`: from the weight gradients of whole windows, one step towards the nearest Kronecker factors;
* `sample`, `root`: plain moments, with labels from the model's own distribution instead of the data;
* `windows-N`: coupled moments from the first N calibration windows;
* `staged-K`: coupled moments in the model compressed to a share K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fasc_lightning.batches import TokenRows
from fasc_lightning.cli import whole_file
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import linear_shape
from fasc_lightning.solvers import shrink, square_root
from fasc_lightning.statistics import CoupledMoments, SequenceFisher, add_gram_, moment_dtype
from fasc_lightning.studies.rho import backward_windows

#: Weights of tokens in A (tokens,) and in G (tokens,), from x (tokens, n) and h (tokens, m).
TokenWeights: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
#: A sum whose ``compute`` gives A (n, n) and G (m, m).
Stream: TypeAlias = CoupledMoments | SequenceFisher
#: Takes logits (tokens, vocabulary) and returns a gradient of them, drawn from the model's own distribution.
LabelDraw: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]

#: Calibration windows of the statistics `windows-N`; nested, each a prefix of the next.
WINDOW_COUNTS = (16, 32, 128, 256)
#: Statistics gathered at a time: each takes 0.6 GB for SmolLM2-135M, and a pass takes a minute or two.
PER_PASS = 4
#: Shrinkage of the metrics of Mahalanobis lengths.
MAHALANOBIS_SHRINK_A, MAHALANOBIS_SHRINK_G = 1e-2, 0.05


def power_weights(exponent: float, clip: float | None = None) -> TokenWeights:
    """Return weights |h|^a for A and |x|^a for G.

    Args:
        exponent: a; at 0 all tokens have the same weight.
        clip: Largest weight, in multiples of the mean over the tokens of one call; None for no bound.
    """

    def weights(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        found = [rows.norm(dim=1) ** exponent for rows in (h, x)]
        if clip is not None:
            found = [values.clamp(max=clip * values.mean()) for values in found]
        return found[0], found[1]

    return weights


def mahalanobis_weights(A: Tensor, G: Tensor) -> TokenWeights:
    """Return weights sqrt(h^T G^-1 h) for A and sqrt(x^T A^-1 x) for G, both matrices shrunk.

    Args:
        A: Shape (n, n).
        G: Shape (m, m).
    """

    def inverse_root(S: Tensor, amount: float) -> Tensor:
        root = square_root(shrink(S.double(), amount))
        return root.solve(torch.eye(len(S), dtype=torch.float64)).to(S.dtype)

    R_A, R_G = inverse_root(A, MAHALANOBIS_SHRINK_A), inverse_root(G, MAHALANOBIS_SHRINK_G)
    return lambda x, h: ((h @ R_G.T).norm(dim=1), (x @ R_A.T).norm(dim=1))


class WeightedMoments(CoupledMoments):
    r"""A = \sum_t p_t x_t x_t^T / \sum_t p_t and G = \sum_t q_t h_t h_t^T / \sum_t q_t with any token weights p, q.

    Args:
        m: Length of h.
        n: Length of x.
        token_weights: Returns p and q.
        dtype: Type of the accumulators.
    """

    def __init__(self, m: int, n: int, token_weights: TokenWeights, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(m, n, dtype)
        self.token_weights = token_weights

    def update(self, x: Tensor, h: Tensor, scale: float = 1.0, seen: Tensor | None = None) -> None:
        """Add the pairs (x, scale * h), x (tokens, n) and h (tokens, m)."""
        self.allocate()
        X, H = x.detach().to(self.accumulator_dtype), h.detach().to(self.accumulator_dtype) * scale
        p, q = self.token_weights(X, H)
        add_gram_(self.right, X * p.sqrt()[:, None])
        add_gram_(self.left, H * q.sqrt()[:, None])
        self.weights += torch.stack([p.sum(), q.sum()])
        self.count += len(x)


def sampled_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return p - e_y of each token with y drawn from p = softmax(logits), the gradient of its loss at the logits."""
    p = logits.softmax(-1)
    y = torch.multinomial(p, 1, generator=generator)
    return p.scatter_add(1, y, -torch.ones_like(y, dtype=p.dtype))


def root_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    r"""Return B z of each token, with random signs z and B B^T = diag(p) - p p^T, the Fisher of p = softmax(logits).

    B = diag(sqrt p) (I - sqrt(p) sqrt(p)^T). The covariance is that of sampled labels, but every class contributes to
    each draw.
    """
    root = logits.softmax(-1).sqrt()
    z = torch.randint(0, 2, root.shape, generator=generator).to(root).mul_(2).sub_(1)
    return root * (z - root * (root * z).sum(-1, keepdim=True))


LABELS: dict[str, LabelDraw] = {"sample": sampled_labels, "root": root_labels}


def fisher_windows(
    model: Any, taps: Taps, windows: Tensor, draw: LabelDraw, seed: int, progress: bool = False
) -> Iterator[int]:
    """Run windows forward, and backward from drawn labels; otherwise like ``studies.rho.backward_windows``.

    Args:
        model: A causal language model.
        taps: Taps, installed here and always removed.
        windows: Token ids, shape (windows, window).
        draw: Returns the gradient at the logits.
        seed: Seed of the draws.
        progress: Whether to show a bar.

    Raises:
        FloatingPointError: If a window's logits are not finite.
    """
    from tqdm.auto import tqdm

    generator = torch.Generator().manual_seed(seed)
    taps.install()
    try:
        for i, ids in enumerate(tqdm(windows.split(1), unit="window", disable=not progress)):
            # The drawn gradients belong to a sum of token losses.
            taps.begin_batch(TokenRows(f"window {i}", scale=1.0))
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            if not torch.isfinite(logits).all():
                raise FloatingPointError(f"Expected finite logits but those of window {i} are not.")
            logits.backward(draw(logits.detach(), generator))
            taps.end_batch()
            yield (i + 1) * ids.numel()
    finally:
        taps.remove()


def nested_windows(windows_of: Callable[[int], Tensor], counts: Iterable[int]) -> Tensor:
    """Return the windows of the largest count, ordered so that the windows of every smaller count come first.

    Args:
        windows_of: Returns a number of windows (count, window), which include the windows of every smaller number.
        counts: Numbers of windows.

    Raises:
        ValueError: If a window comes twice, or larger counts do not include smaller ones.
    """
    found: dict[tuple[int, ...], Tensor] = {}
    for count in sorted(counts):
        for ids in windows_of(count):
            found.setdefault(tuple(ids.tolist()), ids)
        if len(found) != count:
            raise ValueError(
                f"Expected {count} different calibration windows, the earlier ones among them, but got {len(found)}. "
                "Is a text in the calibration files twice?"
            )
    return torch.stack(list(found.values()))


class Gatherer:
    """A ``pairs`` callback of Taps that feeds several statistics, each with one accumulator per layer."""

    def __init__(self, streams: Mapping[str, Mapping[str, Stream]]) -> None:
        self.streams = streams

    def __call__(self, name: str, x: Tensor, h: Tensor, batch: TokenRows, lengths: list[int]) -> None:
        """Add one layer's inputs x (tokens, n) and gradients h (tokens, m)."""
        for by_layer in self.streams.values():
            stream = by_layer[name]
            if isinstance(stream, SequenceFisher):
                stream.update(x, h, lengths, batch.scale)
            else:
                stream.update(x, h, batch.scale)


class Statistics:
    """Statistics of a model by name, gathered on request and kept in a folder.

    Args:
        model: A causal language model in eval mode, without gradients of its weights.
        layers: The layers to tap.
        windows: Calibration windows, shape (windows, window).
        nested: The windows of `windows-N`, see :func:`nested_windows`.
        folder: Folder of the files.
        source: Fingerprint of everything that the statistics depend on; files with another one are ignored.
        seed: Seed of drawn labels.
        progress: Whether to show bars.
    """

    def __init__(
        self,
        model: Any,
        layers: dict[str, nn.Module],
        windows: Tensor,
        nested: Tensor,
        folder: Path,
        source: str,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.layers = layers
        self.windows = windows
        self.nested = nested
        self.folder = folder
        self.source = source
        self.seed = seed
        self.progress = progress

    def path(self, name: str) -> Path:
        """Return the file of a statistic."""
        return self.folder / f"{name}-{self.source}.safetensors"

    def gather(self, names: Iterable[str]) -> None:
        """Gather the missing statistics of the dense model, in as few passes as memory allows."""
        missing = [name for name in dict.fromkeys(names) if not self.path(name).is_file()]
        if "mahalanobis" in missing and not self.path("plain").is_file():
            missing = ["plain", *(name for name in missing if name != "plain")]
        drawn = [name for name in missing if name in LABELS]
        counts = sorted(int(name.removeprefix("windows-")) for name in missing if name.startswith("windows-"))
        # Mahalanobis lengths come last, because they need the plain statistics.
        rest = [name for name in missing if name not in drawn and not name.startswith("windows-")]
        rest.sort(key=lambda name: name == "mahalanobis")
        while rest:
            ready = [name for name in rest if name != "mahalanobis" or self.path("plain").is_file()][:PER_PASS]
            streams = {name: self._streams(name) for name in ready}
            for _ in backward_windows(self.model, self._taps(streams), self.windows, self.progress):
                pass
            self._save(streams)
            rest = [name for name in rest if name not in ready]
        for name in drawn:
            streams = {name: self._streams(name)}
            taps = self._taps(streams)
            for _ in fisher_windows(self.model, taps, self.windows, LABELS[name], self.seed, self.progress):
                pass
            self._save(streams)
        if counts:
            self._gather_nested(counts)

    def gather_staged(self, name: str, layers: dict[str, nn.Module]) -> None:
        """Gather a `staged-K` statistic from the present model, with ``layers`` in place of its layers by name."""
        streams = {name: self._streams(name)}
        for _ in backward_windows(self.model, Taps(layers, pairs=Gatherer(streams)), self.windows, self.progress):
            pass
        self._save(streams)

    def pair(self, name: str, layer: str) -> tuple[Tensor, Tensor]:
        """Return A (n, n) and G (m, m) of one layer.

        Raises:
            FileNotFoundError: If the statistic was not gathered.
        """
        from safetensors import safe_open

        stream = self._stream(name, layer, for_updates=False)
        with safe_open(self.path(name), framework="pt") as file:
            for state in stream.sums:
                setattr(stream, state, file.get_tensor(f"{layer}:{state}"))
            # torchmetrics warns about a metric without updates.
            stream._update_count = 1
        return stream.compute()

    def _gather_nested(self, counts: list[int]) -> None:
        """Gather `windows-N` for all counts in one pass, and save each on the way."""
        window = self.nested.shape[1]
        streams = {"windows": self._streams("windows")}
        taps = self._taps(streams)
        for tokens in backward_windows(self.model, taps, self.nested[: counts[-1]], self.progress):
            if tokens // window in counts:
                self._save({f"windows-{tokens // window}": streams["windows"]})

    def _taps(self, streams: Mapping[str, Mapping[str, Stream]]) -> Taps:
        return Taps(self.layers, pairs=Gatherer(streams))

    def _streams(self, name: str) -> dict[str, Stream]:
        return {layer: self._stream(name, layer) for layer in self.layers}

    def _stream(self, name: str, layer: str, for_updates: bool = True) -> Stream:
        m, n = linear_shape(self.layers[layer])
        dtype = moment_dtype(self.layers.values())
        if name == "sequence":
            return SequenceFisher(m, n, dtype, kronecker=True)
        if for_updates and name == "mahalanobis":
            return WeightedMoments(m, n, mahalanobis_weights(*self.pair("plain", layer)), dtype)
        if for_updates and name.startswith("weight-"):
            power, _, clipped = name.removeprefix("weight-").partition("-")
            return WeightedMoments(m, n, power_weights(float(power), 4.0 if clipped else None), dtype)
        if for_updates and (name == "plain" or name in LABELS):
            return WeightedMoments(m, n, power_weights(0.0), dtype)
        return CoupledMoments(m, n, dtype)

    def _save(self, streams: Mapping[str, Mapping[str, Stream]]) -> None:
        from safetensors.torch import save_file

        for name, by_layer in streams.items():
            sums = {
                f"{layer}:{state}": value.contiguous()
                for layer, stream in by_layer.items()
                for state, value in stream.sums.items()
            }
            with whole_file(self.path(name)) as temporary:
                save_file(sums, temporary)
