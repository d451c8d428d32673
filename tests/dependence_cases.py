"""Tokens with a known dependence."""

from __future__ import annotations

import math

import torch

from fasc_lightning import DependenceScore


def autocorrelated(sequences, length, n, generator, memory=0.9):
    """Stationary AR(1) series, independent of each other."""
    noise = torch.randn(sequences, length, n, generator=generator)
    series = [noise[:, 0]]
    for t in range(1, length):
        series.append(memory * series[-1] + math.sqrt(1 - memory**2) * noise[:, t])
    return torch.stack(series, 1)


def scored(*pairs, **settings):
    score = DependenceScore(**settings)
    for x, g in pairs:
        score.update(x, g)
    return score
