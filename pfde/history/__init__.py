"""Histories: the causal convolutions c_n = sum_{j<n} kappa_{n-j} X_j of a scheme, each with its transpose.

`base` fixes the interface, `exact` sums every term: by matrix-vector products, blocks, or FFTs.
"""

from .base import Convolution
from .exact import Exact

__all__ = ["Convolution", "Exact"]
