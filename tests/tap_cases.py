"""Taps, and the moments that they have to bring, by brute force."""

from __future__ import annotations

import torch

from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes
from fasc_lightning.statistics import CalibrationMoments


def tapped(layers, dtype=torch.float64):
    moments = CalibrationMoments(layer_shapes(layers), dtype)
    return Taps(layers, moments), moments


def brute_force(model, layers, forward_loss):
    """A and G of each layer from activations and gradients recorded the plain way, in float64."""
    xs = {name: [] for name in layers}
    ys = {name: [] for name in layers}

    def record(name):
        def hook(module, args, output):
            xs[name].append(args[0].detach())
            output.retain_grad()
            ys[name].append(output)

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in layers.items()]
    forward_loss().backward()
    for handle in handles:
        handle.remove()
    moments = {}
    for name in layers:
        x = torch.cat([x.reshape(-1, x.shape[-1]) for x in xs[name]]).double()
        h = torch.cat([y.grad.reshape(-1, y.shape[-1]) for y in ys[name]]).double()
        moments[name] = (x, h)
    model.zero_grad()
    return moments


def assert_moments(moments, name, x, h, rtol=1e-9):
    layer = moments.layer(name)
    assert layer.tokens == len(x)
    scale_A, scale_G = (x.T @ x).abs().max() / len(x), (h.T @ h).abs().max() / len(h)
    torch.testing.assert_close(layer.A.double(), x.T @ x / len(x), rtol=rtol, atol=rtol * scale_A.item())
    torch.testing.assert_close(layer.G.double(), h.T @ h / len(h), rtol=rtol, atol=rtol * scale_G.item())
