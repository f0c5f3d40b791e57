"""Histories: the causal convolutions c_n = sum_{j<n} kappa_{n-j} X_j of a scheme, each with its transpose.

`base` fixes the interface. `exact` sums every term: by matrix-vector products, blocks, or FFTs, and `dense` does so on
a nonuniform grid. `bounded` keeps recent rows and modes only: a sum of exponentials, or a fixed window.
"""

from .base import Bounded, Convolution, History
from .exact import Exact
from .exponentials import SumOfExponentials
from .short_memory import ShortMemory

__all__ = ["Bounded", "Convolution", "Exact", "History", "ShortMemory", "SumOfExponentials"]
