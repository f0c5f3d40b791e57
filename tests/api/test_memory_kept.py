"""A model that keeps its own solution goes with its last reference: what a solve leaves is in no immortal cycle."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import pfde

T = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)


class Model(nn.Module):
    """y' = tanh(W y), on a tensor or on a tuple, that keeps what it solved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, t, y):
        if isinstance(y, tuple):
            return tuple(map(self.linear, y))
        return (
            torch.view_as_complex(self.linear(torch.view_as_real(y))) if y.is_complex() else torch.tanh(self.linear(y))
        )


@pytest.fixture(autouse=True, scope="module")
def _few_objects():
    """The collector looks at what these tests have made alone: else it takes longer than all solves."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def ode(**keywords):
    def run(model):
        model.y = pfde.odeint(model, torch.ones(3, dtype=torch.float64), T, **keywords)

    return run


def fde(**keywords):
    def run(model):
        model.y = pfde.fdeint(model, torch.ones(3, dtype=torch.float64), T, 0.7, **keywords)

    return run


def in_parts(model):
    y0 = torch.ones(3, dtype=torch.float64)
    model.parts = pfde.odeint(model, (y0, 2 * y0), T)
    model.y = model.parts[0] + model.parts[1]


def event(model):
    y0 = torch.ones(3, dtype=torch.float64)
    model.time, model.y = pfde.odeint_event(model, y0, 0.0, event_fn=lambda t, y: t - 0.5 + 0 * y.sum())


def late(model):
    """Adaptive steps that end early, whose backward pass is refused."""
    options = {"max_num_steps": 8, "on_limit": "return"}
    model.solution = pfde.solve(
        model,
        torch.ones(3, dtype=torch.float64),
        T * torch.tensor([1, 1, 1, 1, 100]),
        method="dopri5",
        gradient=pfde.Backprop(),
        options=options,
    )
    model.y = model.solution.y


def whole_solution(model):
    model.solution = pfde.solve(model, torch.ones(3, dtype=torch.float64), T, 0.7, method="l1")
    model.y = model.solution.y


COMPRESSED = pfde.SumOfExponentials(1e-6)
CASES = {
    "dopri5": ode(),
    "dopri5, graph": ode(gradient=pfde.Discrete(store="graph")),
    "dopri5, stages": ode(gradient=pfde.Discrete(store="stages")),
    "dopri5, online": ode(gradient=pfde.Discrete(schedule=pfde.Online(2, leaf=2))),
    "dopri5, continuous": ode(gradient=pfde.Continuous()),
    "dopri5, symplectic": ode(gradient=pfde.Symplectic()),
    "dopri5, backprop": ode(gradient=pfde.Backprop()),
    "rk4, revolve on disk": ode(method="rk4", gradient=pfde.Discrete(schedule=pfde.Revolve(1, on_disk=1, leaf=1))),
    "cn": ode(method="cn"),
    "cn, matrix-free": ode(method="cn", options={"fde_jacobian": "matrix_free"}),
    "cn, graph": ode(method="cn", gradient=pfde.Discrete(store="graph")),
    "cn, backprop": ode(method="cn", gradient=pfde.Backprop()),
    "esdirk4": ode(method="esdirk4"),
    "petsc:cn": ode(method="petsc:cn", step_size=0.25),
    "petsc:rk:4": ode(method="petsc:rk:4", step_size=0.25),
    "trapezoid": fde(method="trapezoid"),
    "trapezoid, compressed": fde(method="trapezoid", history=COMPRESSED),
    "trapezoid, graph": fde(method="trapezoid", gradient=pfde.Discrete(store="graph")),
    "trapezoid, backprop": fde(method="trapezoid", gradient=pfde.Backprop()),
    "pece, revolve": fde(method="pece", history=COMPRESSED, gradient=pfde.Discrete(schedule=pfde.Revolve(1, leaf=1))),
    "gl": fde(method="gl"),
    "a Solution": whole_solution,
    "a tuple": in_parts,
    "an event": event,
}
# Several outputs share their node, and what is computed from y holds it in C++: there the collector does not see.
ONLY_AFTER = {"a tuple", "an event", "cn, backprop", "trapezoid, backprop"}


def survives(run, use) -> bool:
    model = Model()
    run(model)
    use(model)
    watch = weakref.ref(model)
    del model
    gc.collect()
    return watch() is not None


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_keeps_its_solution(case, folder):
    """Before any backward pass, after one, after one that kept the graph and another."""
    run = CASES[case]
    if case not in ONLY_AFTER:
        assert not survives(run, lambda model: None)
        assert not survives(run, lambda model: model.y.sum().backward(retain_graph=True))
    assert not survives(run, lambda model: model.y.sum().backward())
    assert not survives(run, lambda model: torch.autograd.grad(model.y[-1].sum(), model.linear.weight))

    def twice(model):
        model.y.sum().backward(retain_graph=True)
        first, model.linear.weight.grad = model.linear.weight.grad, None
        model.y.sum().backward()
        assert torch.equal(model.linear.weight.grad, first)

    assert not survives(run, twice)


def test_a_loss_that_is_kept():
    """What is computed from y holds its node in C++: the model goes once the backward pass has freed the graph."""

    def run(model):
        model.loss = pfde.odeint(model, torch.ones(3, dtype=torch.float64), T).square().sum()

    assert not survives(run, lambda model: model.loss.backward())


def test_steps_that_ended_early():
    def refused(model):
        with pytest.raises(pfde.PfdeError, match="ended early"):
            model.y.sum().backward()

    assert not survives(late, lambda model: None)
    assert not survives(late, refused)


def test_a_spent_graph_is_torchs_own_error():
    for case in ("dopri5", "cn, backprop", "trapezoid", "petsc:cn"):
        model = Model()
        CASES[case](model)
        model.y.sum().backward()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                model.y.sum().backward()


def test_a_backward_pass_within_a_backward_pass():
    """Each lets go of its own graph: the inner one does not free what the outer one is still to use."""

    class Within(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, model):
            ctx.model = model
            return x.clone()

        @staticmethod
        def backward(ctx, bar):
            with torch.enable_grad():
                ctx.model.y.sum().backward()
            return bar, None

    inner, outer = Model(), Model()
    ode()(inner)
    ode()(outer)
    Within.apply(outer.y, inner).sum().backward()
    assert outer.linear.weight.grad is not None and inner.linear.weight.grad is not None
    for model in (inner, outer):
        watch = weakref.ref(model)
        del model
    del inner, outer
    gc.collect()
    assert watch() is None


def test_a_function_passed_inline_lives_as_long_as_its_graph():
    weight = torch.eye(3, dtype=torch.float64, requires_grad=True)

    def solve() -> tuple[Tensor, weakref.ref]:
        func = lambda t, y: y @ weight  # noqa: E731
        return pfde.odeint(func, torch.ones(3, dtype=torch.float64), T, params=[weight]), weakref.ref(func)

    y, watch = solve()
    assert watch() is not None
    y.sum().backward()
    assert weight.grad is not None
    assert watch() is None, "what a spent graph holds"


def test_y_is_changed_in_place_as_before():
    """y leaves the solve in its final shape and as no view: it may be changed in place, and what it shares is noted."""
    model = Model()
    ode()(model)
    assert model.y.shape == (5, 3) and model.y._base is None and model.y.grad_fn is not None
    expected = model.y.detach() * 2
    model.y.mul_(2)
    assert torch.equal(model.y, expected)
    model.y.sum().backward()
    doubled, model.linear.weight.grad = model.linear.weight.grad, None
    ode()(model)
    (2 * model.y).sum().backward()
    assert torch.equal(doubled, model.linear.weight.grad)
