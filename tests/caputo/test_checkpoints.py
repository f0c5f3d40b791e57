"""Checkpointed solves: the gradient of store-all bit for bit, and snapshots within their budget.

Bitwise equality is exact because a schedule changes which steps are taken again, never how one is taken. Since it also
holds when both sides are wrong, the reference is compared with autograd through the steps, to 1e-12 as in
test_gradients.py. Implicit methods, ten times as dear, meet a few of the schedules each, together all of them.
"""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pfde
from pfde.caputo.schemes import METHODS
from pfde.schedules import Sizes, forward_steps
from support.checkpointing import (
    BOUNDED,
    EXPLICIT,
    FOREIGN,
    HISTORIES,
    IMPLICIT,
    NONUNIFORM,
    OURS,
    SCHEDULES,
    UNIFORM,
    N,
    Solve,
    assert_close,
    assert_same,
    discrete,
    gradients,
    left_in,
    store_all,
)
from support.covering import EXHAUSTIVE, pairs
from support.launch import environment

pytestmark = [
    pytest.mark.usefixtures("folder"),
    pytest.mark.filterwarnings("ignore:Numba not available:RuntimeWarning"),
]


# -- every schedule x history x method --------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(("method", "history", "name"), pairs(EXPLICIT, HISTORIES, SCHEDULES))
def test_explicit_methods_under_every_schedule(method, history, name):
    found = gradients(method, history, discrete(SCHEDULES[name]()))
    assert_same(found, store_all(method, history), name)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("method", IMPLICIT)
def test_implicit_methods_under_some_schedules_each(method, history):
    turn, last = IMPLICIT.index(method) * len(HISTORIES) + list(HISTORIES).index(history), len(SCHEDULES) - 1
    assert len(IMPLICIT) * len(HISTORIES) >= last  # the turns reach every one, the first one two
    for name in SCHEDULES if EXHAUSTIVE else list(SCHEDULES)[turn : turn + 1] + list(SCHEDULES)[last:][: turn == 0]:
        found = gradients(method, history, discrete(SCHEDULES[name]()))
        assert_same(found, store_all(method, history), name)


@pytest.mark.parametrize("history", ["exact", "exponentials"])
@pytest.mark.parametrize("method", NONUNIFORM)
def test_on_a_nonuniform_grid(method, history):
    grid = {"t": pfde.graded(0.2, 1.4, N, 2.0)}
    expected = gradients(method, history, pfde.Discrete(), **grid)
    assert_close(expected, gradients(method, history, pfde.Backprop(), **grid))
    names = ["revolve on disk", "online", "mixed", "revolve, every step", "disk, once", "h-revolve"]
    if method not in EXPLICIT:  # two each, together all
        turn = 2 * [(m, h) for m in NONUNIFORM if m not in EXPLICIT for h in ("exact", "exponentials")].index(
            (method, history)
        )
        names = [names[(turn + k) % len(names)] for k in range(2)]
    for name in names:
        assert_same(gradients(method, history, discrete(SCHEDULES[name]()), **grid), expected, name)


SETTINGS = {
    "orders": {"alpha": [0.35, 0.7, 0.95]},
    "float32": {"dtype": torch.float32},
    "float32, orders": {"dtype": torch.float32, "alpha": [0.35, 0.7, 0.95]},
    "coarse outputs": {"t": UNIFORM[::9], "step_size": 1.2 / N},
    "one step": {"t": UNIFORM[:2]},
}


@pytest.mark.parametrize(
    ("method", "history", "name"), pairs(["euler", "pece", "trapezoid", "l1"], HISTORIES, SETTINGS)
)
def test_orders_dtypes_and_outputs(method, history, name):
    setting = SETTINGS[name]
    expected = gradients(method, history, pfde.Discrete(), **setting)
    if "dtype" not in setting:
        assert_close(expected, gradients(method, history, pfde.Backprop(), **setting))
    memory = "6kB" if "t" in setting else "8kB"
    schedules = pfde.Revolve(2, on_disk=1, leaf=7), pfde.Revolve(memory=memory), pfde.Online(2, leaf=6)
    for schedule in schedules if method in EXPLICIT else schedules[:1]:
        assert_same(gradients(method, history, discrete(schedule), **setting), expected, str(schedule))


@pytest.mark.parametrize(("method", "history", "store"), pairs(METHODS, HISTORIES, ["stages", "graph"]))
def test_every_store(method, history, store):
    """Bitwise but for two cases of the exact history, where no step is taken again and so nothing is kept again.

    In the derivative form f is evaluated at y_0 + X_n instead, y_n to rounding; the predictors of `pece` are built by
    another order of summation. Both are as different between the stores under StoreAll.
    """
    names = ["revolve", "online", "mixed on disk"] if method in EXPLICIT else ["mixed on disk"]
    rounded = {"stages": method == "pece", "graph": method == "pece" or METHODS[method].form == "derivative"}
    for name in names:
        found = gradients(method, history, discrete(SCHEDULES[name](), store=store))
        if history == "exact" and rounded[store]:
            assert_close(found, store_all(method, history), 1e-13)
        else:
            assert_same(found, store_all(method, history), f"{name}, {store}")


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("method", ["euler", "pece", "trapezoid", "bdf2"])
def test_a_second_backward_pass(method, history):
    for name in ("revolve on disk", "online", "mixed") if method in EXPLICIT else ("revolve, a block",):
        solve = Solve(method, history, discrete(SCHEDULES[name]()))
        for _ in range(3 if method == "euler" else 2):
            assert_same(solve.backward(retain_graph=True), store_all(method, history), name)
        del solve


@pytest.mark.parametrize("history", HISTORIES)
def test_pending_solves_share_nothing(history):
    """Not even a schedule's stream: one schedule object serves them all, ours or a foreign one."""
    for make in (OURS["revolve on disk"], OURS["online"], FOREIGN["multistage"]):
        gradient = discrete(make())
        first, second = (Solve(method, history, gradient) for method in ("euler", "pece"))
        third = Solve("euler", history, gradient)
        assert_same(second.backward(), store_all("pece", history))
        assert_same(first.backward(), store_all("euler", history))
        assert_same(third.backward(), store_all("euler", history))


# -- budgets -----------------------------------------------------------------------------------------------------------


class Watched(pfde.Revolve):
    """A Revolve that tells for what sizes it was asked to plan."""

    def stream(self, sizes):
        type(self).sizes = sizes
        return super().stream(sizes)


@pytest.mark.parametrize("history", BOUNDED)
@pytest.mark.parametrize("method", EXPLICIT)
def test_snapshots_keep_within_their_number_and_bytes(method, history):
    for snapshots, on_disk, leaf in [(3, 0, 1), (2, 0, 7), (1, 0, 3), (2, 2, 5), (0, 3, 6)]:
        for kind in (Watched, pfde.Online):
            solve = Solve(method, history, discrete(kind(snapshots, on_disk=on_disk, leaf=leaf)))
            held = solve.stats.snapshots_peak
            solve.backward()
            assert 0 < held <= solve.stats.snapshots_peak == snapshots + on_disk
            assert 0 < solve.stats.snapshot_bytes_peak <= (snapshots + on_disk) * Watched.sizes.snapshot_bytes(leaf)
            # The snapshot at step 0 has no rows of its block yet, none has fewer than the modes and y.
    del solve


@pytest.mark.parametrize("method", ["euler", "pece", "beuler", "gl"])
def test_the_bytes_of_a_snapshot_follow_from_nodes_window_and_state(method):
    """Q modes, the L rows of the band and those of a block, and y; times d = 3 and 8 bytes."""
    scheme, history = METHODS[method], HISTORIES["exponentials"]
    solve = Solve(method, history, discrete(Watched(1, leaf=40)))
    solve.backward()
    Q = len(history.compress(N, 1.2 / N, scheme.window, scheme.exponents).nodes)
    # The only snapshot is that of step 0: all modes, the band, no row of the block yet.
    state = (Q + scheme.window - 1 + 1) * 24
    assert solve.stats.snapshot_bytes_peak == state
    # A leaf has y_n, and of `pece` the predictor, which a bounded history cannot give again.
    assert Watched.sizes[:5] == Sizes(N, state, 48 if method == "pece" else 24, 32, 31 * 24)[:5]
    assert Watched.sizes.sweep_bytes >= state  # the sweep itself has a state, and the rows of its band and block


@pytest.mark.parametrize("history", BOUNDED)
def test_a_budget_in_bytes_is_kept(history):
    for budget in (4000, 6000, 9000, "12kB"):
        schedule = Watched(memory=budget)
        solve = Solve("euler", history, discrete(schedule))
        assert_same(solve.backward(), store_all("euler", history))
        plan, bytes_ = schedule.plan(Watched.sizes), 12000 if budget == "12kB" else budget
        assert plan.memory <= bytes_
        assert solve.stats.snapshot_bytes_peak + plan.leaf * Watched.sizes.row_bytes <= bytes_
        assert solve.stats.snapshots_peak <= plan.snapshots


def test_with_the_exact_history_a_snapshot_is_an_index(folder):
    for name in ("revolve on disk", "online on disk", "multistage", "h-revolve", "disk"):
        solve = Solve("euler", "exact", discrete(SCHEDULES[name]()))
        assert left_in(folder) == []
        solve.backward()
        assert solve.stats.snapshot_bytes_peak == 0 and solve.stats.nfe_recompute == 0


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("history", "snapshots"),
    [("exponentials", 1), ("short", 2), ("exponentials", 3), *itertools.product(BOUNDED, [7, 44, 60])],
)
def test_evaluations_are_the_binomial_numbers(history, snapshots):
    """euler: one f a step but for the last step, whose f nobody needs; F_0, and the first look at f; F_0's product."""
    solve = Solve("euler", history, discrete(pfde.Revolve(snapshots, leaf=1)))
    assert (solve.stats.nfe_forward, solve.stats.nfe_recompute, solve.stats.nfe_backward) == (N + 1, 0, 0)
    solve.backward(retain_graph=True)
    again = forward_steps(N, snapshots) - N
    assert (solve.stats.nfe_forward, solve.stats.nfe_recompute, solve.stats.nfe_backward) == (N + 1, again, N)
    solve.backward()  # the forward pass anew, without a first look
    assert solve.stats.nfe_forward == N + 1 and solve.stats.nfe_backward == 2 * N
    assert solve.stats.nfe_recompute == 2 * again + N


GROWTH = """
import gc, os, torch, pfde

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.set_num_threads(1)
w = torch.full((4096,), 0.5, dtype=torch.float64, requires_grad=True)
t, history = torch.tensor([0.0, 1.0], dtype=torch.float64), pfde.SumOfExponentials(1e-3)
peak = calls = 0

def func(t, y):
    global peak, calls
    calls += 1
    if calls % 20 == 0:
        peak = max(peak, resident())
    return -w * y

def growth(schedule, step):
    global peak
    gc.collect()
    peak = before = resident()
    gradient, y0 = pfde.Discrete(schedule=schedule), torch.ones(4096, dtype=torch.float64)
    y = pfde.fdeint(func, y0, t, 0.6, method="euler", step_size=step, gradient=gradient, history=history, params=[w])
    y.sum().backward()
    return peak - before

growth(pfde.StoreAll(), 1 / 100)  # what is loaded and allocated once
print(growth(pfde.Revolve(2, leaf=64), 1 / 1000), growth(pfde.StoreAll(), 1 / 1000))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_memory_does_not_grow_with_the_steps():
    """1000 steps of 4096 doubles: 33 MB of states with store-all; with two snapshots and a leaf of 64 about 9 MB.

    In a process of its own, whose large blocks go back when they are freed: a heap that was used before hides what is
    taken of it.
    """
    fresh = environment(MALLOC_MMAP_THRESHOLD_="65536")
    done = subprocess.run([sys.executable, "-c", GROWTH], env=fresh, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    bounded, whole = map(int, done.stdout.split())
    assert whole > 25e6
    assert bounded < whole / 3, f"revolve {bounded / 1e6:.1f} MB, store-all {whole / 1e6:.1f} MB"
