"""dfar: recommenders that learn from what users liked and from what they skipped.

========================  =====================================================================
:func:`fha`               the attention operation, on NumPy arrays or PyTorch tensors
:func:`fha_backward`      its gradients, for NumPy
:mod:`dfar.torch`         the operation as a PyTorch operator and module (imports torch)
:func:`set_threads`       threads of later calls; results do not depend on it
========================  =====================================================================
"""

from __future__ import annotations

from ._attention import fha, fha_backward
from ._dfar import __version__, set_threads, threads

__all__ = ["__version__", "fha", "fha_backward", "set_threads", "threads"]
