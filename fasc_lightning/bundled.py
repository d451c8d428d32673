"""Former module of :func:`~fasc_lightning.data.load_model`."""

from warnings import warn

from fasc_lightning.data import load_model as load_model

warn("Import load_model from fasc_lightning.data, where it is now.", DeprecationWarning, stacklevel=2)
