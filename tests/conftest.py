"""Shared by all tests: one thread, and PETSc's options database as each test found it."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _petsc_options():
    """No PETSc option outlives a test."""
    from petsc4py import PETSc

    before = dict(PETSc.Options().getAll())
    yield
    assert dict(PETSc.Options().getAll()) == before, "the test left PETSc options behind"
