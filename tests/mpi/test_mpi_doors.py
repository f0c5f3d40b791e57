"""What ranks that share a state do differently is an error on all of them, not a hang and not a number on some."""

from pathlib import Path

import pytest

from support.launch import launch, needs_mpiexec

WORKERS = Path(__file__).parent / "programs"

pytestmark = [pytest.mark.mpi, needs_mpiexec]


def test_differences_between_ranks_are_refused_on_all_of_them(tmp_path: Path) -> None:
    """Other functions, NaN in one backward pass, gradients wanted on one rank; a failure before a halo exchange."""
    assert launch(2, WORKERS / "doors.py", str(tmp_path), limit=120.0).strip() == "refused together"
