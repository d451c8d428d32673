"""Comparison of all methods: same model, same tokens, same budgets, same questions."""

from fasc_lightning.studies.comparison._cell_store import CellStore
from fasc_lightning.studies.comparison._cells import DENSE, FOLDER, PRUNERS, Budget, Cell, Outcome, Setting
from fasc_lightning.studies.comparison._comparison import Comparison
from fasc_lightning.studies.comparison._layers import gate_cells, group_cells, sensitivity_cells, some_layers
from fasc_lightning.studies.comparison._peer import Peer, read_peer
from fasc_lightning.studies.comparison._questions import Evaluation, Precision, some_facts
from fasc_lightning.studies.comparison._report import Report
from fasc_lightning.studies.comparison._statistics import GatheredStatistics
from fasc_lightning.studies.comparison._tables import metrics_of, shown_perplexity

__all__ = [
    "DENSE",
    "FOLDER",
    "PRUNERS",
    "Budget",
    "Cell",
    "CellStore",
    "Comparison",
    "Evaluation",
    "GatheredStatistics",
    "Outcome",
    "Peer",
    "Precision",
    "Report",
    "Setting",
    "gate_cells",
    "group_cells",
    "metrics_of",
    "read_peer",
    "sensitivity_cells",
    "shown_perplexity",
    "some_facts",
    "some_layers",
]
