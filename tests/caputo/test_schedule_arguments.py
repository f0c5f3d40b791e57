"""Schedules and histories as arguments: what does not fit is named, with the remedy."""

import checkpoint_schedules as cs
import pytest

import pfde
from support.checkpointing import (
    N,
    Solve,
    assert_same,
    discrete,
    gradients,
    store_all,
)

pytestmark = [
    pytest.mark.usefixtures("folder"),
    pytest.mark.filterwarnings("ignore:Numba not available:RuntimeWarning"),
]


# -- arguments ---------------------------------------------------------------------------------------------------------


def used():
    schedule = cs.MultistageCheckpointSchedule(N, 3, 2)
    next(schedule)
    return schedule


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: discrete("revolve"), TypeError, r"schedule must be StoreAll\(\), Revolve\(.*: got 'revolve'"),
        (lambda: discrete(pfde.Revolve), TypeError, "schedule must be StoreAll.*: got <class"),
        (lambda: discrete(10), TypeError, "schedule must be StoreAll.*: got 10"),
        (lambda: discrete(pfde.Exact()), TypeError, r"schedule must be StoreAll.*: got Exact"),
        (lambda: pfde.Revolve(), ValueError, "exactly one of snapshots and memory must be given: got snapshots=None"),
        (lambda: pfde.Revolve(3, memory="1GB"), ValueError, "exactly one of snapshots and memory must be given: got s"),
        (lambda: discrete(used()), ValueError, "schedule must not have been started: got a Multistage.*make a new one"),
        (lambda: discrete(cs.NoneCheckpointSchedule()), ValueError, r"schedule must keep what a gradient needs: got N"),
        (lambda: pfde.SumOfExponentials("x"), TypeError, "tolerance must be a number: got 'x'"),
        (lambda: pfde.SumOfExponentials(0), ValueError, r"tolerance must be in \(0, 0.1\], such as 1e-10: got 0"),
        (lambda: pfde.SumOfExponentials(0.5), ValueError, r"tolerance must be in \(0, 0.1\].*: got 0.5"),
        (lambda: pfde.SumOfExponentials(float("nan")), ValueError, r"tolerance must be in \(0, 0.1\].*: got nan"),
        (lambda: pfde.ShortMemory(0), ValueError, "length must be positive and finite, in the units of t: got 0"),
        (lambda: pfde.ShortMemory(float("inf")), ValueError, "length must be positive and finite.*: got inf"),
        (lambda: pfde.ShortMemory("1 s"), TypeError, "length must be a number, in the units of t: got '1 s'"),
    ],
)
def test_descriptions_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"gradient": discrete(pfde.Revolve(memory=100))},
            r"memory must hold a snapshot of \d+ bytes and a leaf of 1 x 24 bytes: got 100; give at least \d+ bytes",
        ),
        (
            {"gradient": discrete(cs.MultistageCheckpointSchedule(N + 1, 3, 2))},
            rf"schedule must be made for the steps of the solve, {N}: got a Multistage\w+ for {N + 1}; make it with "
            rf"max_n={N}",
        ),
        (
            {"history": pfde.ShortMemory(0.4), "t": pfde.graded(0.0, 1.0, N, 2.0)},
            r"history=ShortMemory\(length=0.4\) needs a uniform grid: give step_size, or use SumOfExponentials\(\)",
        ),
        (
            {"history": pfde.Exact("fft"), "t": pfde.graded(0.0, 1.0, N, 2.0)},
            r"history=Exact\(algorithm='fft'\) needs a uniform grid: leave algorithm out",
        ),
        (
            {"method": "gl", "t": pfde.graded(0.0, 1.0, N, 2.0)},
            r"t must be uniformly spaced for method 'gl' when it is the grid: t\[1\]=.*one of the methods euler, pece",
        ),
        ({"history": pfde.SumOfExponentials(1e-17)}, "tolerance=1e-17 of SumOfExponentials cannot be met .*; use a to"),
    ],
    ids=["memory", "foreign", "short memory", "fft", "gl", "tolerance"],
)
def test_what_does_not_fit_the_solve(keywords, message):
    with pytest.raises(ValueError, match=message):
        Solve(**{"method": "euler", "history": "exponentials"} | keywords)
    store_all("euler", "exponentials")


def test_the_least_memory_that_the_message_names_is_enough():
    schedule = pfde.Revolve(memory=100)
    with pytest.raises(ValueError, match="give at least") as caught:
        Solve("euler", "exponentials", discrete(schedule))
    least = int(str(caught.value).split("at least ")[1].split()[0])
    found = gradients("euler", "exponentials", discrete(pfde.Revolve(memory=least)))
    assert_same(found, store_all("euler", "exponentials"))
    with pytest.raises(ValueError, match="give at least"):
        Solve("euler", "exponentials", discrete(pfde.Revolve(memory=least - 1)))


def test_a_foreign_schedule_used_after_it_was_given():
    given = cs.MultistageCheckpointSchedule(N, 3, 2)
    gradient = discrete(given)
    next(given)
    with pytest.raises(ValueError, match="schedule must not have been started"):
        Solve("euler", "exponentials", gradient)
