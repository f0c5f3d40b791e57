"""pfde on 1, 2 and 4 ranks: a state split over ranks, errors on one rank only, data-parallel steps. No test may hang.

The workers in `mpi/` assert on every rank; mpiexec then exits non-zero. Each runs under a hard time limit.
"""

from pathlib import Path

import pytest

from support.launch import launch, needs_mpiexec

WORKERS = Path(__file__).parent / "programs"

pytestmark = [pytest.mark.mpi, needs_mpiexec]


@pytest.mark.parametrize(("ranks", "split"), [(1, "even"), (4, "uneven")])
def test_a_split_state_agrees_with_one_rank(ranks: int, split: str) -> None:
    """Every method, to 1e-13; a second solve in the same process bitwise."""
    output = launch(ranks, WORKERS / "agreement.py", split)
    assert len(output.split()) == 1 + ranks, output


@pytest.mark.smoke
def test_two_runs_on_as_many_ranks_agree_bitwise() -> None:
    """And each with one rank to 1e-13."""
    runs = [launch(2, WORKERS / "agreement.py", "even") for _ in range(2)]
    assert runs[0].startswith("digest")
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("ranks", "method"),
    [(2, "euler"), (2, "pece"), pytest.param(2, "trapezoid", marks=pytest.mark.smoke), (4, "l1")],
)
def test_an_error_on_one_rank_raises_on_all(ranks: int, method: str) -> None:
    assert "faults survived" in launch(ranks, WORKERS / "faults.py", method)


@pytest.mark.parametrize("ranks", [2, 4])
def test_raise_together_around_a_data_parallel_step(ranks: int) -> None:
    assert launch(ranks, WORKERS / "data_parallel.py").strip() == "together"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.parametrize("method", ["euler", "trapezoid"])
def test_solves_with_a_shared_state_leak_nothing(method: str) -> None:
    assert "no leak" in launch(2, WORKERS / "leaks.py", method)


@pytest.mark.parametrize("mode", ["agreement", pytest.param("faults", marks=pytest.mark.smoke), "uneven"])
def test_checkpointed_solves_of_a_split_state(mode: str) -> None:
    assert launch(2, WORKERS / "checkpoints.py", mode).strip() == "as one"
