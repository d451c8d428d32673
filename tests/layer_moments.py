"""Moments of a layer with every statistic there is, straight from the definitions in numpy."""

from __future__ import annotations

import numpy as np
import torch

from fasc_lightning.statistics import LayerMoments


def gradients_of_sequences(x, h, lengths):
    """G_i = sum_t h_t x_t^T of every sequence that has tokens, numpy (sequences, m, n)."""
    stops = np.cumsum(lengths)
    parts = [slice(stop - length, stop) for stop, length in zip(stops, lengths, strict=True) if length]
    return np.stack([sum(np.outer(ht, xt) for ht, xt in zip(h[p], x[p], strict=True)) for p in parts])


def full_moments(x, h, W, lengths=None) -> LayerMoments:
    """All fields, from inputs x (tokens, n), output gradients h (tokens, m) and the weight W (m, n)."""
    x, h, W = (value.double().numpy() for value in (x, h, W))
    N = len(x)
    g = h @ W
    G = gradients_of_sequences(x, h, [N] if lengths is None else lengths)
    right = np.mean([Gi.T @ Gi for Gi in G], axis=0)
    left = np.mean([Gi @ Gi.T for Gi in G], axis=0)
    root = np.sqrt(np.mean([(Gi**2).sum() for Gi in G]))
    scale = {id(S): root / np.trace(S) if np.trace(S) else 1.0 for S in (right, left)}
    arrays = {
        "A": x.T @ x / N,
        "G": h.T @ h / N,
        "mean_x": x.mean(0),
        "mean_h": h.mean(0),
        "C": np.mean([np.outer(xt, ht) for xt, ht in zip(x, h, strict=True)], axis=0),
        "abs_x": np.abs(x).mean(0),
        "saliency": np.mean([np.outer(gt * xt, gt * xt) for xt, gt in zip(x, g, strict=True)], axis=0),
        "fisher_rows": (G**2).sum(2).mean(0),
    }
    p, q = np.linalg.norm(h, axis=1), np.linalg.norm(x, axis=1)
    coupled = (
        sum(pt * np.outer(xt, xt) for pt, xt in zip(p, x, strict=True)) / (p.sum() or 1),
        sum(qt * np.outer(ht, ht) for qt, ht in zip(q, h, strict=True)) / (q.sum() or 1),
    )
    kronecker = tuple(torch.from_numpy(S * scale[id(S)]) for S in (right, left))
    return LayerMoments(
        tokens=N,
        kronecker=kronecker,
        coupled=tuple(map(torch.from_numpy, coupled)),
        **{name: torch.from_numpy(value) for name, value in arrays.items()},
    )


def random_moments(m: int, n: int, tokens: int = 200, W=None, sequences: int = 20) -> LayerMoments:
    """All fields from random tokens whose x and h are coupled, in sequences of one length."""
    x = torch.randn(tokens, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64)
    h = torch.randn(tokens, m, dtype=torch.float64) @ torch.randn(m, m, dtype=torch.float64)
    h = h + 0.5 * x @ torch.randn(n, m, dtype=torch.float64)
    W = torch.randn(m, n, dtype=torch.float64) if W is None else W
    return full_moments(x, h, W, [tokens // sequences] * sequences)
