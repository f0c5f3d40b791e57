"""Memory: no solve, good or failing, leaves anything behind, and each goes with its result."""

import contextlib
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pfde
from support.covering import pairs
from support.faults import FORMS, FRACTIONAL, GRADIENTS, NAN, Field, T, solve, start, takes, without_collector


def resident() -> float:
    """This process's memory, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.parametrize("fault", ["none", "forward", "backward"])
@pytest.mark.parametrize("method", ["euler", "pece", "trapezoid", "l1"])
def test_nothing_leaks(method: str, fault: str) -> None:
    """25 solves that hold 0.4 MB or more each; without the garbage collector, which does not see C's references."""
    w = torch.full((50,), 0.5, dtype=torch.float64, requires_grad=True)
    calls = [0, 0]

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == calls[1]:
            raise ValueError("boom")
        return torch.tanh(y * w)

    def solve() -> None:
        y0 = torch.ones(100, 50, dtype=torch.float64, requires_grad=True)
        calls[:] = 0, {"none": 0, "forward": 5, "backward": 0}[fault]
        y = pfde.fdeint(func, y0, T, 0.6, method=method, params=[w])
        if fault == "backward":
            calls[1] = calls[0] + 2
        y.sum().backward()

    def repeat(count: int) -> None:
        for _ in range(count):
            with contextlib.suppress(ValueError):
                solve()

    gc.collect()
    gc.disable()
    try:
        repeat(10)
        before = resident()
        repeat(25)
        growth = resident() - before
    finally:
        gc.enable()
    assert growth < 5, f"25 solves left {growth:.1f} MB behind"


@pytest.mark.parametrize(("form", "gradient", "keep_graph"), pairs(FORMS, GRADIENTS, [True, False], valid=takes))
def test_a_solve_is_freed_with_its_result(form: str, gradient: str, keep_graph: bool) -> None:
    """Without the garbage collector: f (what it holds may be large) goes with the last reference to y."""
    with without_collector():
        f = Field()
        alive = weakref.ref(f)
        y = solve(f, start(), form, gradient=GRADIENTS[gradient])
        if not keep_graph:
            y.sum().backward()
        del f
        if form in FRACTIONAL and gradient != "backprop":
            assert (alive() is not None) is keep_graph  # a backward pass that keeps no graph lets go of f at once
        del y
        assert alive() is None


@pytest.mark.parametrize("fault", ["forward", "backward", "limit", "returned limit", "nan"])
@pytest.mark.parametrize("form", ["dopri5", "sdirk4", "ark2", "rk4", "cn"])
def test_a_solve_is_freed_after_an_error(form: str, fault: str) -> None:
    if form in ("rk4", "cn") and "limit" in fault:
        pytest.skip("fixed steps have no limits")

    class Failing(Field):
        stop = 0

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            if self.stop == self.calls:
                raise ZeroDivisionError
            value = super().forward(t, y)
            return value * NAN if fault == "nan" and t > 0.3 else value

    def attempt(f: Failing) -> None:
        keywords = {}
        if "limit" in fault:
            keywords = {"options": {"max_num_steps": 1} | ({"on_limit": "return"} if "returned" in fault else {})}
        f.stop = 6 if fault == "forward" else -1
        y = solve(f, start(), form, **keywords)
        f.stop = f.calls + 2 if fault == "backward" else -1
        y.sum().backward()

    with without_collector():
        f = Failing()
        alive = weakref.ref(f)
        failed = False
        try:
            attempt(f)
        except (ZeroDivisionError, pfde.PfdeError):
            failed = True
        assert failed
        del f
        assert alive() is None
