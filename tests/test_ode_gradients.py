"""The promise of `odeint`: the discrete adjoint is the gradient of the discrete solution to rounding, for every method.

Two references: `ode_oracle`, a second implementation on autograd's graph that shares nothing with pfde but the
coefficients, and `Backprop`, autograd through pfde's own steps. The tolerance is 1e-12 in the relative 2-norm of each
group of inputs (y, y0, theta, t). Why it is fair: the implicit stages stop at residuals of 32 eps = 7e-15, and errors
of N <= 20 steps of s <= 6 stages add up to no more than N s times that, 9e-13 (measured: 3e-14 at most).
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import ode_oracle
import pytest
import torch
from checkpoint_schedules import MultistageCheckpointSchedule
from torch import nn

import pfde
from pfde.driver import bare_system
from pfde.ordinary import solve_ode
from pfde.schemes.ordinary import ODE_METHODS, one_step_method
from pfde.schemes.tableaux import ADDITIVE, TABLEAUX
from pfde.sweeps.times import StepTimes
from pfde.system.layout import StateLayout
from pfde.system.peers import Peers
from pfde.system.torch_function import TorchFunction
from pfde.system.torch_system import TorchSystem

RTOL = 1e-12
EPS = torch.finfo(torch.float64).eps
EXPLICIT = [name for name in ODE_METHODS if not one_step_method(name).implicit]
IMPLICIT = [name for name in ODE_METHODS if one_step_method(name).implicit]
WITH_MASS = [name for name in IMPLICIT if name not in ADDITIVE]
ADAPTIVE = [name for name in ODE_METHODS if one_step_method(name).adaptive]
GRADIENTS = {
    "state": pfde.Discrete(),
    "stages": pfde.Discrete(store="stages"),
    "graph": pfde.Discrete(store="graph"),
    "symplectic": pfde.Symplectic(),
    "backprop": pfde.Backprop(),
}
LOOSE = {"rtol": 1e-3, "atol": 1e-5}  # for methods of low order, which would take many steps
TIGHT = {"rtol": 1e-5, "atol": 1e-7}
every_method = pytest.mark.parametrize("method", ODE_METHODS)


def coefficients(name):
    """The method's coefficients as plain numbers."""
    if name in ADDITIVE:
        pair = ADDITIVE[name]
        one, two = pair.implicit, pair.explicit
        return ode_oracle.Coefficients(one.a, one.weights, one.nodes, one.dense, two.a, two.weights)
    one = TABLEAUX[name]
    return ode_oracle.Coefficients(one.a, one.weights, one.nodes, one.dense)


# -- models -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A nonlinear right-hand side on (2, 2) that depends on t, with a parameter that it does not use."""

    def __init__(self, seed=7):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        for name, shape in {"W1": (3, 2), "b1": (3,), "c": (3,), "unused": (2,), "W2": (2, 3), "b2": (2,)}.items():
            setattr(self, name, nn.Parameter(0.6 * torch.randn(shape, generator=g, dtype=torch.float64)))

    def forward(self, t, y):
        return torch.tanh(y @ self.W1.T + self.b1 + self.c * torch.sin(3 * t)) @ self.W2.T + self.b2


class Autonomous(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor([[0.8, -0.3], [0.5, 1.1]], dtype=torch.float64))

    def forward(self, t, y):
        return torch.sin(y @ self.k)


class Quadrature(nn.Module):
    """f does not depend on y."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor([[0.8, -0.3], [0.5, 1.1]], dtype=torch.float64))

    def forward(self, t, y):
        return torch.sin(self.k * t) + 1


def plain(t, y):
    """No parameters."""
    return torch.cos(y) * (1 + t) - y.flip(0)


def model(method, make=Net):
    """A right-hand side for the method: in two parts for an implicit-explicit one."""
    if method not in ADDITIVE:
        return make()
    return pfde.Split(make(), Net(3))


def state():
    return torch.randn(2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def cotangent(outputs, seed=5):
    return torch.randn(outputs, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- grids ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Output times, and the steps between them; None for adaptive ones."""

    t: tuple[float, ...]
    pieces: tuple[int, ...] | None
    keywords: dict

    def times(self):
        return torch.tensor(self.t, dtype=torch.float64)


def grid(case, method):
    low = one_step_method(method).order <= 3 or method in IMPLICIT
    if case == "grid":
        if method in ADAPTIVE:  # which take a grid of t as steps only where step_size says so
            return Grid((1.3, 1.2, 1.0, 0.9), (1, 2, 1), {"step_size": 0.1})
        return Grid((1.3, 1.22, 1.0, 0.93, 0.6), (1,) * 4, {})
    if case == "step_size":
        return Grid((0.2, 0.5, 0.65), (2, 1), {"step_size": 0.15})
    if case == "long":
        return Grid((0.2, 0.65, 0.8, 1.1), (3, 1, 2), {"step_size": 0.15})
    t = (0.1, 0.17, 0.5, 0.52, 0.55, 0.9, 1.3, 1.5)
    return Grid(t if case == "adaptive" else tuple(1.6 - x for x in t), None, LOOSE if low else TIGHT)


def cases(method):
    """Adaptive steps in both directions where that is quick."""
    if method not in ADAPTIVE:
        return ("grid", "step_size")
    return ("grid", "step_size", "adaptive", *(("adaptive_down",) if method in EXPLICIT or method == "ark3" else ()))


SMOKE = {("rk4", "grid"), ("cn", "grid"), ("esdirk3", "grid"), ("ark2", "step_size"), ("dopri5", "adaptive")}
METHOD_CASES = [
    pytest.param(method, case, marks=[pytest.mark.smoke] if (method, case) in SMOKE else [])
    for method in ODE_METHODS
    for case in cases(method)
]


@pytest.fixture
def recorded(monkeypatch):
    """The end times of the adaptive steps, as they are accepted."""
    times, append = [], StepTimes.append

    def spy(self, t):
        times.append(t)
        append(self, t)

    monkeypatch.setattr(StepTimes, "append", spy)
    return times


# -- the two solutions ------------------------------------------------------------------------------------------------


@dataclass
class Result:
    y: torch.Tensor
    y0: torch.Tensor
    theta: torch.Tensor
    t: torch.Tensor | None


def differentiate(solve, func, t, v, y0=None):
    """y and the gradient of <v, y> for y = solve(func, y0, t), with fresh leaves."""
    y0 = (state() if y0 is None else y0).clone().requires_grad_()
    t = t.clone().requires_grad_()
    y = solve(func, y0, t)
    parameters = list(func.parameters()) if isinstance(func, nn.Module) else []
    bars = torch.autograd.grad((v * y).sum(), [y0, t, *parameters], allow_unused=True)
    for (name, _), bar in zip(func.named_parameters() if parameters else (), bars[2:], strict=True):
        assert not name.endswith("unused") or bar is None or not bar.any()
    bars = [torch.zeros_like(x) if b is None else b for x, b in zip([y0, t, *parameters], bars, strict=True)]
    theta = torch.cat([b.reshape(-1) for b in bars[2:]] or [y0.new_zeros(0)])
    return Result(y.detach(), bars[0], theta, bars[1])


def by_pfde(method, grid, gradient, func, v, y0=None, **keywords):
    def solve(func, y0, t):
        return pfde.odeint(func, y0, t, method=method, gradient=gradient, **grid.keywords, **keywords)

    return differentiate(solve, func, grid.times(), v, y0)


def by_oracle(method, grid, func, v, recorded=None, y0=None, mass=None):
    parts = (func.stiff, func.nonstiff) if method in ADDITIVE else (func, None)
    shape = (2, 2) if y0 is None else y0.shape

    def flat(part):
        return None if part is None else lambda t, y: part(t, y.view(shape)).reshape(-1)

    def solve(func, y0, t):
        if grid.pieces is None:
            times = ode_oracle.frozen_times(t, [grid.t[0], *recorded])
        else:
            times = ode_oracle.fixed_times(t, grid.pieces)
        f, g = map(flat, parts)
        y = ode_oracle.solve(coefficients(method), f, y0.reshape(-1), times, t, g=g, mass=mass)
        return y.view(-1, *shape)

    return differentiate(solve, func, grid.times(), v, y0)


def assert_close(a, b, rtol=RTOL, what=""):
    for name in ("y", "y0", "theta", "t"):
        x, ref = getattr(a, name), getattr(b, name)
        if not x.numel():
            continue
        assert x.shape == ref.shape and x.dtype == ref.dtype, name
        error = float((x - ref).norm() / (ref.norm() or 1.0))
        assert error <= rtol, f"{what} {name}: relative error {error:.2e}, allowed {rtol:.1e}"


def assert_bitwise(a, b, what=""):
    for name in ("y", "y0", "theta", "t"):
        assert torch.equal(getattr(a, name), getattr(b, name)), f"{what} {name}"


# -- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "case"), METHOD_CASES)
def test_gradient_equals_the_oracle_however_it_is_computed(method, case, recorded):
    """On adaptive steps each result is held against the oracle on its own: a rounding of y moves the error estimate,
    which is a small difference, and with it the steps, by 1e-12 or so."""
    where, func = grid(case, method), model(method)
    v = cotangent(len(where.t))
    references = {}
    for name, gradient in GRADIENTS.items():
        recorded.clear()
        result = by_pfde(method, where, gradient, func, v)
        if where.pieces is None:
            assert 2 <= len(recorded) <= 60 and set(where.t[1:-1]) - set(recorded), recorded
        if (steps := tuple(recorded)) not in references:
            references[steps] = by_oracle(method, where, func, v, recorded)
        assert_close(result, references[steps], what=name)


@every_method
@pytest.mark.parametrize("kind", ["autonomous", "quadrature", "plain"])
def test_gradient_is_exact_for_right_hand_sides_of_every_kind(method, kind):
    """f that does not depend on t, or on y, or on any parameter."""
    func = plain if kind == "plain" else {"autonomous": Autonomous, "quadrature": Quadrature}[kind]()
    if method in ADDITIVE:
        func = pfde.Split(func, Autonomous() if kind == "autonomous" else plain)
    where = Grid((0.2, 0.5, 0.6), (3, 1), {"step_size": 0.1})
    v = cotangent(3)
    reference = by_oracle(method, where, func, v)
    for name, gradient in GRADIENTS.items():
        assert_close(by_pfde(method, where, gradient, func, v), reference, what=name)


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


MASSES = {
    "full": torch.tensor([[2.0, 0.3], [-0.5, 1.5]], dtype=torch.float64),
    "diagonal": torch.tensor([2.0, 0.7], dtype=torch.float64),
    "singular": torch.tensor([[1.0, 0.0], [0.4, 0.0]], dtype=torch.float64),
}


class Algebraic(nn.Module):
    """f of M y' = f, regular on the kernel of the singular M: of index 1."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor([0.7, 1.3, 0.4], dtype=torch.float64))

    def forward(self, t, y):
        a, b = y[..., 0], y[..., 1]
        rate = -self.k[0] * a + torch.sin(b) * torch.cos(t)
        constraint = self.k[1] * b + 0.2 * torch.tanh(a * b) - self.k[2] * a
        return torch.stack([rate, 0.4 * rate + constraint], dim=-1)


@pytest.mark.parametrize("kind", MASSES)
@pytest.mark.parametrize("method", WITH_MASS)
def test_gradient_is_exact_with_a_mass_matrix(method, kind):
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
    for name, gradient in GRADIENTS.items():
        found = by_pfde(method, where, gradient, func, v, y0, mass=mass)
        assert_close(found, reference, 1e-10 if kind == "singular" else RTOL, what=name)


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
    where, func = grid("adaptive" if method in ADAPTIVE else "long", method), model(method)

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
        scheme = one_step_method(self.method)
        layout = StateLayout((torch.Size([2, 2]),), False)
        parameters = tuple(self.func.parameters())
        parts = (self.func.stiff, self.func.nonstiff) if scheme.split else (self.func,)
        functions = [TorchFunction(f, layout, parameters, torch.float64, y0.device, None, Peers(None)) for f in parts]

        def make(snes, vec):
            return TorchSystem(functions[0], snes, vec, None, functions[1] if scheme.split else None)

        system = bare_system(functions[0], make, implicit=scheme.implicit)
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


# -- what it costs ----------------------------------------------------------------------------------------------------


class Counted:
    """A right-hand side that knows how often it was called."""

    def __init__(self, func):
        self.func, self.calls = func, 0

    def __call__(self, t, y):
        self.calls += 1
        return self.func(t, y)


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("name", ["state", "stages", "graph", "symplectic"])
def test_an_explicit_step_costs_its_stages(method, name):
    """s evaluations forward and s linearisations backward; s - 1 evaluations more where only states are kept and one
    graph is alive at a time; none backward where the graphs are kept. One more is the look at f before the solve.

    bosh3, dopri5, tsit5 know the first slope of a step from the last stage of the step before only where that is
    evaluated anyway, by adaptive steps.
    """
    scheme, steps = one_step_method(method), 6
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
