"""Solves in threads are those of a serial run: each has its own options and its own random numbers."""

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from petsc4py import PETSc
from torch import Tensor, nn

import pfde

D = torch.float64
T = torch.linspace(0, 1, 5, dtype=D)
A = torch.tensor([[-2.0, 1.0], [0.5, -3.0]], dtype=D)
THREADS = 4


def in_threads(work, items):
    """[work(x) for x in items], in four threads, in a random order, switching often."""
    order = list(range(len(items)))
    random.Random(1).shuffle(order)
    with ThreadPoolExecutor(THREADS) as pool:
        futures = {i: pool.submit(work, items[i]) for i in order}
        return [futures[i].result(timeout=100) for i in range(len(items))]


@pytest.fixture(autouse=True)
def _switch_often():
    """Fifty times as often as by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


class Field(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.w = nn.Parameter(A + 0.01 * seed)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.w) - y**3


def solve(case):
    """y, y0_bar, w_bar and what the solve took, for one kind of solve with tolerances of its own."""
    kind, seed = case
    f, y0 = Field(seed), torch.tensor([1.0 + 0.1 * seed, 0.5], dtype=D, requires_grad=True)
    tolerance = {"snes_rtol": 10.0 ** -(3 + 2 * (seed % 5)), "snes_stol": 1e-16}
    keywords = {
        "fdeint": {"method": "trapezoid", "alpha": 0.7, "options": tolerance},
        "fdeint plain": {"method": "bdf2", "alpha": 0.7},
        "explicit": {"method": "pece", "alpha": 0.5, "gradient": pfde.Discrete(schedule=pfde.Revolve(3))},
        "short": {"method": "euler", "alpha": 0.5, "history": pfde.ShortMemory(0.5)},
        "cn": {"method": "cn", "options": tolerance, "gradient": pfde.Discrete(schedule=pfde.Revolve(2))},
        "adaptive": {"method": "dopri5", "rtol": 1e-4, "gradient": pfde.Discrete(schedule=pfde.Online(2))},
        "esdirk": {"method": "sdirk4", "rtol": 1e-3, "atol": 1e-3, "options": tolerance},
        "backprop": {"method": "beuler", "rtol": 1e-3, "gradient": pfde.Backprop(), "options": tolerance},
        "petsc": {"method": "petsc:cn", "options": tolerance},
        "petsc adaptive": {"method": "petsc:rk:5dp", "rtol": 1e-4},
    }[kind]
    solution = pfde.solve(f, y0, T, **keywords)
    loss = (solution.y**2).sum()
    bars = torch.autograd.grad(loss, (y0, f.w), retain_graph=seed % 2 == 0)
    if seed % 2 == 0:
        again = torch.autograd.grad(loss, (y0, f.w))
        assert all(map(torch.equal, bars, again))
    return [solution.y.detach(), *bars], solution.stats.newton_iterations


KINDS = [
    *("fdeint", "fdeint plain", "explicit", "short", "cn", "adaptive", "esdirk", "backprop", "petsc", "petsc adaptive"),
]


def test_solves_in_threads_are_bitwise_those_of_a_serial_run():
    """Options of their own, or none; values, gradients and Newton's iterations."""
    cases = [(kind, seed) for kind in KINDS for seed in range(3)]
    serial = [solve(case) for case in cases]
    for case, one, other in zip(cases, serial, in_threads(solve, cases), strict=True):
        assert all(map(torch.equal, one[0], other[0])), case
        assert one[1] == other[1], case


def test_an_option_is_honoured_by_its_own_solve_only():
    """A loose tolerance takes fewer iterations: those of a solve without options are not touched by it."""

    def iterations(rtol):
        options = {} if rtol is None else {"snes_rtol": rtol, "snes_stol": 1e-30, "snes_atol": 1e-30}
        y0 = torch.tensor([1.0, 0.5], dtype=D)
        return pfde.solve(Field(0), y0, T, 0.7, method="trapezoid", options=options).stats.newton_iterations

    items = [None, 1e-1, 1e-4, 1e-8] * 5
    expected = {x: iterations(x) for x in items[:4]}
    assert len(set(expected.values())) >= 3  # the option matters
    assert in_threads(iterations, items) == [expected[x] for x in items]


def test_an_unused_option_is_blamed_on_its_own_solve():
    def names(i):
        options = {f"ksp_nonsense_{i}": 1} if i % 2 else {"snes_rtol": 1e-9}
        try:
            pfde.fdeint(Field(0), torch.ones(2, dtype=D), T, 0.7, options=options)
        except ValueError as error:
            return str(error).split("'")[1]
        return None

    assert in_threads(names, list(range(24))) == [f"ksp_nonsense_{i}" if i % 2 else None for i in range(24)]


@pytest.mark.parametrize("prefix", ["", "mine_"])
def test_options_of_the_database_reach_a_solve_that_has_its_own(prefix):
    """And its own win; both are gone afterwards, and what PETSc has read counts as used."""
    database, y0 = PETSc.Options(), torch.tensor([1.0, 0.5], dtype=D)

    def iterations(**options):
        return pfde.solve(
            Field(0), y0, T, 0.7, method="trapezoid", options=options, options_prefix=prefix
        ).stats.newton_iterations

    steps = len(T) - 1
    default = iterations(snes_linesearch_type="basic")
    try:
        database[f"{prefix}snes_max_it"] = 1
        database[f"{prefix}snes_rtol"] = 0.999
        before = database.getAll()
        assert iterations(snes_stol=1e-12) == steps < default
        assert database.getAll() == before
        assert database.used(f"{prefix}snes_max_it")
        assert iterations(snes_rtol=1e-10, snes_max_it=50) > steps
        assert database.getAll() == before
    finally:
        del database[f"{prefix}snes_max_it"], database[f"{prefix}snes_rtol"]


def test_a_solve_inside_func_does_not_see_the_options_of_the_outer_one():
    inner = []

    def func(t, y):
        with torch.no_grad():
            solution = pfde.solve(Field(0), torch.tensor([1.0, 0.5], dtype=D), T, method="cn", step_size=0.25)
        inner.append(solution.stats.newton_iterations)
        return -y * (1 + solution.y[-1, 0])

    alone = pfde.solve(Field(0), torch.tensor([1.0, 0.5], dtype=D), T, method="cn", step_size=0.25)
    y0 = torch.ones(2, dtype=D, requires_grad=True)
    options = {"snes_max_it": 2, "snes_rtol": 0.1, "snes_max_funcs": 100}
    pfde.fdeint(func, y0, T[:3], 0.8, options=options)[-1].sum().backward()
    assert set(inner) == {alone.stats.newton_iterations}


def test_the_backward_pass_may_run_in_another_thread():
    """And solves may stand in torch's graph one behind the other, pending together."""

    def forward(seed):
        f, y0 = Field(seed), torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
        z = pfde.fdeint(f, y0, T, 0.7, options={"snes_rtol": 1e-9})[-1]
        return pfde.odeint(f, z, T, rtol=1e-4, atol=1e-4)[-1].sum(), (y0, f.w)

    expected = [torch.autograd.grad(*forward(i)) for i in range(8)]
    pending = in_threads(forward, list(range(8)))
    found = in_threads(lambda x: torch.autograd.grad(*x), pending)
    for one, other in zip(expected, found, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_pool_inside_func_does_not_wait_for_the_outer_solve():
    """Nothing is held while func runs, but when it is first looked at, and then for a second."""

    def part(y):
        with torch.no_grad():
            return pfde.odeint(lambda t, y: -y, y, T, method="cn", options={"snes_rtol": 1e-9})[-1]

    def func(t, y):
        with ThreadPoolExecutor(2) as pool:
            return -sum(f.result(timeout=50) for f in [pool.submit(part, y.detach()) for _ in range(2)]) * y

    y0 = torch.ones(2, dtype=D, requires_grad=True)
    pfde.fdeint(func, y0, T[:3], 0.8, options={"snes_rtol": 1e-9})[-1].sum().backward()


# -- random numbers ----------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A field with a random factor, which notes what it has drawn for which t; or one that is told what to draw.

    For methods with no stage of one step at a time of another's.
    """

    def __init__(self, told: dict[float, Tensor] | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(A.clone())
        self.told, self.drawn = told, {}

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if self.told is None:
            factor = torch.rand(2, dtype=D) + 0.5
            self.drawn.setdefault(float(t), []).append(factor)
        else:
            factor = self.told[float(t)]
        return torch.tanh(y @ self.w) * factor


NOISY = {
    "euler": {"alpha": 0.6, "method": "euler"},
    "trapezoid": {"alpha": 0.6, "method": "trapezoid"},
    "revolve": {"alpha": 0.6, "method": "pece", "history": pfde.ShortMemory(0.5), "gradient": pfde.Revolve(2)},
    "ralston": {"method": "ralston", "gradient": pfde.Revolve(2)},
    "online": {"method": "midpoint", "gradient": pfde.Online(2)},
    "implicit": {"method": "implicit_midpoint", "gradient": pfde.Symplectic()},
    "backprop": {"method": "midpoint", "gradient": pfde.Backprop()},
}


def noisy(case):
    """The gradient of a solve with random numbers, what it drew, and the gradient with these numbers given."""
    name, _ = case
    keywords = dict(NOISY[name])
    if isinstance(keywords.get("gradient"), pfde.Revolve | pfde.Online):
        keywords["gradient"] = pfde.Discrete(schedule=keywords["gradient"])

    def run(f):
        y0 = torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
        y = pfde.solve(f, y0, torch.linspace(0, 1, 6, dtype=D), **keywords).y
        loss = y.square().sum()
        bars = torch.autograd.grad(loss, (y0, f.w), retain_graph=True)
        assert all(map(torch.equal, bars, torch.autograd.grad(loss, (y0, f.w))))
        return bars

    f = Noisy()
    bars = run(f)
    # what was drawn at t[0] when func was looked at, before the first step, belongs to no step
    numbers = {t: factors[-1] for t, factors in f.drawn.items()}
    return bars, numbers, run(Noisy(numbers))


@pytest.mark.parametrize("name", NOISY)
def test_each_solve_draws_its_own_numbers_whatever_other_threads_draw(name):
    """The gradient is that of the numbers drawn; no two solves, and no two steps, draw the same ones."""
    results = in_threads(noisy, [(name, i) for i in range(5)])
    for bars, _, expected in results:
        assert all(map(torch.equal, bars, expected))
    # The stages of one step have the same numbers. At t = 0 a method may have no stage, but func was looked at.
    steps = [{float(x[0]) for t, x in numbers.items() if t > 0} for _, numbers, _ in results]
    assert len(set().union(*steps)) == sum(map(len, steps)) >= 5 * 4


def test_solves_leave_torchs_generator_as_a_loop_would():
    """In one thread: the steps of the explicit Euler method draw what a loop by hand draws."""
    torch.manual_seed(3)
    f, y0, t = Noisy(), torch.tensor([1.0, 0.5], dtype=D, requires_grad=True), torch.linspace(0, 1, 5, dtype=D)
    y = pfde.odeint(f, y0, t, method="euler")
    after = torch.rand(1)
    y.sum().backward()
    later = torch.rand(1)
    torch.manual_seed(3)
    numbers = [torch.rand(2, dtype=D) + 0.5 for _ in range(4)]
    assert all(torch.equal(f.drawn[float(x)][-1], factor) for x, factor in zip(t, numbers, strict=False))
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(later, torch.rand(1))


def test_numbers_drawn_in_another_thread_are_not_taken_for_those_of_func():
    """Neither when func is first looked at, nor at the end of the forward pass."""
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(1)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for method in ("petsc:rk:4", "rk4", "trapezoid"):
            for _ in range(3):
                y0 = torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
                keywords = {"step_size": 0.25} if method != "trapezoid" else {}
                pfde.solve(Field(0), y0, T, method=method, **keywords).y.sum().backward()
        with pytest.raises(ValueError, match="func draws random numbers, which method 'petsc:rk:4'"):
            pfde.odeint(Noisy(), y0, T, method="petsc:rk:4", step_size=0.25)
    finally:
        stop.set()
        thread.join()
