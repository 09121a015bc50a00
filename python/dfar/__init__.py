"""dfar: recommenders that learn from what users liked and from what they skipped.

========================  =====================================================================
:func:`import_log`        a log (pandas, polars, pyarrow, or a file) as a data set
:class:`Dataset`          a data set: histories, splits, evaluation groups as NumPy views
:func:`train`             trains and evaluates a model; :func:`resume` continues
:class:`Run`              a trained model: scores, recommendations, metrics, parameters
:class:`Table`            scores for pandas, polars and pyarrow, through Arrow's C interface
:func:`fha`               the attention operation, on NumPy arrays or PyTorch tensors
:func:`fha_backward`      its gradients, for NumPy
:mod:`dfar.torch`         the operation as a PyTorch operator and module (imports torch)
:mod:`dfar.callbacks`     progress, TensorBoard, your own
:func:`set_threads`       threads of later calls; results do not depend on it
========================  =====================================================================
"""

from __future__ import annotations

from . import callbacks
from ._attention import fha, fha_backward
from ._data import Dataset, Groups, Histories, History, import_log, synthetic
from ._dfar import DataError, __version__, set_threads, threads
from ._run import Recommendations, Run, Table, resume, train

__all__ = [
    "DataError",
    "Dataset",
    "Groups",
    "Histories",
    "History",
    "Recommendations",
    "Run",
    "Table",
    "__version__",
    "callbacks",
    "fha",
    "fha_backward",
    "import_log",
    "resume",
    "set_threads",
    "synthetic",
    "threads",
    "train",
]
