"""Complex tensors as pairs of real numbers, which is how a flat state, an adjoint, PETSc and a battery see them."""

from __future__ import annotations

import torch
from torch import Tensor


def real(x: Tensor) -> Tensor:
    """x, a complex one as pairs of numbers, (..., 2), on the graph of x."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def unreal(flat: Tensor, like: Tensor) -> Tensor:
    """The tensor of like's shape, dtype and device of these real numbers, flat."""
    if like.is_complex():
        part = flat.to(like.device, like.real.dtype).reshape(*like.shape, 2)
        return torch.view_as_complex(part.contiguous())
    return flat.to(like.device, like.dtype).reshape(like.shape)
