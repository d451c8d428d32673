"""Former module of :class:`~fasc_lightning.recovery.Distillable`."""

from warnings import warn

from fasc_lightning.recovery import Distillable as Distillable

warn("Import Distillable from fasc_lightning.recovery, where it is now.", DeprecationWarning, stacklevel=2)
