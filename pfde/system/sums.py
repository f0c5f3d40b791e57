"""Long sums in float32: blocks of a few terms in float32, and the blocks in float64.

    S = sum_k (x_{bk+1} + ... + x_{bk+b}),   b = 16

A block loses at most b eps of its terms, and no more is lost however many there are: a plain sum of N terms drifts by
up to N eps. Widening one tensor in b costs next to nothing. In float64 there is one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16  # terms; at most 16 eps, 4 eps where rounding is random


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the blocks' sum: float64, or complex128."""
    return torch.promote_types(dtype, torch.float64)


class LongSum:
    """A sum of tensors like the given one, from zero."""

    def __init__(self, like: Tensor) -> None:
        self._block = torch.zeros_like(like)
        self._narrow = like.dtype != wider(like.dtype)
        self._whole: Tensor | None = None
        self._terms = 0

    def term(self) -> Tensor:
        """To be added to in place, once or a few times; as it was left at the last call, or zero."""
        if self._narrow:
            self._terms += 1
            if self._terms > BLOCK:
                self._fold()
        return self._block

    def _fold(self) -> None:
        if self._whole is None:
            self._whole = self._block.to(wider(self._block.dtype))
        else:
            self._whole.add_(self._block)
        self._block.zero_()
        self._terms = 1

    def total(self) -> Tensor:
        """The sum, in float64 where it was long."""
        return self._block if self._whole is None else self._whole + self._block
