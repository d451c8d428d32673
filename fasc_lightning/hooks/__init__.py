"""Forward and gradient hooks: each layer's inputs x and gradients h, as rows of tokens."""

from fasc_lightning.hooks._taps import Taps

__all__ = [
    "Taps",
]
