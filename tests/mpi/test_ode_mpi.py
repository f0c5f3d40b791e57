"""`odeint` on 1 and 2 ranks: a state split over ranks with adaptive and implicit steps, errors on one rank only.

The workers in `mpi/` assert on every rank; mpiexec then exits non-zero. Each runs under a hard time limit.
"""

from pathlib import Path

import pytest

from support.launch import launch, needs_mpiexec

WORKER = Path(__file__).parent / "programs" / "ode_solves.py"

pytestmark = [pytest.mark.mpi, needs_mpiexec]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_split_state_agrees_with_one_rank(ranks: int) -> None:
    """To 1e-13, with the same steps: the norm of the error is that of the whole state."""
    assert launch(ranks, WORKER, "agreement", limit=90.0).strip() == "as one"


def test_an_error_on_one_rank_raises_on_all() -> None:
    assert "faults survived" in launch(2, WORKER, "faults", limit=90.0)
