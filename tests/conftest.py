"""Shared by all tests: one thread, PETSc's options database as each test found it, a folder for snapshots."""

import gc
import tempfile

import pytest
import torch

pytest.register_assert_rewrite("support")  # before it is imported

from support.checkpointing import left_in  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """What starts mpiexec first: one test of it may take half a minute, in which the other process has others to do."""
    items.sort(key=lambda item: item.get_closest_marker("mpi") is None)


@pytest.fixture(autouse=True)
def _petsc_options():
    """No PETSc option outlives a test."""
    from petsc4py import PETSc

    before = dict(PETSc.Options().getAll())
    yield
    assert dict(PETSc.Options().getAll()) == before, "the test left PETSc options behind"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where all disk tiers of a test go; nothing is in it when the test ends."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    if left_in(tmp_path):
        gc.collect()  # which is slow; an error that pytest has caught may hold a solve
    assert left_in(tmp_path) == [], "snapshots were left on disk"
