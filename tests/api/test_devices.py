"""Devices: those that PETSc has vectors for, and CUDA where there is one."""

import pytest
import torch

import pfde
from pfde.caputo.schemes import METHODS
from support.faults import Field, T, gradients, start


def test_devices_that_petsc_has_no_vectors_for() -> None:
    from petsc4py import PETSc

    from pfde.system.vectors import require_device

    require_device(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"y0 is on meta: PETSc has vectors for 'cpu' and 'cuda' only; move y0"):
        require_device(torch.device("meta"))
    if not PETSc.Sys.hasExternalPackage("cuda"):
        with pytest.raises(
            RuntimeError, match=r"y0 is on cuda, but this PETSc was built without CUDA vectors: configure"
        ):
            require_device(torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_cuda(method: str) -> None:
    from petsc4py import PETSc

    f, y0 = Field().cuda(), start().detach().cuda().requires_grad_()
    if not PETSc.Sys.hasExternalPackage("cuda"):
        with pytest.raises(RuntimeError, match="this PETSc was built without CUDA vectors"):
            pfde.fdeint(f, y0, T, 0.6, method=method)
        return
    y = pfde.fdeint(f, y0, T, 0.6, method=method)
    got = torch.autograd.grad(y.square().sum(), (y0, f.a))
    expected = gradients(method)
    for a, b in zip(got, (expected[0], expected[2]), strict=True):
        assert a.is_cuda
        assert torch.allclose(a.cpu(), b, rtol=1e-11)
