"""Forward and gradient hooks: the inputs x and the gradients h of each layer, as matrices of tokens."""

from fasc_lightning.hooks._taps import Taps

__all__ = [
    "Taps",
]
