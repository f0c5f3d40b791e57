"""PETSc vectors and torch tensors that see one another's memory.

A state tensor has the model's dtype and device; a Vec has PETSc's scalar type (double) and the same device, so the
Vec is the double shadow of a state: a copy within one memory space for float64, a conversion as well for float32.
The exchange goes through DLPack, 2 us a call; the view lives for that call only (NOTE 1).

NOTE 1. `Vec.createWithDLPack` does not keep the tensor alive and reads any storage as contiguous doubles. So we go
the other way: PETSc allocates, torch views.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .start import PETSc


def require_device(device: torch.device) -> None:
    """Raise RuntimeError when PETSc has no vectors for `device`, saying how to get them."""
    if np.dtype(PETSc.ScalarType) != np.float64:
        raise RuntimeError(f"pfde needs PETSc with real double scalars: this one has {PETSc.ScalarType.__name__}")
    if device.type == "cpu" or (device.type == "cuda" and PETSc.Sys.hasExternalPackage("cuda")):
        return
    if device.type == "cuda":
        raise RuntimeError(
            f"y0 is on {device}, but this PETSc was built without CUDA vectors: configure PETSc with --with-cuda=1 "
            "(in a pfde checkout: PETSC_CONFIGURE_EXTRA=--with-cuda=1 make distclean setup), or move y0 and the model "
            "to the CPU"
        )
    raise RuntimeError(f"y0 is on {device}: PETSc has vectors for 'cpu' and 'cuda' only; move y0 and the model there")


def state_vec(size: int, device: torch.device, comm: PETSc.Comm) -> PETSc.Vec:
    """A Vec for a state of which this rank holds `size` entries, on the state's device. Raises RuntimeError."""
    require_device(device)
    vec = PETSc.Vec().create(comm)
    vec.setSizes((size, PETSc.DETERMINE))
    vec.setType(PETSc.Vec.Type.CUDA if device.type == "cuda" else PETSc.Vec.Type.STANDARD)
    vec.set(0.0)
    return vec


def read(vec: PETSc.Vec) -> Tensor:
    """A double tensor of this rank's entries that shares the Vec's memory; do not write to it, do not keep it."""
    return from_dlpack(vec.toDLPack("r"))


def load(vec: PETSc.Vec, dtype: torch.dtype) -> Tensor:
    """A fresh tensor of this rank's entries, in the dtype of the model."""
    return read(vec).to(dtype, copy=True)


def write(vec: PETSc.Vec, y: Tensor) -> None:
    """Copy a tensor into this rank's entries of a Vec."""
    from_dlpack(vec.toDLPack("w")).copy_(y)
