"""The extension module. Its functions are called by the other modules, which document them."""

from typing import Any

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]

__version__: str

def address(array: Any) -> int: ...
def fha(
    q: Any, k: Any, v: Any, cu_seqlens: Any, label: Any,
    normalization: str, causal: bool, label_mask: bool, scale: float | None,
) -> tuple[_Floats, _Floats]: ...
def fha_backward(
    d_o: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, cu_seqlens: Any, label: Any,
    normalization: str, causal: bool, label_mask: bool, scale: float | None,
) -> tuple[_Floats, _Floats, _Floats]: ...
def set_threads(count: int) -> None:
    """Sets the number of threads of later calls; 0: one per core. Results do not depend on it."""

def threads() -> int:
    """The number of threads."""
