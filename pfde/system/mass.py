"""The mass matrix of M y' = f(t, y), the same for every row of a state: M acts on the last dimension of y.

A singular M makes algebraic equations of some rows (a differential-algebraic equation, of index 1 where df/dy is
regular on them). M is constant, and not differentiated.
"""

from __future__ import annotations

from torch import Tensor


class Mass:
    """M, (n, n), or its diagonal, (n,), on flat states (d,) with n consecutive entries a row."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix, self._n = matrix, len(matrix)

    def apply(self, y: Tensor) -> Tensor:
        """M y, in the dtype of y."""
        rows, matrix = y.view(-1, self._n), self._matrix.to(y.dtype)
        return (rows * matrix if matrix.dim() == 1 else rows @ matrix.T).reshape(-1)

    def apply_transpose(self, y: Tensor) -> Tensor:
        """M^T y."""
        rows = y.view(-1, self._n)
        return (rows * self._matrix if self._matrix.dim() == 1 else rows @ self._matrix).reshape(-1)
