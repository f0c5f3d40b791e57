"""Checkpointed solves: the gradient of store-all bit for bit, within the budget, nothing left on disk, no fault silent.

Bitwise equality is exact because a schedule changes which steps are taken again, never how one is taken. Since it also
holds when both sides are wrong, the reference is compared with autograd through the steps, to 1e-12 as in
test_gradients.py. Implicit methods, ten times as dear, meet a few of the schedules each, together all of them.
"""

import errno
import functools
import gc
import itertools
import os
import tempfile
from pathlib import Path

import checkpoint_schedules as cs
import pytest
import torch
from torch import nn

import pfde
from pfde.schedules import Sizes, forward_steps
from pfde.schedules import storage as storage_module
from pfde.schemes import METHODS

RTOL = 1e-12
N = 45
UNIFORM = torch.linspace(0.2, 1.4, N + 1, dtype=torch.float64)
EXPLICIT = [name for name, scheme in METHODS.items() if not scheme.implicit]
IMPLICIT = [name for name, scheme in METHODS.items() if scheme.implicit]
NONUNIFORM = [name for name, scheme in METHODS.items() if scheme.rules]
HISTORIES = {
    "exact": pfde.Exact(),
    "exponentials": pfde.SumOfExponentials(1e-6),
    "short": pfde.ShortMemory(0.4),
}
BOUNDED = ["exponentials", "short"]
OURS = {
    "revolve, every step": lambda: pfde.Revolve(3, leaf=1),
    "revolve": lambda: pfde.Revolve(2, leaf=7),
    "revolve, a block": lambda: pfde.Revolve(2, leaf=32),
    "revolve on disk": lambda: pfde.Revolve(2, on_disk=2, leaf=5),
    "revolve by memory": lambda: pfde.Revolve(memory="6kB"),
    "online": lambda: pfde.Online(3, leaf=4),
    "online on disk": lambda: pfde.Online(1, on_disk=2, leaf=4),
}
FOREIGN = {
    "multistage": lambda: cs.MultistageCheckpointSchedule(N, 3, 2),
    "h-revolve": lambda: cs.HRevolve(N, 2, 3),
    "disk revolve": lambda: cs.DiskRevolve(N, 3),
    "mixed": lambda: cs.MixedCheckpointSchedule(N, 4, storage=cs.StorageType.RAM),
    "mixed on disk": lambda: cs.MixedCheckpointSchedule(N, 4),
    "two level": lambda: cs.TwoLevelCheckpointSchedule(7, 2),
    "memory": lambda: cs.SingleMemoryStorageSchedule(),
    "disk": lambda: cs.SingleDiskStorageSchedule(),
    "disk, once": lambda: cs.SingleDiskStorageSchedule(move_data=True),
}
SCHEDULES = OURS | FOREIGN

pytestmark = pytest.mark.filterwarnings("ignore:Numba not available:RuntimeWarning")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where all disk tiers of a test go; nothing is in it when the test ends."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    if left_in(tmp_path):
        gc.collect()  # which is slow; an error that pytest has caught may hold a solve
    assert left_in(tmp_path) == [], "snapshots were left on disk"


def left_in(folder):
    """The folders of snapshots (others use the system's folder for temporary files, too)."""
    return sorted(path.name for path in folder.glob("pfde-*"))


class Field(nn.Module):
    """f = b sin(a y) + t, on three components; calls hook(calls) first."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5, -0.3, 0.8], dtype=dtype))
        self.b = nn.Parameter(torch.tensor(1.3, dtype=dtype))
        self.calls, self.hook = 0, lambda calls: None

    def forward(self, t, y):
        self.calls += 1
        self.hook(self.calls)
        return self.b * torch.sin(self.a * y) + t


class Solve:
    """One solve that awaits its backward pass."""

    def __init__(
        self, method, history=None, gradient=None, *, t=UNIFORM, alpha=0.6, dtype=torch.float64, f=None, **keywords
    ):
        self.f = f or Field(dtype)
        self.y0 = torch.tensor([1.0, 2.0, -0.5], dtype=dtype, requires_grad=True)
        self.alpha = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
        if isinstance(history, str):
            history = HISTORIES[history]
        solution = pfde.solve(
            self.f, self.y0, t, self.alpha, method=method, history=history, gradient=gradient, **keywords
        )
        self.y, self.stats = solution.y, solution.stats

    def backward(self, retain_graph=False):
        """y and the gradient of <v, y>; not all outputs count alike, and some not at all."""
        v = torch.cos(torch.arange(self.y.numel(), dtype=self.y.dtype)).reshape(self.y.shape)
        v[1::3] = 0
        inputs = (self.y0, self.f.a, self.f.b, self.alpha)
        bars = torch.autograd.grad((v * self.y).sum(), inputs, retain_graph=retain_graph)
        return dict(zip(("y", "y0", "a", "b", "alpha"), [self.y.detach(), *bars], strict=True))


def gradients(*arguments, **keywords):
    return Solve(*arguments, **keywords).backward()


@functools.cache
def store_all(method, history):
    """The reference, itself compared with autograd through the steps."""
    found = gradients(method, history, pfde.Discrete())
    assert_close(found, gradients(method, history, pfde.Backprop()))
    return found


def assert_close(found, expected, rtol=RTOL):
    for name, x in expected.items():
        error = float((found[name] - x).norm() / (x.norm() or 1.0))
        assert error <= rtol, f"{name}: relative error {error:.2e}, allowed {rtol:.0e}"


def assert_same(found, expected, what=""):
    for name, x in expected.items():
        y = found[name]
        assert torch.equal(y, x), f"{what}: {name} differs by {float((y - x).abs().max()):.1e}, should be bitwise equal"


def discrete(schedule, **keywords):
    return pfde.Discrete(schedule=schedule, **keywords)


# -- every schedule x history x method --------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("method", EXPLICIT)
def test_explicit_methods_under_every_schedule(method, history):
    for name, make in SCHEDULES.items():
        found = gradients(method, history, discrete(make()))
        assert_same(found, store_all(method, history), name)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("method", IMPLICIT)
def test_implicit_methods_under_some_schedules_each(method, history):
    assert 2 * len(IMPLICIT) * len(HISTORIES) >= len(SCHEDULES)  # the turns reach every one
    turn = IMPLICIT.index(method) * len(HISTORIES) + list(HISTORIES).index(history)
    for k in range(2):
        name = list(SCHEDULES)[(2 * turn + k) % len(SCHEDULES)]
        found = gradients(method, history, discrete(SCHEDULES[name]()))
        assert_same(found, store_all(method, history), name)


@pytest.mark.parametrize("history", ["exact", "exponentials"])
@pytest.mark.parametrize("method", NONUNIFORM)
def test_on_a_nonuniform_grid(method, history):
    grid = {"t": pfde.graded(0.2, 1.4, N, 2.0)}
    expected = gradients(method, history, pfde.Discrete(), **grid)
    assert_close(expected, gradients(method, history, pfde.Backprop(), **grid))
    names = ["revolve on disk", "online", "mixed"]
    for name in [*names, "revolve, every step", "disk, once", "h-revolve"] if method in EXPLICIT else names:
        assert_same(gradients(method, history, discrete(SCHEDULES[name]()), **grid), expected, name)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("method", ["euler", "pece", "trapezoid", "l1"])
@pytest.mark.parametrize(
    "setting",
    [
        {"alpha": [0.35, 0.7, 0.95]},
        {"dtype": torch.float32},
        {"dtype": torch.float32, "alpha": [0.35, 0.7, 0.95]},
        {"t": UNIFORM[::9], "step_size": 1.2 / N},
        {"t": UNIFORM[:2]},
    ],
    ids=["orders", "float32", "float32, orders", "coarse outputs", "one step"],
)
def test_orders_dtypes_and_outputs(method, history, setting):
    expected = gradients(method, history, pfde.Discrete(), **setting)
    if "dtype" not in setting:
        assert_close(expected, gradients(method, history, pfde.Backprop(), **setting))
    memory = "6kB" if "t" in setting else "8kB"
    schedules = pfde.Revolve(2, on_disk=1, leaf=7), pfde.Revolve(memory=memory), pfde.Online(2, leaf=6)
    for schedule in schedules if method in EXPLICIT else schedules[:1]:
        assert_same(gradients(method, history, discrete(schedule), **setting), expected, str(schedule))


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_store(method, history):
    """Bitwise but for two cases of the exact history, where no step is taken again and so nothing is kept again.

    In the derivative form f is evaluated at y_0 + X_n instead, y_n to rounding; the predictors of `pece` are built by
    another order of summation. Both are as different between the stores under StoreAll.
    """
    names = ["revolve", "online", "mixed on disk"] if method in EXPLICIT else ["mixed on disk"]
    rounded = {"stages": method == "pece", "graph": method == "pece" or METHODS[method].form == "derivative"}
    for store, name in itertools.product(["stages", "graph"], names):
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


@pytest.mark.smoke
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
    assert Watched.sizes == Sizes(N, state, 48 if method == "pece" else 24, 32, 31 * 24)


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
@pytest.mark.parametrize("history", BOUNDED)
@pytest.mark.parametrize("snapshots", [1, 2, 3, 7, 44, 60])
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


def resident():
    """This process's memory, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_memory_does_not_grow_with_the_steps():
    """1000 steps of 4096 doubles: 33 MB of states with store-all; with two snapshots and a leaf of 64 about 5 MB."""
    w = torch.full((4096,), 0.5, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    peak = calls = 0

    def func(t, y):
        nonlocal peak, calls
        calls += 1
        if calls % 20 == 0:
            peak = max(peak, resident())
        return -w * y

    def growth(schedule, step):
        nonlocal peak
        gc.collect()
        peak = before = resident()
        y0 = torch.ones(4096, dtype=torch.float64)
        gradient, history = discrete(schedule), pfde.SumOfExponentials(1e-3)
        y = pfde.fdeint(
            func, y0, t, 0.6, method="euler", step_size=step, gradient=gradient, history=history, params=[w]
        )
        y.sum().backward()
        return peak - before

    growth(pfde.Revolve(2, leaf=64), 1 / 100)  # what is loaded and allocated once
    bounded, whole = growth(pfde.Revolve(2, leaf=64), 1 / 1000), growth(pfde.StoreAll(), 1 / 1000)
    assert whole > 25e6
    assert bounded < whole / 5, f"revolve {bounded / 1e6:.1f} MB, store-all {whole / 1e6:.1f} MB"


# -- nothing is left behind --------------------------------------------------------------------------------------------

ON_DISK = {name: SCHEDULES[name] for name in ("revolve on disk", "online on disk", "multistage", "mixed on disk")}
on_disk = pytest.mark.parametrize("make", ON_DISK.values(), ids=ON_DISK)


def files(folder):
    return sorted(folder.glob("pfde-*/*"))


@on_disk
def test_nothing_is_left_by_a_backward_pass_or_without_one(folder, make):
    solve = Solve("euler", "exponentials", discrete(make()))
    assert files(folder)
    solve.backward(retain_graph=True)
    assert left_in(folder) == []  # at once, though the graph is alive
    solve.backward()
    assert left_in(folder) == []
    other = Solve("euler", "exponentials", discrete(make()))
    assert files(folder)
    gc.disable()
    try:
        del other, solve
        assert left_in(folder) == []  # with the graph, without waiting for the garbage collector
    finally:
        gc.enable()


@on_disk
@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt("ctrl-c")])
def test_nothing_is_left_by_an_error(folder, make, error):
    """In the middle of the forward pass; in the backward pass at its first, an early, and its last evaluation."""
    probe = Solve("euler", "exponentials", discrete(make()))
    forward = probe.f.calls
    probe.backward()
    last = probe.f.calls

    def solve(when):
        f = Field()

        def hook(calls):
            if calls == when:
                raise error

        f.hook = hook
        Solve("euler", "exponentials", discrete(make()), f=f).backward()

    for when in (forward - 1, forward + 1, forward + 9, last):
        with pytest.raises(type(error)) as caught:
            solve(when)
        assert caught.value is error
        assert left_in(folder) == [], f"evaluation {when} of {last}"  # at once, though `caught` holds the solve
        error.__traceback__ = None
    assert_same(gradients("euler", "exponentials", discrete(make())), store_all("euler", "exponentials"))


def test_a_backward_pass_after_an_interrupted_one():
    """What an interrupted backward pass has spent is computed anew by the next one."""
    solve = Solve("euler", "exponentials", discrete(pfde.Revolve(1, on_disk=1, leaf=6)))
    boom, at = ValueError("boom"), solve.f.calls + 20

    def hook(calls):
        if calls == at:
            raise boom

    solve.f.hook = hook
    with pytest.raises(ValueError, match="boom"):
        solve.backward(retain_graph=True)
    assert_same(solve.backward(), store_all("euler", "exponentials"))


# -- faults of the disk ------------------------------------------------------------------------------------------------

REVOLVE = {"on_disk": 3, "leaf": 4}


def revolve(directory):
    return discrete(pfde.Revolve(1, directory=directory, **REVOLVE))


def still_works(directory):
    assert_same(gradients("euler", "exponentials", revolve(directory)), store_all("euler", "exponentials"))


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["missing", "a file", "read-only"])
def test_a_directory_that_cannot_be_used(tmp_path, folder, kind):
    directory = tmp_path / "nowhere"
    if kind == "a file":
        directory.write_text("here")
    elif kind == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        directory.mkdir(mode=0o500)
    with pytest.raises(
        pfde.SnapshotError,
        match=rf"snapshot of step 0 could not be written to {directory}/pfde-.*; free space there, name another "
        r"directory=",
    ):
        gradients("euler", "exponentials", revolve(directory))
    if directory.is_dir():
        directory.rmdir()
    directory.unlink(missing_ok=True)
    still_works(folder)


@pytest.mark.parametrize("call", ["fsync", "write"])
@pytest.mark.parametrize("when", [1, 4])
def test_a_full_disk(folder, monkeypatch, call, when):
    """At the first and at a later call: of the forward pass, or of the backward pass, which writes too."""
    original, calls = getattr(os, call), itertools.count(1)

    def failing(*arguments):
        if next(calls) >= when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(storage_module.os, call, failing)
        with pytest.raises(
            pfde.SnapshotError,
            match=r"snapshot of step \d+ could not be written to .*step-\d+.snapshot: No space left.*; free space",
        ):
            gradients("euler", "exponentials", revolve(folder))
    gc.collect()
    assert left_in(folder) == []
    still_works(folder)


def test_a_disk_that_fills_in_the_backward_pass(folder, monkeypatch):
    solve = Solve("euler", "exponentials", revolve(folder))

    def failing(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage_module.os, "write", failing)
        with pytest.raises(pfde.SnapshotError, match=r"snapshot of step \d+ could not be written to .*: No space left"):
            solve.backward(retain_graph=True)
    assert left_in(folder) == []
    assert_same(solve.backward(), store_all("euler", "exponentials"))
    still_works(folder)


@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("damage", ["truncate", "flip a bit", "delete", "exchange"])
def test_a_file_that_is_not_what_was_written(folder, damage, which):
    solve = Solve("euler", "exponentials", revolve(folder))
    path = sorted(files(folder), key=lambda path: int(path.stem.split("-")[1]))[which]
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip a bit":
        content[3 * len(content) // 4] ^= 4
        path.write_bytes(content)
    elif damage == "delete":
        path.unlink()
    else:
        other = next(other for other in files(folder) if other != path)
        path.write_bytes(other.read_bytes())
    step = path.stem.split("-")[1]
    with pytest.raises(
        pfde.SnapshotError, match=rf"snapshot of step {step} cannot be used: {path} .*; was it touched"
    ) as caught:
        solve.backward(retain_graph=True)
    assert left_in(folder) == []
    assert solve.y0.grad is None
    assert_same(solve.backward(), store_all("euler", "exponentials"))  # which computes it anew
    del caught, solve
    still_works(folder)


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
