"""The promise of `odeint`: the discrete adjoint is the gradient of the discrete solution to rounding, for every method.

Two references: `ode_oracle`, a second implementation on autograd's graph that shares nothing with pfde but the
coefficients, and `Backprop`, autograd through pfde's own steps. The tolerance is 1e-12 in the relative 2-norm of each
group of inputs (y, y0, theta, t). Why it is fair: the implicit stages stop at residuals of 32 eps = 7e-15, and errors
of N <= 20 steps of s <= 6 stages add up to no more than N s times that, 9e-13 (measured: 3e-14 at most).
"""

import functools
import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from checkpoint_schedules import MultistageCheckpointSchedule
from torch import nn

import pfde
from pfde.one_step.methods import METHODS as ODE_METHODS
from pfde.one_step.tableaux import ADDITIVE
from pfde.one_step.times import StepTimes
from pfde.solving.driver import bare_solver
from pfde.system.layout import StateLayout
from pfde.system.peers import Peers
from pfde.system.torch_function import TorchFunction
from pfde.system.torch_system import TorchSystem
from support import ode_oracle
from support.covering import EXHAUSTIVE, pairs
from support.one_step import (
    ADAPTIVE,
    EPS,
    EXPLICIT,
    GRADIENTS,
    IMPLICIT,
    MASSES,
    RTOL,
    WITH_MASS,
    Algebraic,
    Autonomous,
    Grid,
    Quadrature,
    assert_bitwise,
    assert_close,
    by_oracle,
    by_pfde,
    cases,
    coefficients,
    cotangent,
    every_method,
    grid,
    model,
    plain,
    state,
)

SMOKE = {("rk4", "grid"), ("cn", "grid"), ("esdirk3", "grid"), ("ark2", "step_size"), ("dopri5", "adaptive")}
CASES = ("grid", "step_size", "adaptive", "adaptive_down")


# -- exact ------------------------------------------------------------------------------------------------------------


@functools.cache
def reference(method, case, steps):
    where = grid(case, method)
    return by_oracle(method, where, model(method), cotangent(len(where.t)), steps)


@pytest.mark.parametrize(
    ("method", "case", "how"),
    [
        pytest.param(*row, marks=[pytest.mark.smoke] if row[:2] in SMOKE else [])
        for row in pairs(ODE_METHODS, CASES, GRADIENTS, valid=lambda method, case, _: case in cases(method))
    ],
)
def test_gradient_equals_the_oracle_however_it_is_computed(method, case, how, recorded):
    """On adaptive steps each result is held against the oracle on its own: a rounding of y moves the error estimate,
    which is a small difference, and with it the steps, by 1e-12 or so."""
    where = grid(case, method)
    result = by_pfde(method, where, GRADIENTS[how], model(method), cotangent(len(where.t)))
    if where.pieces is None:
        assert 2 <= len(recorded) <= 60 and set(where.t[1:-1]) - set(recorded), recorded
    assert_close(result, reference(method, case, tuple(recorded) if where.pieces is None else None))


@pytest.mark.parametrize(
    ("method", "kind", "how"), pairs(ODE_METHODS, ["autonomous", "quadrature", "plain"], GRADIENTS)
)
def test_gradient_is_exact_for_right_hand_sides_of_every_kind(method, kind, how):
    """f that does not depend on t, or on y, or on any parameter."""
    func = plain if kind == "plain" else {"autonomous": Autonomous, "quadrature": Quadrature}[kind]()
    if method in ADDITIVE:
        func = pfde.Split(func, Autonomous() if kind == "autonomous" else plain)
    where = Grid((0.2, 0.5, 0.6), (3, 1), {"step_size": 0.1})
    v = cotangent(3)
    assert_close(by_pfde(method, where, GRADIENTS[how], func, v), by_oracle(method, where, func, v))


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "esdirk3", "ark4"])
def test_an_output_is_differentiated_alone(method, recorded):
    """One cotangent at a time: of an output inside the first step, of one before the last, of y_N."""
    where, func = grid("adaptive", method), model(method)
    for i in (1, len(where.t) - 2, len(where.t) - 1):
        v = torch.zeros(len(where.t), 2, 2, dtype=torch.float64)
        v[i] = cotangent(1)[0]
        for name in ("state", "symplectic"):
            recorded.clear()
            result = by_pfde(method, where, GRADIENTS[name], func, v)
            assert_close(result, by_oracle(method, where, func, v, recorded), what=f"{name}, output {i},")


@pytest.mark.parametrize(("method", "kind", "how"), pairs(WITH_MASS, MASSES, GRADIENTS))
def test_gradient_is_exact_with_a_mass_matrix(method, kind, how):
    """Also for a singular one, with y_0 on the constraint.

    There an algebraic row of stage i is sum_j a_ij K_j = 0 up to the residual over h, 7e-15 / 0.025. An error of K_j
    comes back |a_ij| / a_ii times larger, 28 for sdirk4, in the next stages, and h_bar divides by h: 1e-10 (measured:
    2e-11 in t, 3e-13 in the others).
    """
    mass, func = MASSES[kind], Algebraic()
    y0 = state()
    if kind == "singular":
        with torch.no_grad():
            for _ in range(30):  # a fixed-point iteration on the constraint
                y0[:, 1] = (func.k[2] * y0[:, 0] - 0.2 * torch.tanh(y0[:, 0] * y0[:, 1])) / func.k[1]
    where = Grid((1.1, 0.9, 0.8), (2, 1), {"step_size": 0.1})
    v = cotangent(3)
    dense = torch.block_diag(*[torch.diag(mass) if mass.dim() == 1 else mass] * 2)
    reference = by_oracle(method, where, func, v, y0=y0, mass=dense)
    found = by_pfde(method, where, GRADIENTS[how], func, v, y0, mass=mass)
    assert_close(found, reference, 1e-10 if kind == "singular" else RTOL)


# -- bitwise ----------------------------------------------------------------------------------------------------------


def schedules(where, steps):
    found = [pfde.Online(snapshots=2, leaf=2), pfde.Revolve(snapshots=2)]
    if where.pieces is not None:
        found.append(MultistageCheckpointSchedule(steps, 2, 0))
    return found


BITWISE = [
    *((method, "long") for method in ODE_METHODS),
    *((method, "adaptive") for method in ADAPTIVE if method in EXPLICIT or method in ("esdirk3", "ark3")),
]


@pytest.mark.parametrize(("method", "case"), BITWISE)
def test_the_gradient_is_bitwise_the_same_under_every_schedule(method, case):
    where, func = grid(case, method), model(method)
    v = cotangent(len(where.t))
    steps = sum(where.pieces or ())
    default = by_pfde(method, where, pfde.Discrete(schedule=pfde.StoreAll()), func, v)
    for plan in schedules(where, steps):
        assert_bitwise(by_pfde(method, where, pfde.Discrete(schedule=plan), func, v), default, repr(plan))


@pytest.mark.parametrize("method", ODE_METHODS)
@pytest.mark.parametrize("name", ["state", "graph"])
def test_repeated_and_pending_backward_passes_are_bitwise_the_same(method, name):
    """Two forward passes, then their backward passes, the first one twice: bitwise the gradients of each alone.

    The first backward pass spends the record; the second computes the same steps again.
    """
    adaptive = method in (ADAPTIVE if EXHAUSTIVE else ("bosh3", "dopri5", "esdirk3", "ark3"))
    where, func = grid("adaptive" if adaptive else "long", method), model(method)

    def start(shift):
        y0, t = (state() + shift).requires_grad_(), where.times().requires_grad_()
        y = pfde.odeint(func, y0, t, method=method, gradient=GRADIENTS[name], **where.keywords)
        inputs = [y0, t, *(p for n, p in func.named_parameters() if "unused" not in n)]
        return (cotangent(len(t)) * y).sum(), inputs

    pending = [start(shift) for shift in (0.0, 0.1)]
    one, two, again = (torch.autograd.grad(*pending[i], retain_graph=True) for i in (0, 1, 0))
    alone = torch.autograd.grad(*start(0.1))
    for a, b, c, d in zip(one, again, two, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(c, d)


# -- the tangent is the transpose's transpose, and both are derivatives -----------------------------------------------


@every_method
def test_taylor_remainders_vanish_at_rates_one_and_two(method):
    """J(p + e u), p = (y0, theta, t) and fixed steps; where these have a length, t moves as a whole and is stretched.

    The largest e is eps^(1/4) of p's size: the second remainder then lies far above rounding, and third-order terms
    bend its rate by 1e-4.
    """
    func, v = model(method), cotangent(5)
    generator = torch.Generator().manual_seed(1)
    y0, t = state(), torch.tensor([0.2, 0.4, 0.7, 0.8, 1.2], dtype=torch.float64)
    parameters = list(func.parameters())
    u = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y0, *parameters)]
    u_t = torch.randn(5, generator=generator, dtype=torch.float64) * 0.2
    if method in ADAPTIVE:
        u_t = 0.3 - 0.7 * t

    def value(e, gradient=None):
        moved = [x + e * d for x, d in zip((y0, *parameters), u, strict=True)]
        times = t + e * u_t
        leaves = [x.detach().requires_grad_(gradient is not None) for x in (*moved, times)]
        names = [name for name, _ in func.named_parameters()]

        def call(s, y):
            return torch.func.functional_call(func, dict(zip(names, leaves[1:-1], strict=True)), (s, y))

        def part(which):
            module, prefix = getattr(func, which), f"{which}."
            own = {n[len(prefix) :]: x for n, x in zip(names, leaves[1:-1], strict=True) if n.startswith(prefix)}
            return lambda s, y: torch.func.functional_call(module, own, (s, y))

        f = pfde.Split(part("stiff"), part("nonstiff")) if method in ADDITIVE else call
        size = {"step_size": float(times[-1] - times[0]) / 10} if method in ADAPTIVE else {}
        y = pfde.odeint(f, leaves[0], leaves[-1], method=method, params=leaves[1:-1], gradient=gradient, **size)
        loss = torch.sin(v * y).sum()
        return loss if gradient is None else torch.autograd.grad(loss, leaves, allow_unused=True)

    bars = value(0.0, pfde.Discrete())
    slope = sum(float((b * d).sum()) for b, d in zip(bars, [*u, u_t], strict=True) if b is not None)
    start = float(value(0.0))
    steps = [1e-4 / 2**k for k in range(4)]
    differences = [float(value(e)) - start for e in steps]
    remainders = [abs(d - e * slope) for d, e in zip(differences, steps, strict=True)]
    one, two = ([math.log2(abs(a / b)) for a, b in pairwise(x)] for x in (differences, remainders))
    assert all(abs(rate - 1) <= 0.02 for rate in one) and all(abs(rate - 2) <= 0.02 for rate in two), (one, two)


@dataclass(frozen=True)
class Frozen:
    """A method's steps with pfde's own pieces, outside any solve."""

    method: str
    times: tuple[float, ...]
    func: nn.Module

    def run(self, y0, y_dot, theta_dot, v, graphs):
        """(<v, y_dot_n> summed, its size, <bars, dots>) with the tangents and the transposes of all steps.

        graphs : whether the graphs of all stages of a step are to be alive at a time in its transpose
        """
        scheme = ODE_METHODS[self.method]
        layout = StateLayout((torch.Size([2, 2]),), False)
        parameters = tuple(self.func.parameters())
        parts = (self.func.stiff, self.func.nonstiff) if scheme.split else (self.func,)
        functions = [TorchFunction(f, layout, parameters, torch.float64, y0.device, None, Peers(None)) for f in parts]
        nonstiff = functions[1] if scheme.split else None
        system = TorchSystem(functions[0], *bare_solver(functions[0], "", implicit=scheme.implicit), None, nonstiff)
        steps = StepTimes((self.times[0], self.times[-1]), None)
        for t in self.times[1:]:
            steps.append(t)
        with torch.no_grad():
            ys, tangent, scale, start = [y0], 0.0, 0.0, y_dot
            for n in range(1, steps.steps + 1):
                at = steps.interval(n)
                ys.append(scheme.step(system, at, ys[-1]).y)
                y_dot = scheme.tangent(system, at, self.sources(scheme, system, at, ys, False), y_dot, theta_dot)
                tangent += float(v[n] @ y_dot)
                scale += float((v[n] * y_dot).abs().sum())
            bar, lam = system.parameter_cotangent(), torch.zeros_like(y0)
            for n in range(steps.steps, 0, -1):
                at = steps.interval(n)
                sources = self.sources(scheme, system, at, ys, graphs)
                lam = scheme.adjoint(system, at, sources, lam + v[n], {}, bar, times=False).y
        adjoint = float(lam @ start)
        adjoint += sum(float((b * d).sum()) for b, d in zip(bar.bars, theta_dot, strict=True) if b is not None)
        return tangent, scale, adjoint

    @staticmethod
    def sources(scheme, system, at, ys, graphs):
        return scheme.stages(system, at, ys[at.n - 1], ys[at.n], dense=False, graphs=graphs, rows=None)


@every_method
def test_dot_product_of_tangent_and_transposed_steps_agrees_to_rounding(method):
    """On steps of changing size."""
    times = (0.2, 0.3, 0.34, 0.5, 0.56, 0.75, 0.8, 1.0)
    func = model(method)
    generator = torch.Generator().manual_seed(2)
    y0, y_dot = state().reshape(-1), torch.randn(4, generator=generator, dtype=torch.float64)
    theta_dot = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in func.parameters()]
    v = torch.randn(len(times), 4, generator=generator, dtype=torch.float64)
    for graphs in (False, True):
        tangent, scale, adjoint = Frozen(method, times, func).run(y0, y_dot, theta_dot, v, graphs)
        assert abs(tangent - adjoint) / scale <= 50 * EPS * math.sqrt(len(times) - 1), graphs


# -- a stiff relaxation: what the continuous adjoint gets wrong --------------------------------------------------------


def relaxation(gradient, k0=50.0):
    """dL/dk of y' = -k (y - cos t), four components from 0 to 2 by 64 steps of the 3/8 rule, L = |y(2)|^2."""
    k = torch.tensor(k0, dtype=torch.float64, requires_grad=True)
    y0, t = torch.zeros(4, dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    y = pfde.odeint(
        lambda t, y: -k * (y - torch.cos(t)), y0, t, method="rk4", step_size=1 / 32, params=[k], gradient=gradient
    )
    return torch.autograd.grad(y[-1].square().sum(), k)[0].item()


@pytest.mark.smoke
def test_the_discrete_gradient_is_right_where_the_continuous_one_is_not():
    """The transient is gone at t = 2 and dL/dk = -2 y sin t / k^2 to first order: 1.17e-3 with all four components.

    Backwards in time the relaxation grows by e^(50 t): the continuous adjoint finds 7.69, without a sign of failure.
    """
    k = torch.tensor(50.0, dtype=torch.float64, requires_grad=True)
    times = ode_oracle.fixed_times(torch.tensor([0.0, 2.0], dtype=torch.float64), (64,))
    y = ode_oracle.solve(
        coefficients("rk4"),
        lambda t, y: -k * (y - torch.cos(t)),
        torch.zeros(4, dtype=torch.float64),
        times,
        torch.tensor([0.0, 2.0]),
    )
    reference = torch.autograd.grad(y[-1].square().sum(), k)[0].item()
    for gradient in (pfde.Discrete(), pfde.Symplectic(), pfde.Backprop()):
        found = relaxation(gradient)
        assert abs(found - reference) <= 1e-9 * abs(reference) and f"{found:.2e}" == "1.17e-03"
    assert f"{relaxation(pfde.Continuous()):.2f}" == "7.69"


@pytest.mark.parametrize("method", IMPLICIT)
def test_the_gradient_follows_a_loosened_newton_tolerance(method):
    """The error of the gradient falls with the residual left, which snes_rtol bounds relative to the first one."""
    where, func, v = Grid((0.2, 0.8, 1.4), (2, 2), {"step_size": 0.3}), model(method), cotangent(3)
    reference = by_oracle(method, where, func, v)
    errors = []
    for rtol in (1e-1, 1e-3, 1e-6, None):
        options = None if rtol is None else {"snes_rtol": rtol, "snes_stol": 0.0}
        loose = by_pfde(method, where, pfde.Discrete(), func, v, options=options)
        errors.append(float((loose.theta - reference.theta).norm() / reference.theta.norm()))
        assert errors[-1] <= (RTOL if rtol is None else rtol), errors
    assert errors[0] > errors[1] >= errors[2] >= errors[3] and errors[0] > 1e-7, errors


@pytest.mark.parametrize("gradient", [*GRADIENTS.values()], ids=[*GRADIENTS])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "cn", "sdirk4", "ark3"])
def test_f_may_be_a_constant_at_some_times(method, gradient):
    """There it has no graph at all: its share of t's gradient is zero, and not that of the product before."""
    k = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def f(t, y):
        return -k * y * torch.cos(t) if t >= 0.45 else torch.full_like(y, 0.7)

    func = pfde.Split(f, f) if method == "ark3" else f

    def bars(how):
        t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
        y0 = torch.linspace(0.5, 1.0, 3, dtype=torch.float64)
        y = pfde.odeint(func, y0, t, method=method, step_size=0.1, params=[k], gradient=how)
        return torch.autograd.grad(y[-1].square().sum(), (t, k))

    for bar, reference in zip(bars(gradient), bars(pfde.Backprop()), strict=True):
        assert (bar - reference).norm() <= 1e-12 * reference.norm()
