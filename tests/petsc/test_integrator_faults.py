"""PETSc's own integrators: what is wrong is an error that says what to do, and nothing is left of a solve."""

import ctypes
import gc
import math

import pytest
import torch
from petsc4py import PETSc

import pfde
from pfde import ConvergenceError, NonFiniteError
from pfde.petsc.setting import _TYPES, parse_method
from pfde.system.layout import StateLayout
from support.integrator_steps import ARKIMEX, RK
from support.integrators import (
    DOUBLE,
    LAYOUT,
    STEP,
    Model,
    gradient,
    inputs,
    new_stats,
    solve,
)


def test_parameters_changed_in_place_and_double_backward_are_refused():
    y0, W, b = inputs()
    y = solve("petsc:rk:4", Model(W, b), y0, (W, b))
    with pytest.raises(RuntimeError, match="double backward"):
        gradient(y, (y0,), create_graph=True)
    y = solve("petsc:rk:4", Model(W, b), y0, (W, b))
    with torch.no_grad():
        W += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(y, (y0,))


@pytest.mark.parametrize("method", ["petsc:rk:4", "petsc:cn"])
def test_nothing_is_left_of_a_solve(method):
    """Vectors of 1.6 MB: one that a solve kept would show. Python's collector is off, so cycles would show too."""
    small = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    large = torch.ones(200_000, dtype=DOUBLE, requires_grad=True)
    layout = StateLayout((large.shape,), False)

    def resident():
        ctypes.CDLL(None).malloc_trim(0)  # else what is free but not given back hides what is kept
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def once(y0, layout, step):
        y = solve(method, lambda t, y: -y, y0, times=[0.0, 0.1], step_size=step, layout=layout)
        torch.autograd.grad(y.sum(), y0)

    once(large, layout, 0.1)
    once(small, LAYOUT, 0.05)
    gc.collect()
    objects, before = len(gc.get_objects()), resident()
    gc.disable()
    try:
        for _ in range(5):
            once(large, layout, 0.1)
        assert resident() - before < 3 * large.nbytes
        for _ in range(40):
            once(small, LAYOUT, 0.05)
        assert len(gc.get_objects()) - objects < 30
    finally:
        gc.enable()


# Errors


@pytest.mark.parametrize(
    "name, match",
    [
        ("petsc:bdf:2", "petsc:rk:TYPE.*got 'petsc:bdf:2'"),
        ("rk4", "got 'rk4'"),
        ("petsc:rk", "5dp.*got 'petsc:rk'"),
        ("petsc:rk:dopri5", "5dp.*got 'petsc:rk:dopri5'"),
        ("petsc:arkimex:9", "ars443.*got 'petsc:arkimex:9'"),
        ("petsc:theta:0", r"\(0, 1\].*got 'petsc:theta:0'"),
        ("petsc:theta:half", r"\(0, 1\].*got 'petsc:theta:half'"),
        ("petsc:cn:2", "has no types"),
    ],
)
def test_unknown_methods(name, match):
    with pytest.raises(ValueError, match=match):
        parse_method(name)


def test_types_are_those_of_petsc():
    """Of each type that we name PETSc has the tableau, and it has an embedded pair exactly when we say so."""
    assert set(_TYPES["rk"]) == set(RK)
    assert set(_TYPES["arkimex"]) == set(ARKIMEX)
    y0 = inputs()[0]
    for family, names in _TYPES.items():
        for name in names:
            method = parse_method(f"petsc:{family}:{name}")
            if not method.embedded:
                with pytest.raises(ValueError, match="no embedded pair"):
                    solve(method.name, lambda t, y: -y, y0, step_size=None)
                continue
            stats = new_stats()
            solve(method.name, lambda t, y: -y, y0.detach(), step_size=None, tolerance=1e-3, stats=stats)
            assert stats.steps < 100, name


class BoomError(Exception):
    """Raised by a func."""


@pytest.mark.parametrize("step_size", [STEP, None])
@pytest.mark.parametrize("method", ["petsc:rk:5dp", "petsc:cn", "petsc:arkimex:3"])
def test_errors_of_func_come_out_as_they_were_raised(method, step_size):
    y0 = inputs()[0]
    calls, last = 0, 4

    def func(t, y):
        nonlocal calls
        calls += 1
        if calls > last:
            raise BoomError("here")
        return -y

    with pytest.raises(BoomError, match="here"):
        solve(method, func, y0, step_size=step_size)
    calls, last = 0, math.inf
    y = solve(method, func, y0, step_size=step_size)
    last = calls + 3
    with pytest.raises(BoomError, match="here"):
        gradient(y, (y0,))
    with pytest.raises(NonFiniteError, match=r"NaN or inf at t=0\.[3-6]"):
        solve(method, lambda t, y: -y if t < 0.3 else y * math.nan, y0, step_size=step_size)


def test_failures_of_petsc_name_the_time():
    y0 = inputs()[0].detach().abs() + 1
    with pytest.raises(ConvergenceError, match=r"petsc:beuler did not converge at t=0\.1.*DIVERGED_NONLINEAR_SOLVE"):
        solve("petsc:beuler", lambda t, y: 100 * y**2 + 100, y0)
    with pytest.raises(ConvergenceError, match="step size fell"):
        solve("petsc:rk:5dp", lambda t, y: 10 * y**2, y0, step_size=None)
    options = PETSc.Options()
    options["few_ksp_max_it"] = 1
    y0, W, b = inputs()
    try:
        with pytest.raises(ConvergenceError, match=r"t=0\.1"):
            solve("petsc:cn", Model(W, b), y0, (W, b), options_prefix="few_")
    finally:
        options.delValue("few_ksp_max_it")


def test_func_is_checked():
    y0, W, b = inputs()
    with pytest.raises(ValueError, match="shape of y"):
        solve("petsc:rk:4", lambda t, y: y[:2], y0)
    with pytest.raises(RuntimeError, match="in place"):
        solve("petsc:rk:4", lambda t, y: y.mul_(2), y0.detach())
    for parameters in [(), (b,)]:
        y = solve("petsc:cn", Model(W, b), y0, parameters)
        with pytest.raises(ValueError, match="none of its parameters"):
            gradient(y, (y0,))


@pytest.mark.parametrize(
    "name, value, step_size, refused",
    [
        ("mine_ts_type", "bdf", None, True),
        ("mine_ts_dt", "0.1", None, True),
        ("mine_ts_rk_type", "4", None, True),
        ("mine_ts_adapt_type", "dsp", STEP, True),
        ("mine_ts_adapt_type", "dsp", None, False),
        ("ts_trajectory_type", "basic", None, True),
        ("ts_trajectory_max_cps_ram", "3", None, True),
        ("ts_trajectory_type", "memory", None, False),
    ],
)
def test_options_that_do_not_apply(name, value, step_size, refused):
    y0, W, b = inputs()
    options = PETSc.Options()
    options[name] = value
    try:
        if refused:
            with pytest.raises(ValueError, match=f"-{name}.*does not apply here"):
                solve("petsc:rk:5dp", Model(W, b), y0, (W, b), step_size=step_size, options_prefix="mine_")
        else:
            solve("petsc:rk:5dp", Model(W, b), y0, (W, b), step_size=step_size, options_prefix="mine_")
        assert options.getString(name) == value
    finally:
        options.delValue(name)


def test_options_reach_the_solvers():
    y0, W, b = inputs()
    options, stats, default = PETSc.Options(), new_stats(), new_stats()
    solve("petsc:cn", Model(W, b), y0, (W, b), stats=default)
    options["loose_snes_rtol"] = 1e-3
    try:
        solve("petsc:cn", Model(W, b), y0, (W, b), stats=stats, options_prefix="loose_")
    finally:
        options.delValue("loose_snes_rtol")
    assert stats.newton_iterations < default.newton_iterations


def test_a_function_that_draws_random_numbers_is_refused():
    """PETSc's callbacks evaluate it afresh for the adjoint: the gradient would be that of other numbers."""
    drop, y0 = torch.nn.Dropout(0.5), torch.ones(3, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="func draws random numbers, which method 'petsc:rk:4'"):
        pfde.odeint(lambda t, y: -drop(y), y0, times, method="petsc:rk:4", step_size=0.5)
