"""A tableau, a scheme, a history and a schedule from outside pfde: `examples/own_method.py` defines them."""

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import pytest
import torch

import pfde
from pfde.api import types
from pfde.caputo.schemes import METHODS
from pfde.one_step.methods import METHODS as ODE_METHODS
from pfde.petsc.setting import parse_method

D = torch.float64
PATH = Path(__file__).parents[2] / "examples" / "own_method.py"
HISTORIES = [pfde.Exact(), pfde.SumOfExponentials(1e-8), pfde.ShortMemory(0.4), None]
SCHEDULES = [pfde.StoreAll(), pfde.Revolve(2), pfde.Revolve(1, on_disk=1), pfde.Online(2)]


@pytest.fixture(scope="module")
def own():
    spec = importlib.util.spec_from_file_location("own_method", PATH)
    module = sys.modules["own_method"] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["own_method"]


@pytest.fixture
def problem(own):
    torch.manual_seed(0)
    return own.Field().to(D), torch.randn(2, 3, dtype=D), torch.linspace(0.0, 1.0, 13, dtype=D)


def gradient(func, y0, t, *alpha, **keywords):
    """dL/dy0 and dL/dtheta, L = |y|^2."""
    y0 = y0.clone().requires_grad_()
    function = pfde.fdeint if alpha else pfde.odeint
    loss = function(func, y0, t, *alpha, **keywords).square().sum()
    return torch.autograd.grad(loss, [y0, *func.parameters()])


def same(one, other):
    return all(map(torch.equal, one, other))


def test_the_battery_passes_with_them(own, problem):
    cases = (
        (1, {"method": own.HEUN3}),
        (0.6, {"method": own.BDF3()}),
        (0.6, {"method": "l1", "history": own.Prony(8)}),
    )
    for alpha, keywords in cases:
        report = pfde.testing.verify(*problem, alpha, **keywords)
        assert report.passed, report


@pytest.mark.parametrize("history", HISTORIES, ids=repr)
def test_a_scheme_with_every_history(own, problem, history):
    errors = pfde.testing.gradient_error(*problem, 0.6, method=own.BDF3(), history=history)
    assert errors.worst < 1e-12


@pytest.mark.parametrize("store", ["state", "stages", "graph"])
def test_a_tableau_with_every_store_and_schedule(own, problem, store, folder):
    plain = gradient(*problem, method=own.HEUN3, gradient=pfde.Discrete(store=store))
    for schedule in (*SCHEDULES, own.Halves()):
        how = pfde.Discrete(schedule=schedule, store=store)
        assert same(gradient(*problem, method=own.HEUN3, gradient=how), plain), schedule


def test_a_schedule_is_bitwise_store_all(own, problem):
    func, y0, t = problem
    for history in (pfde.Exact(), own.Prony(8)):
        plain = gradient(func, y0, t, 0.6, method="l1", history=history)
        how = pfde.Discrete(schedule=own.Halves())
        with nullcontext() if history == pfde.Exact() else pytest.warns(UserWarning, match="keeps"):
            assert same(gradient(func, y0, t, 0.6, method="l1", history=history, gradient=how), plain)


def test_a_history_says_how_far_off_it_is_and_where_it_cannot_be_had(own, problem):
    func, y0, t = problem
    stats = pfde.solve(func, y0, t, 0.6, method="l1", history=own.Prony(8)).stats
    assert stats.history == "Prony(count=8)" and 0 < stats.history_error < 1e-2
    with pytest.raises(ValueError, match=r"history=Prony\(count=8\) needs a uniform grid"):
        pfde.fdeint(func, y0, pfde.graded(0.0, 1.0, 8, 2.0), 0.6, method="euler", history=own.Prony(8))


def test_objects_are_methods_of_solve_and_of_the_blocks(own, problem):
    func, y0, t = problem
    assert pfde.solve(func, y0, t, method=own.HEUN3).stats.method == "heun3"
    assert pfde.solve(func, y0, t, 0.5, method=own.BDF3()).stats.method == "my_bdf3"
    assert torch.equal(
        pfde.nn.ODEBlock(func, method=own.HEUN3, step_size=0.1)(y0),
        pfde.odeint(func, y0, t[[0, -1]], method=own.HEUN3, step_size=0.1)[-1],
    )
    assert "my_bdf3" in repr(pfde.nn.FDEBlock(func, alpha=0.5, method=own.BDF3()))
    petsc = pfde.extend.petsc_method("petsc:theta:0.7")
    assert pfde.solve(func, y0, t, method=petsc).stats.method == "petsc:theta:0.7"
    assert pfde.solve(func, y0, t, method=METHODS["euler"]).stats.history != ""  # a scheme, and no Runge-Kutta method


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda own, f, y0, t: pfde.fdeint(f, y0, t, 0.5, method=own.HEUN3), "; it is a method of pfde.odeint"),
        (lambda own, f, y0, t: pfde.odeint(f, y0, t, method=own.BDF3()), "is a method of pfde.fdeint"),
        (lambda own, f, y0, t: pfde.solve(f, y0, t, 0.5, method=own.HEUN3), "alpha must be the number 1 for method"),
        (lambda own, f, y0, t: pfde.odeint(f, y0, t, method=own.BDF3), "method must be one of euler"),
        (lambda own, f, y0, t: pfde.fdeint(f, y0, t, 0.5, history=object()), None),
    ],
)
def test_objects_of_the_wrong_kind(own, problem, call, message):
    with pytest.raises(TypeError if message is None else ValueError, match=message):
        call(own, *problem)


@pytest.mark.smoke
def test_the_literal_types_are_the_registries():
    assert set(get_args(types.CaputoName)) == set(METHODS)
    assert set(get_args(types.OneStepName)) == set(ODE_METHODS)
    for name in get_args(types.PetscName):
        assert parse_method(name).name == name
