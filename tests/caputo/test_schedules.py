"""Every schedule on an abstract machine: what an action needs is there, budgets hold, counts are the optimum."""

from __future__ import annotations

import copy
import math
import random
import warnings

import checkpoint_schedules as cs
import pytest
from checkpoint_schedules import StorageType
from checkpoint_schedules.multistage import optimal_steps_binomial

from pfde.schedules import Online, Revolve, Sizes, StoreAll, adopt, forward_steps
from pfde.schedules.revolve import parse_bytes
from support.covering import EXHAUSTIVE

RAM, DISK, WORK, NONE = StorageType.RAM, StorageType.DISK, StorageType.WORK, StorageType.NONE
SNAPSHOTS = range(1, 21)
STEPS = range(1, 301)
SOME_STEPS = [*range(1, 50), *range(50, 301, 25)]  # on the machine, which takes its time


def shared(c):
    """The numbers of steps that this budget is tried with: the small ones, and a fifth of the others in turn."""
    return STEPS if EXHAUSTIVE else [*range(1, 21), *range(21 + c % 5, 301, 5)]


every_budget = pytest.mark.parametrize(
    "c", [pytest.param(c, marks=pytest.mark.smoke) if c in (3, 10) else c for c in SNAPSHOTS]
)


class Machine:
    """Executes a stream as a driver does, on step numbers alone, and refuses what a solver could not do.

    Kept in a tier under step n is ("restart", n, n) or ("rows", n0, n1); `leaf` is the working leaf, a range of steps
    or None. `bytes_peak` counts memory: snapshots and the working leaf.
    """

    def __init__(self, stream, sizes, *, leaks=False):
        self.N, self.sizes = sizes.steps, sizes
        self.state, self.leaf = 0, None
        self.kept = {RAM: {}, DISK: {}}
        self.peak = {RAM: 0, DISK: 0}
        self.bytes_peak = self.forward_steps = self.actions = 0
        self.ended = False
        self.reversed_to = self.N
        self.longest_leaf = 0
        while True:
            action = next(stream)
            self.actions += 1
            if isinstance(action, cs.EndReverse):
                break
            getattr(self, type(action).__name__)(action)
            if isinstance(action, cs.Forward | cs.Copy):
                self.note()
            if isinstance(action, cs.Forward) and not self.ended and self.state == self.N:
                stream.finalize(self.N)
                assert isinstance(next(stream), cs.EndForward)
                self.ended = True
        assert self.ended and self.reversed_to == 0
        assert leaks or not (self.kept[RAM] or self.kept[DISK]), "snapshots were left behind"

    def note(self):
        for tier in (RAM, DISK):
            self.peak[tier] = max(self.peak[tier], len(self.kept[tier]))
        rows = len(self.leaf or ())
        states = 0
        for kind, n0, n1 in self.kept[RAM].values():
            rows += n1 - n0
            states += kind == "restart"
        self.bytes_peak = max(self.bytes_peak, rows * self.sizes.row_bytes + states * self.sizes.state_bytes)

    def keep(self, what, n, tier):
        assert n not in self.kept[tier], f"step {n} is there already"
        self.kept[tier][n] = what

    def Forward(self, action):
        n0, n1 = action.n0, min(action.n1, self.N)
        assert n0 <= n1 <= self.reversed_to
        assert self.state == n0, f"the solver is at {self.state}, not {n0}"
        if action.write_ics:
            self.keep(("restart", n0, n0), n0, action.storage)
        if action.write_adj_deps and action.storage is WORK:
            self.leaf = range(n0, n1)
            self.longest_leaf = max(self.longest_leaf, n1 - n0)
        elif action.write_adj_deps:
            self.keep(("rows", n0, n1), n0, action.storage)
        elif n1 > n0 and self.ended:
            self.leaf = None
        self.forward_steps += n1 - n0
        self.state = n1

    def Reverse(self, action):
        assert self.ended and action.n1 == self.reversed_to and action.n0 < action.n1
        assert self.leaf == range(action.n0, action.n1), f"rows of {self.leaf}, not of {action}"
        self.reversed_to, self.leaf, self.state = action.n0, None, None

    def Copy(self, action):
        kind, n0, n1 = self.kept[action.from_storage][action.n]
        if action.to_storage is not WORK:
            self.keep((kind, n0, n1), action.n, action.to_storage)
        elif kind == "restart":
            self.state = action.n
        else:
            self.leaf, self.state = range(n0, n1), n1

    def Move(self, action):
        if action.to_storage is not NONE:
            self.Copy(action)
        del self.kept[action.from_storage][action.n]


def until_the_end(stream):
    while not isinstance(action := next(stream), cs.EndReverse):
        yield action


def run(schedule, steps, *, state_bytes=1, row_bytes=1, **kwargs):
    sizes = Sizes(steps, state_bytes, row_bytes)
    return Machine(schedule.stream(sizes), sizes, **kwargs)


@every_budget
def test_the_closed_form_is_the_optimum(c):
    for n in shared(c):
        if c <= max(1, n - 1):
            assert forward_steps(n, c) == optimal_steps_binomial(n, c)
        else:
            assert forward_steps(n, c) == 2 * n - 1


@every_budget
def test_revolve_takes_the_fewest_steps(c):
    schedule = Revolve(c, leaf=1)
    for N in shared(c):
        sizes = Sizes(N, 1, 1)
        taken = sum(len(action) for action in until_the_end(schedule.stream(sizes)) if isinstance(action, cs.Forward))
        assert taken == forward_steps(N, c) == schedule.plan(sizes).forward_steps
    for N in SOME_STEPS[c % 3 :: 3]:
        machine = run(schedule, N)
        assert machine.forward_steps == forward_steps(N, c)
        assert machine.peak[RAM] <= c and machine.peak[DISK] == 0


@every_budget
def test_online_stays_close_to_the_optimum(c):
    """T <= (1 + 1/(2c+1)) F, the bound that Online documents, and at most one pass more.

    T for every N by formula (1) of the module from the snapshots held when N is reached; the machine, which checks
    all else, agrees with it.
    """
    stream = Online(c, leaf=1).stream(Sizes(0, 1, 1))
    held, taken, N, most = [], {}, 0, max(STEPS)
    while most != N:
        action = next(stream)
        if isinstance(action, cs.Move):
            held.remove(action.n)
        elif action.write_ics:
            held.append(action.n0)
        else:
            N = action.n1
            ends = [*held[1:], N - 1]
            gaps = [(end - start, c - i) for i, (start, end) in enumerate(zip(held, ends, strict=True))]
            taken[N] = N + sum(forward_steps(gap, free) for gap, free in gaps if gap)
            optimum = forward_steps(N, c)
            assert optimum <= taken[N] <= optimum + N, f"N={N}"
            assert taken[N] * (2 * c + 1) <= optimum * (2 * c + 2), f"N={N}: {taken[N]}, optimum {optimum}"
            assert taken[N] == optimum or c > 1
    for N in SOME_STEPS[c % 3 :: 3]:
        machine = run(Online(c, leaf=1), N)
        assert machine.forward_steps == taken[N]
        assert machine.peak[RAM] <= c and machine.peak[DISK] == 0


@pytest.mark.parametrize("leaf", [1, 5, 64])
@pytest.mark.parametrize(("ram", "disk"), [(3, 2), (1, 4), (0, 3), (2, 0)])
def test_tiers_and_leaves(ram, disk, leaf):
    """Counts are those of the blocks, the last of which may be short and is advanced once, whatever the tiers."""
    c = ram + disk
    for N in [*range(1, 40), 100, 333]:
        blocks = -(-N // leaf)
        short = blocks * leaf - N
        machine = run(Revolve(ram, disk, leaf=leaf), N)
        assert machine.forward_steps == leaf * forward_steps(blocks, c) - short
        assert machine.longest_leaf == min(leaf, N)
        assert machine.peak[RAM] <= ram and machine.peak[DISK] <= disk
        online = run(Online(ram, on_disk=disk, leaf=leaf), N)
        assert online.forward_steps <= math.floor((1 + 1 / (2 * c + 1)) * leaf * forward_steps(blocks, c))
        assert online.longest_leaf == min(leaf, N)
        assert online.peak[RAM] <= ram and online.peak[DISK] <= disk


@pytest.mark.smoke
def test_a_solve_of_one_leaf_takes_no_step_twice():
    for schedule in (StoreAll(), Revolve(5, leaf=64), Revolve(memory=64), Online(2)):
        machine = run(schedule, 64)
        assert machine.forward_steps == 64
        assert machine.peak[RAM] == 0


@pytest.mark.smoke
def test_memory_is_kept_and_used_for_the_fewest_steps():
    """Against all numbers of snapshots and leaves, by the machine's own count of bytes and steps."""
    rng = random.Random(0)
    for _ in range(1000 if EXHAUSTIVE else 60):
        sizes = Sizes(rng.randint(1, 60), rng.randint(1, 40), rng.randint(1, 6))
        memory = rng.randint(sizes.state_bytes + sizes.row_bytes, 300)
        plan = Revolve(memory=memory).plan(sizes)
        machine = Machine(Revolve(memory=memory).stream(sizes), sizes)
        assert machine.forward_steps == plan.forward_steps
        assert machine.bytes_peak <= plan.memory <= memory
        for c in range(memory // sizes.state_bytes + 1):
            leaf = min((memory - c * sizes.state_bytes) // sizes.row_bytes, sizes.steps)
            if leaf < 1 or (c == 0 and leaf < sizes.steps):
                continue
            other = Revolve(max(c, 1), leaf=leaf).plan(sizes)
            # Rounding N/B up makes some shorter leaves equal or better by less than a block: not searched for.
            assert plan.forward_steps <= other.forward_steps + leaf, (sizes, memory, c, leaf)


def test_memory_with_disk_or_a_given_leaf():
    sizes = Sizes(1000, 50, 10)
    for schedule in (Revolve(memory=300, on_disk=7), Revolve(memory="1kB", leaf=20), Revolve(memory=10, on_disk=1)):
        plan, machine = schedule.plan(sizes), Machine(schedule.stream(sizes), sizes)
        assert (machine.forward_steps, machine.peak) == (plan.forward_steps, {RAM: plan.snapshots, DISK: plan.on_disk})
        assert machine.bytes_peak <= plan.memory <= parse_bytes(schedule.memory)
        assert schedule.leaf in (None, machine.longest_leaf)


def test_too_little_memory_names_the_least_that_works():
    sizes = Sizes(100, 1000, 8)
    for memory, least in ((807, 800), (799, 800)):
        if memory < least:
            with pytest.raises(ValueError, match="at least 800 bytes"):
                Revolve(memory=memory).plan(sizes)
        else:
            assert Revolve(memory=memory).plan(sizes).snapshots == 0
    sizes = Sizes(1000, 1000, 8)
    with pytest.raises(ValueError, match=r"memory must hold .* got '1000B'; give at least 1008 bytes"):
        Revolve(memory="1000B").plan(sizes)
    assert Revolve(memory=1008).plan(sizes)[:3] == (1, 0, 1)
    with pytest.raises(ValueError, match="at least 1080 bytes"):
        Revolve(memory=1079, leaf=10).plan(sizes)
    assert Revolve(memory=1080, leaf=10).plan(sizes)[:3] == (1, 0, 10)


def test_the_leaf_that_goes_with_the_snapshots():
    """The documented rule: a multiple of 64, no larger than max(c S, sqrt(N S)) rounded up, none of them cheaper."""
    for steps, state, row, c in ((10**4, 800, 100, 10), (10**5, 6400, 100, 4), (2000, 1, 100, 3), (70, 900, 100, 2)):
        sizes = Sizes(steps, state, row)
        most = max(c * state / row, math.sqrt(steps * state / row))
        plan = Revolve(c).plan(sizes)
        assert plan.leaf <= most + 64
        assert plan.leaf <= 64 or plan.leaf % 64 == 0
        for leaf in range(64, int(most), 64):
            assert plan.forward_steps <= Revolve(c, leaf=leaf).plan(sizes).forward_steps
    assert Revolve(10).plan(Sizes(100, 1000, 100)) == (0, 0, 100, 100, 10_000)  # one leaf is no larger than they are


def test_a_million_steps():
    """Seconds, not minutes: plans come from closed forms, streams from actions on leaves."""
    N = 10**6
    for schedule in (Revolve(10), Revolve(memory="1MB"), Revolve(20, 20, leaf=64), Online(20)):
        machine = run(schedule, N, state_bytes=5000, row_bytes=100)
        assert machine.forward_steps <= 7 * N
    assert Revolve(memory="5MB").plan(Sizes(N, 10, 100)).memory <= 5_000_000
    assert Revolve(memory="5kB").plan(Sizes(N, 1, 100)).memory <= 5000


def test_streams_are_independent():
    schedule = Revolve(3, leaf=2)
    first, second = (schedule.stream(Sizes(20, 1, 1)) for _ in range(2))
    begin = [repr(next(first)) for _ in range(5)]
    assert [repr(next(second)) for _ in range(5)] == begin
    assert schedule == Revolve(3, leaf=2) and hash(schedule) == hash(Revolve(3, leaf=2)) != hash(Revolve(4, leaf=2))


def test_finalize_checks_the_steps():
    stream = Revolve(3, leaf=2).stream(Sizes(20, 1, 1))
    with pytest.raises(ValueError, match="must take the steps that Revolve planned, 20: got 19; use Online"):
        stream.finalize(19)
    stream = Online(3, leaf=4).stream(Sizes(20, 1, 1))
    next(stream), next(stream)
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"of steps 0 to 4: got n={n}"):
            stream.finalize(n)
    stream.finalize(4)
    with pytest.raises(ValueError, match="once"):
        stream.finalize(4)


# Whether snapshots are left behind in the end: by design (made for many adjoint passes), or because (H-Revolve, disk
# revolve) those on disk are copied where they could be moved.
FOREIGN = {
    "multistage": (lambda N: cs.MultistageCheckpointSchedule(N, 3, 2), False),
    "revolve": (lambda N: cs.Revolve(N, 3), False),
    "hrevolve": (lambda N: cs.HRevolve(N, 2, 3), True),
    "disk revolve": (lambda N: cs.DiskRevolve(N, 3), True),
    "periodic disk revolve": (lambda N: cs.PeriodicDiskRevolve(N, 3), True),
    "mixed": (lambda N: cs.MixedCheckpointSchedule(N, 4, storage=RAM), False),
    "mixed on disk": (lambda N: cs.MixedCheckpointSchedule(N, 4), False),
    "two level": (lambda N: cs.TwoLevelCheckpointSchedule(7, 2), True),
    "memory": (lambda N: cs.SingleMemoryStorageSchedule(), False),
    "disk": (lambda N: cs.SingleDiskStorageSchedule(), True),
    "disk, once": (lambda N: cs.SingleDiskStorageSchedule(move_data=True), False),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_schedules_run(name):
    make, leaks = FOREIGN[name]
    for N in (2, 3, 10, 25, 50):
        given = make(N)
        schedule = adopt(given)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Numba not available", RuntimeWarning)
            counts = [run(schedule, N, leaks=leaks).forward_steps for _ in range(2)]  # the object given stays fresh
        assert counts[0] == counts[1] >= N
        assert not hasattr(given, "iter")


def test_what_is_adopted_and_what_is_refused():
    for schedule in (StoreAll(), Revolve(3), Online(3)):
        assert adopt(schedule) is schedule
    with pytest.raises(TypeError, match=r"schedule must be StoreAll\(\), Revolve\(\.\.\.\), .*: got 'revolve'"):
        adopt("revolve")
    with pytest.raises(ValueError, match="must keep what a gradient needs: got NoneCheckpointSchedule"):
        adopt(cs.NoneCheckpointSchedule())
    given = cs.MultistageCheckpointSchedule(10, 2, 0)
    adopted = adopt(given)
    with pytest.raises(
        ValueError, match=r"for the steps of the solve, 11: got a Multistage.* for 10; make it with max"
    ):
        adopted.stream(Sizes(11, 1, 1))
    assert adopt(given) == adopted != adopt(copy.deepcopy(given))
    next(given)
    for use in (lambda: adopt(given), lambda: adopted.stream(Sizes(10, 1, 1))):
        with pytest.raises(ValueError, match="must not have been started"):
            use()


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Revolve(), ValueError, "exactly one of snapshots and memory must be given: got snapshots=None"),
        (lambda: Revolve(3, memory="1GB"), ValueError, "exactly one of snapshots and memory"),
        (lambda: Revolve(0), ValueError, r"snapshots \+ on_disk must be at least 1: got 0"),
        (lambda: Revolve(-1, 3), ValueError, "snapshots must be at least 0: got -1"),
        (lambda: Revolve(2.5), TypeError, "snapshots must be an int of at least 0: got 2.5"),
        (lambda: Revolve(True), TypeError, "snapshots must be an int"),
        (lambda: Revolve(3, leaf=0), ValueError, "leaf must be at least 1: got 0"),
        (lambda: Revolve(3, directory="/tmp"), ValueError, "directory applies to snapshots on disk: got .*, on_disk=0"),
        (lambda: Revolve(memory="12 parsecs"), ValueError, "memory must be a number and a unit .*: got '12 parsecs'"),
        (lambda: Revolve(memory="1.5.2GB"), ValueError, "got '1.5.2GB'"),
        (lambda: Revolve(memory=0), ValueError, "memory must be positive: got 0"),
        (lambda: Revolve(memory=1.5), TypeError, "memory must be a number of bytes or a text with a unit: got 1.5"),
        (lambda: Online(0), ValueError, r"snapshots \+ on_disk must be at least 1: got 0"),
        (lambda: Online(3, leaf=-1), ValueError, "leaf must be at least 1: got -1"),
        (lambda: Online(3, directory="/tmp"), ValueError, "directory applies to snapshots on disk"),
        (lambda: forward_steps(0, 1), ValueError, "got n=0, snapshots=1"),
        (lambda: forward_steps(2, 0), ValueError, "got n=2, snapshots=0"),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bytes_are_read_as_written():
    assert [
        parse_bytes(text) for text in (17, "17", "17B", "2kB", "200MB", "1.5 GB", "512KiB", ".5TiB", " 3 mib ")
    ] == [
        *(17, 17, 17, 2000, 200 * 10**6, 15 * 10**8, 512 * 1024, 2**39, 3 * 2**20),
    ]
