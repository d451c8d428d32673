"""Forecast of a compression's memory, time and size, before its first batch."""

from fasc_lightning.planning._fit import batch_tokens, fit_forecast, layers_forecast
from fasc_lightning.planning._forecast import CompressionForecast
from fasc_lightning.planning._model import model_on_meta
from fasc_lightning.planning._plan import plan
from fasc_lightning.planning._refusal import bytes_of

__all__ = [
    "CompressionForecast",
    "batch_tokens",
    "bytes_of",
    "fit_forecast",
    "layers_forecast",
    "model_on_meta",
    "plan",
]
