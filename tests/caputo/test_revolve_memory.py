"""A schedule never needs more memory than the rows of all steps, or says so with both sizes."""

from __future__ import annotations

import random
import sys

import checkpoint_schedules as cs
import pytest
import torch
from checkpoint_schedules import StorageType

import pfde
from pfde.caputo.choice import choose_history
from pfde.caputo.grid import Grid
from pfde.caputo.schemes import METHODS
from pfde.schedules import Online, Revolve, Sizes, StoreAll

MORE = r"keeps \d+ bytes of snapshots, rows and what takes steps again; StoreAll\(\) would keep \d+ for these \d+ steps"


def solve(schedule, steps=40, *, history=None, store="state", method="euler"):
    """One gradient on a field of three components, and its stats."""
    rate = torch.full((), 0.7, dtype=torch.float64, requires_grad=True)
    solution = pfde.solve(
        lambda t, y: -rate * y,
        torch.ones(3, dtype=torch.float64),
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        0.6,
        method=method,
        step_size=1 / steps,
        history=history,
        gradient=pfde.Discrete(schedule=schedule, store=store),
        params=[rate],
    )
    (gradient,) = torch.autograd.grad(solution.y[-1].sum(), rate)
    return gradient, solution.stats


def test_a_plan_by_snapshots_never_exceeds_all_rows():
    """Over random sizes; where the plan is one leaf it is that of StoreAll, with N steps in all."""
    rng, whole = random.Random(0), 0
    for _ in range(2000):
        block = rng.choice([1, 32])
        sizes = Sizes(
            rng.randint(1, 400),
            rng.randint(1, 900),
            rng.randint(1, 20),
            block,
            rng.randint(0, 300) * (block > 1),
            rng.randint(0, 900),
        )
        everything = sizes.steps * sizes.row_bytes
        schedule = Revolve(rng.randint(1, 20), rng.choice([0, 0, 3]))
        plan = schedule.plan(sizes)
        held = plan.memory + sizes.sweep_bytes * (plan.snapshots + plan.on_disk > 0)
        assert held <= everything, (schedule, sizes, plan)
        assert schedule.memory_bytes(sizes) == plan.memory
        if plan.leaf == sizes.steps:
            whole += 1
            assert plan == (0, 0, sizes.steps, sizes.steps, everything)
    assert 200 < whole < 1800  # both kinds were seen


def test_graphs_are_not_counted_as_rows():
    """With graphs of unknown size on top of the rows, snapshots of any weight may be the smaller part."""
    sizes = Sizes(300, 4700, 100, 32, 3100, 8500)
    assert Revolve(3).plan(sizes).snapshots == 0
    assert Revolve(3).plan(sizes._replace(graphs=True)).snapshots > 0


def test_online_knows_what_a_snapshot_weighs():
    """A leaf weighs no less than a snapshot; where N is known to be small, all rows are kept."""
    heavy = Sizes(sys.maxsize, 100 * 8, 8)
    actions = [next(stream) for stream in [Online(3).stream(heavy)] for _ in range(2)]
    assert (actions[1].n0, actions[1].n1) == (0, 128)
    assert Online(3).memory_bytes(Sizes(1000, 800, 8)) == 3 * 800 + 128 * 8
    known = Online(3).stream(Sizes(40, 47, 1))
    assert isinstance(known, cs.SingleMemoryStorageSchedule)
    assert not isinstance(Online(3).stream(Sizes(400, 47, 1)), cs.SingleMemoryStorageSchedule)
    assert StoreAll().memory_bytes(Sizes(40, 47, 2)) == 80


@pytest.mark.parametrize("schedule", [Revolve(3), Online(3)])
def test_a_short_solve_under_a_compressed_history_keeps_all_rows(schedule, recwarn):
    """40 steps are less than one snapshot of 20 modes and more: no step is taken twice, nothing is kept twice."""
    history = pfde.SumOfExponentials(1e-10)
    gradient, stats = solve(schedule, history=history)
    assert stats.snapshots_peak == 0 and stats.nfe_recompute == 0
    assert torch.equal(gradient, solve(StoreAll(), history=history)[0])
    assert not recwarn.list


def test_the_forward_history_goes_where_no_step_is_taken_again():
    """Under StoreAll as under a single leaf: it would be as large as tens of rows."""
    history, rate = pfde.SumOfExponentials(1e-10), torch.ones((), dtype=torch.float64, requires_grad=True)
    for schedule, held in ((StoreAll(), False), (Revolve(3), False), (Revolve(3, leaf=4), True)):
        y = pfde.fdeint(
            lambda t, y: -rate * y,
            torch.ones(3, dtype=torch.float64),
            torch.linspace(0, 1, 41, dtype=torch.float64),
            0.6,
            method="euler",
            history=history,
            gradient=pfde.Discrete(schedule=schedule),
            params=[rate],
        )
        sweep = y.grad_fn.run.sweep._sweep
        assert (sweep.workspace_bytes > 0) is held


@pytest.mark.parametrize(
    "schedule",
    [
        Revolve(3, leaf=4),
        Revolve(memory=9000, leaf=4),
        Online(3, leaf=4),
        cs.MultistageCheckpointSchedule(40, 3, 0),
        cs.MixedCheckpointSchedule(40, 4, storage=StorageType.RAM),
    ],
    ids=["revolve", "memory", "online", "multistage", "mixed"],
)
@pytest.mark.filterwarnings("ignore:Numba not available:RuntimeWarning")
def test_a_leaf_of_the_users_is_kept_and_the_sizes_are_told(schedule):
    """What is kept at most is at least the snapshots that the statistics tell, and the other number N rows."""
    with pytest.warns(UserWarning, match=MORE) as caught:
        _, stats = solve(schedule, history=pfde.SumOfExponentials(1e-10))
    (text,) = [str(w.message) for w in caught if "StoreAll() would keep" in str(w.message)]
    kept, everything = int(text.split(" keeps ")[1].split()[0]), int(text.split(" would keep ")[1].split()[0])
    assert everything == 40 * 3 * 8 < kept
    assert kept >= stats.snapshot_bytes_peak > 0


@pytest.mark.parametrize(
    ("schedule", "keywords"),
    [
        (Revolve(3, leaf=4), {"history": pfde.Exact()}),  # an index weighs nothing
        (Revolve(1, on_disk=2, leaf=64), {"history": pfde.SumOfExponentials(1e-6), "steps": 600}),
        (Revolve(3, leaf=4), {"history": pfde.SumOfExponentials(1e-6), "store": "graph"}),
        (Revolve(memory="4kB"), {"history": pfde.SumOfExponentials(1e-4), "steps": 400}),
    ],
)
def test_nothing_is_told_where_less_is_kept(schedule, keywords, recwarn, folder):
    solve(schedule, **keywords)
    assert not recwarn.list


def test_adaptive_steps_are_not_blamed_for_the_first_snapshot(recwarn):
    """Their number is known at the end only: one snapshot and one leaf are unavoidable."""
    rate = torch.ones((), dtype=torch.float64, requires_grad=True)
    y0, t = torch.ones(3, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    for schedule in (Revolve(5), Online(5)):
        y = pfde.odeint(lambda t, y: -rate * y, y0, t, params=[rate], gradient=pfde.Discrete(schedule=schedule))
        y[-1].sum().backward()
    assert not recwarn.list


@pytest.mark.parametrize("method", ["euler", "pece", "l1"])
def test_the_choice_of_a_history_under_a_schedule(method):
    """Exact for few steps, since its rows are fewer than what two directions of a compressed one hold; else compressed.

    The estimate of docs/memory.md, in rows: c S + M + F + B against N, or 2 N in the integral form.
    """
    scheme = METHODS[method]
    chosen = {}
    for steps in (10, 40, 100, 200, 400, 1000, 5000):
        grid = Grid(0.0, 1 / steps, steps, 1.0)
        choice = choose_history(scheme, grid, 1, 8, torch.float64, schedule=Revolve(3))
        chosen[steps] = isinstance(choice.history, pfde.Exact)
        assert ("rows" in choice.reason) is chosen[steps]
    assert chosen[10] and chosen[40] and not chosen[1000] and not chosen[5000]
    assert list(chosen.values()) == sorted(chosen.values(), reverse=True)  # one threshold
    unknown = choose_history(scheme, Grid(0.0, 0.025, 40, 1.0), 1, 8, torch.float64, schedule=Silent())
    assert isinstance(unknown.history, pfde.SumOfExponentials)


class Silent(pfde.schedules.Schedule):
    """A schedule that does not say what it will keep."""

    def stream(self, sizes):
        return StoreAll().stream(sizes)


def test_history_none_and_few_steps():
    """The case of issue 9: 40 steps under Revolve(3) took twice the memory of StoreAll."""
    gradient, stats = solve(Revolve(3))
    expected, reference = solve(StoreAll())
    assert stats.history == reference.history == repr(pfde.Exact())
    assert "exponentials would take about" in stats.history_reason
    assert torch.equal(gradient, expected) and stats.snapshot_bytes_peak == 0
    _, stats = solve(Revolve(3), 1000)
    assert stats.history.startswith("SumOfExponentials") and stats.snapshot_bytes_peak > 0
