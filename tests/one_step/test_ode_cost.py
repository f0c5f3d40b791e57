"""What a gradient of `odeint` costs: evaluations of f, by method and by what is kept."""

import pytest
import torch

import pfde
from pfde.one_step.methods import METHODS as ODE_METHODS
from pfde.one_step.tableaux import ADDITIVE
from support.one_step import ADAPTIVE, EXPLICIT, GRADIENTS, Counted, Net, cotangent, grid, model, state
from support.solution import solve_ode


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("name", ["state", "stages", "graph", "symplectic"])
def test_an_explicit_step_costs_its_stages(method, name):
    """s evaluations forward and s linearisations backward; s - 1 evaluations more where only states are kept and one
    graph is alive at a time; none backward where the graphs are kept. One more is the look at f before the solve.

    bosh3, dopri5, tsit5 know the first slope of a step from the last stage of the step before only where that is
    evaluated anyway, by adaptive steps.
    """
    scheme, steps = ODE_METHODS[method], 6
    s, func, v = scheme.evaluations, Net(), cotangent(3)
    counted, y0 = Counted(func), state().requires_grad_()
    t = torch.tensor([0.0, 0.4, 0.6], dtype=torch.float64)
    parameters = list(func.parameters())
    solution = solve_ode(counted, y0, t, method=method, step_size=0.1, gradient=GRADIENTS[name], params=parameters)
    forward = counted.calls
    torch.autograd.grad((v * solution.y).sum(), y0)
    backward = counted.calls - forward
    assert forward == 1 + s * steps
    assert backward == steps * {"state": s, "stages": s, "graph": 0, "symplectic": 2 * s - 1}[name]
    stats = solution.stats
    assert (stats.steps, stats.rejected, stats.nfe_forward) == (steps, 0, forward)
    assert stats.nfe_recompute + stats.nfe_backward == backward


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "cn", "esdirk4", "ark3"])
def test_the_stats_add_up(method):
    """With every gradient and schedule, the phases sum up to all calls; a second backward pass is counted too."""
    where, func = grid("adaptive" if method in ADAPTIVE else "long", method), model(method)
    gradients = [*GRADIENTS.values(), pfde.Discrete(schedule=pfde.Online(snapshots=2, leaf=2))]
    for gradient in gradients[:-2] + gradients[-1:]:
        calls = [Counted(func)] if method not in ADDITIVE else [Counted(func.stiff), Counted(func.nonstiff)]
        counted = calls[0] if method not in ADDITIVE else pfde.Split(*calls)
        y0, params = state().requires_grad_(), list(func.parameters())
        solution = solve_ode(
            counted, y0, where.times(), method=method, gradient=gradient, params=params, **where.keywords
        )
        loss, stats = solution.y.sum(), solution.stats

        def total(calls=calls, stats=stats):
            looked = len(calls) - 1  # the look at f is one evaluation of its sum, of both parts
            made = stats.nfe_forward + stats.nfe_recompute + stats.nfe_backward
            return sum(part.calls for part in calls) - looked, made

        assert stats.nfe_forward == total()[0]
        for _ in range(2):
            torch.autograd.grad(loss, y0, retain_graph=True)
            calls_made, counts = total()
            assert calls_made == counts, gradient
        assert stats.nfe_backward + stats.nfe_recompute > 0 and stats.steps > 0


def test_the_cost_of_the_backward_pass_does_not_depend_on_the_number_of_outputs(recorded):
    """1025 outputs against 129 on the same steps: the same evaluations; torchdiffeq's cost is O(len(t)^2).

    Against 2 outputs there is one linearisation more in each step with outputs inside: of the slope at its end.
    """
    func = Net()
    found = {}
    for outputs in (2, 129, 1025):
        recorded.clear()
        counted, y0 = Counted(func), state().requires_grad_()
        t = torch.linspace(0.0, 1.0, outputs, dtype=torch.float64)
        y = pfde.odeint(counted, y0, t, method="dopri5", params=list(func.parameters()), rtol=1e-6, atol=1e-8)
        forward, counted.calls = counted.calls, 0
        torch.autograd.grad(y.sum(), y0)
        found[outputs] = (forward, counted.calls, len(recorded))
    steps = len(recorded)
    assert steps >= 5 and found[1025] == found[129], found
    assert found[2] == (found[1025][0], 6 * steps, steps) and found[1025][1] == 7 * steps, found


def test_the_same_holds_for_fixed_steps():
    """257 outputs, one at every step's end, against 2."""
    func = Net()
    calls = []
    for outputs in (2, 257):
        counted, y0 = Counted(func), state().requires_grad_()
        t = torch.linspace(0.0, 1.0, outputs, dtype=torch.float64)
        y = pfde.odeint(counted, y0, t, method="midpoint", step_size=1 / 256, params=list(func.parameters()))
        counted.calls = 0
        torch.autograd.grad(y.sum(), y0)
        calls.append(counted.calls)
    assert calls == [2 * 256] * 2


@pytest.mark.parametrize("method", ["tsit5", "dopri5", "dopri8"])
def test_what_is_kept_does_not_change_adaptive_steps(method):
    """With t on the graph too, where h is a tensor: the step taken is the one that a number h gives, to the bit."""
    k, found = torch.tensor(1.3, dtype=torch.float64, requires_grad=True), []
    for store in ("state", "stages", "graph"):
        t = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64, requires_grad=True)
        solution = pfde.solve(
            lambda t, y: -k * y * torch.cos(t) + 0.2 * y.roll(1),
            torch.linspace(0.5, 1.0, 4, dtype=torch.float64),
            t,
            method=method,
            rtol=1e-5,
            atol=1e-7,
            params=[k],
            gradient=pfde.Discrete(store=store),
        )
        found.append((solution.y.detach(), solution.stats.steps))
    assert all(torch.equal(y, found[0][0]) and steps == found[0][1] for y, steps in found)
