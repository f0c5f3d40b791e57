"""Memory for the rows of a trajectory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def empty_rows(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of this shape, of like's dtype and device.

    On the CPU through NumPy, which asks the kernel for huge pages: the first write to a fresh row then costs a quarter.
    """
    if like.device.type != "cpu":
        return like.new_empty(tuple(shape))
    return torch.from_numpy(np.empty(tuple(shape), np.float32 if like.dtype == torch.float32 else np.float64))
