"""pfde on 1, 2 and 4 ranks: a state split over ranks, errors on one rank only, data-parallel steps. No test may hang.

The workers in `programs/` assert on every rank; mpiexec then exits non-zero. Several of them share a launch, which runs
under a hard time limit. Workers:

    agreement, ode_solves agreement    every method with a split state against one rank, to 1e-13
    checkpoints                        the same under schedules; faults of one rank's disk
    faults, ode_solves faults          an error on one rank is an error on all
    disagreement                       so is what the ranks do differently
    data_parallel                      raise_together around a step of training
    leaks                              nothing is left of solves with a shared state
"""

import functools
import json
from pathlib import Path

import pytest

from pfde.caputo.schemes import METHODS
from support.launch import launch, needs_mpiexec

PROGRAMS = Path(__file__).parent / "programs"
SAYS = {
    "agreement": "digest ",
    "data_parallel": "together",
    "faults": " faults survived",
    "leaks": "no leak",
    "checkpoints": "as one",
    "ode_solves agreement": "as one",
    "ode_solves faults": " faults survived",
    "disagreement": "refused together",
}

pytestmark = [pytest.mark.mpi, needs_mpiexec]


def run(ranks: int, *commands: str) -> dict[str, str]:
    """What each worker printed."""
    output = launch(ranks, PROGRAMS / "several.py", *commands, limit=120.0 + 60.0 * len(commands))
    parts = [part.partition("\n") for part in output.split("== ")[1:]]
    assert [command for command, *_ in parts] == list(commands), output
    said = {}
    for command, _, text in parts:
        expected = next(what for name, what in SAYS.items() if command.startswith(name))
        said[command] = next((line for line in text.splitlines() if expected in line), "")
        assert said[command], output
    return said


def digests(said: str) -> dict[str, list[str]]:
    """By method, of each rank, what `agreement` printed."""
    return json.loads(said.removeprefix("digest "))


TWICE = "agreement even pece,trapezoid"  # an explicit and an implicit method


@functools.cache
def nutshell() -> dict[str, str]:
    return run(2, "faults trapezoid", "checkpoints faults", TWICE)


@pytest.mark.smoke
def test_two_ranks_in_a_nutshell() -> None:
    assert list(digests(nutshell()[TWICE])) == ["pece", "trapezoid"]


def test_one_rank() -> None:
    said = run(1, "agreement even", "ode_solves agreement")
    assert [len(ranks) for ranks in digests(said["agreement even"]).values()] == [1] * len(METHODS)


def test_two_ranks(tmp_path: Path) -> None:
    """And what ran before, in other processes, gave the same bits."""
    assert " " not in str(tmp_path)
    said = run(
        2,
        *("leaks euler", "leaks trapezoid", "agreement even", "faults euler", "faults pece", "data_parallel"),
        *("ode_solves agreement", "ode_solves faults", f"disagreement {tmp_path}"),
        *("checkpoints agreement", "checkpoints uneven"),
    )
    found = digests(said["agreement even"])
    assert [len(ranks) for ranks in found.values()] == [2] * len(METHODS)
    before = digests(nutshell()[TWICE])
    assert before == {method: found[method] for method in before}


def test_four_ranks() -> None:
    """One of them with most of the state."""
    said = run(4, "agreement uneven", "faults l1", "data_parallel")
    assert [len(ranks) for ranks in digests(said["agreement uneven"]).values()] == [4] * len(METHODS)
