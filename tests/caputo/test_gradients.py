"""Promises 1 to 3: the discrete adjoint is the gradient of the discrete scheme, to rounding, whatever is stored.

Two references: `oracle`, a dense second implementation that shares nothing with pfde, and `Backprop`, autograd through
pfde's own steps. Against both the tolerance is 1e-12 in the relative 2-norm of each group of inputs (y0, theta, alpha).
Why it is fair: the implicit stages stop at residuals of 32 eps = 7e-15, errors of N stages add up to no more than N
times that, 5.6e-13 at N = 80 in the worst case, and like its square root in practice (measured: 1e-13 at most).
"""

import math

import pytest
import torch
from torch import nn

import pfde
from pfde import testing
from pfde.caputo.schemes import METHODS
from support import oracle
from support.caputo import (
    ALPHAS,
    EPS,
    GRADIENTS,
    IMPLICIT,
    RTOL,
    STORES,
    Net,
    Result,
    assert_bitwise,
    assert_close,
    by_oracle,
    by_pfde,
    cotangent,
    differentiate,
    every_method,
    every_store,
    state,
)
from support.covering import pairs

# -- promise 1: exact -------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@every_method
def test_gradient_equals_the_oracle_and_autograd(method):
    alpha, v = ALPHAS["scalar"], cotangent(17)
    reference = by_oracle(method, 17, alpha, v, key=("scalar",))
    assert_close(by_pfde(method, 17, alpha, pfde.Discrete(), v), reference)
    assert_close(by_pfde(method, 17, alpha, pfde.Backprop(), v), reference)


@pytest.mark.parametrize(("method", "kind", "how"), pairs(METHODS, ALPHAS, GRADIENTS))
def test_gradient_is_exact_for_every_kind_of_order_and_every_store(method, kind, how):
    alpha, v = ALPHAS[kind], cotangent(17)
    reference = by_oracle(method, 17, alpha, v, key=(kind,))
    assert_close(by_pfde(method, 17, alpha, GRADIENTS[how], v), reference)


@pytest.mark.parametrize(("method", "steps", "kind", "how"), pairs(METHODS, [1, 2, 3], ["scalar", "row"], GRADIENTS))
def test_gradient_is_exact_from_the_first_step_on(method, steps, kind, how):
    v = cotangent(steps)
    reference = by_oracle(method, steps, ALPHAS[kind], v, key=(kind,))
    assert_close(by_pfde(method, steps, ALPHAS[kind], GRADIENTS[how], v), reference)


@every_method
def test_gradient_is_exact_at_many_steps(method):
    """33 steps of several orders are blocked by the history's automatic choice, 80 of one order are summed directly."""
    for kind, steps, store in (("row", 33, "stages"), ("scalar", 80, "state")):
        v = cotangent(steps)
        reference = by_oracle(method, steps, ALPHAS[kind], v)
        assert_close(by_pfde(method, steps, ALPHAS[kind], pfde.Discrete(store=store), v), reference)


@pytest.mark.parametrize(("method", "arriving"), pairs(METHODS, ["terminal", "initial", "some"]))
def test_gradient_is_exact_wherever_cotangents_arrive(method, arriving):
    v = cotangent(16, arriving)
    reference = by_oracle(method, 16, ALPHAS["row"], v)
    result = by_pfde(method, 16, ALPHAS["row"], pfde.Discrete(), v)
    assert_close(result, reference)
    if arriving == "initial":
        assert torch.equal(result.y0, v[0]) and not result.theta.any() and not result.alpha.any()


@every_method
def test_outputs_may_be_coarser_than_the_steps(method):
    """t names 5 times, step_size makes 16 steps of them: the same gradient as 17 outputs with cotangent 0 between."""
    v = cotangent(16, "some")
    reference = by_oracle(method, 16, ALPHAS["scalar"], v)

    def solve(func, y0, alpha):
        t = torch.linspace(0.2, 1.4, 5, dtype=torch.float64)
        return pfde.fdeint(func, y0, t, alpha, method=method, step_size=1.2 / 16)

    coarse = differentiate(solve, ALPHAS["scalar"], v[::4])
    assert_close(coarse, Result(reference.y[::4], reference.y0, reference.theta, reference.alpha))


class Constant(nn.Module):
    """f = theta: independent of y and t."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def forward(self, t, y):
        return self.theta.expand(2, 3)


class Forcing(Constant):
    """f = theta sin(t): independent of y."""

    def forward(self, t, y):
        return (self.theta * torch.sin(3 * t)).expand(2, 3)


class ParameterFree(nn.Module):
    """f = -y^3 cos(t): no parameter."""

    def forward(self, t, y):
        return -(y**3) * torch.cos(t)


def time_only(t, y):
    """f = (sin t, cos t, t^2): neither y nor a parameter, so f has no graph at all."""
    return torch.stack([torch.sin(t), torch.cos(t), t * t]).expand(2, 3)


DEGENERATE = {"constant": Constant, "forcing": Forcing, "no parameter": ParameterFree, "time only": lambda: time_only}


@pytest.mark.parametrize(("method", "model", "kind", "how"), pairs(METHODS, DEGENERATE, ["scalar", "row"], GRADIENTS))
def test_gradient_is_exact_for_degenerate_right_hand_sides(method, model, kind, how):
    alpha, v, make = ALPHAS[kind], cotangent(9), DEGENERATE[model]
    reference = by_oracle(method, 9, alpha, v, make())
    assert_close(by_pfde(method, 9, alpha, GRADIENTS[how], v, make()), reference)


@every_method
@pytest.mark.parametrize("gradient", [pfde.Discrete(), pfde.Backprop()])
def test_unused_and_frozen_parameters_get_what_torch_gives_them(method, gradient):
    """Both None, as after loss.backward() of any torch model; the others as without them."""
    v = cotangent(8)
    func = Net()
    func.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    func.b1.requires_grad_(False)
    t = torch.linspace(0.2, 1.4, 9, dtype=torch.float64)
    y0 = state().requires_grad_()
    y = pfde.fdeint(func, y0, t, 0.6, method=method, gradient=gradient)
    (v * y).sum().backward()
    assert func.unused.grad is None and func.b1.grad is None
    reference = Net()
    reference.b1.requires_grad_(False)
    expected = by_oracle(method, 8, 0.6, v, reference)
    theta = torch.cat([p.grad.reshape(-1) for p in func.parameters() if p.grad is not None])
    assert_close(Result(y.detach(), y0.grad, theta, None), expected)


@every_method
def test_a_parameter_used_at_some_times_only_gets_its_gradient(method):
    class Late(Net):
        def forward(self, t, y):
            y = super().forward(t, y)
            return y + self.c[:3] * y if t > 0.8 else y.detach() * 0 + self.b2

    v = cotangent(10)
    reference = by_oracle(method, 10, ALPHAS["scalar"], v, Late())
    for store in STORES:
        assert_close(by_pfde(method, 10, ALPHAS["scalar"], pfde.Discrete(store=store), v, Late()), reference)


@pytest.mark.parametrize(
    ("method", "gradient"), pairs(METHODS, [pfde.Discrete(), pfde.Discrete(store="graph"), pfde.Backprop()])
)
def test_gradient_reaches_through_non_leaf_inputs_of_a_plain_function(method, gradient):
    """y0, alpha and params= are results of other operations, y0 not contiguous."""
    raw = torch.tensor([0.4, -0.3, 0.8], dtype=torch.float64)
    v = cotangent(7)

    def gradient_of(solve):
        leaf = raw.clone().requires_grad_()
        weight = (leaf[:, None] * leaf).cos()
        y0 = (leaf * torch.tensor([[1.0], [2.0]], dtype=torch.float64)).T.contiguous().T
        alpha = torch.sigmoid(leaf.sum())
        y = solve(lambda t, y: torch.tanh(y @ weight) * (1 + t), y0, alpha, weight)
        return y.detach(), torch.autograd.grad((v * y).sum(), leaf)[0]

    def by_discrete(f, y0, alpha, weight):
        t = torch.linspace(0.0, 1.0, 8, dtype=torch.float64)
        return pfde.fdeint(f, y0, t, alpha, method=method, params=[weight], gradient=gradient)

    def by_dense(f, y0, alpha, weight):
        def flat(t, y):
            return f(t, y.view(2, 3)).reshape(-1)

        return oracle.solve(method, flat, y0.reshape(-1), alpha.reshape(1), 0.0, 1 / 7, 7).view(-1, 2, 3)

    (y, bar), (y_ref, bar_ref) = gradient_of(by_discrete), gradient_of(by_dense)
    assert float((y - y_ref).norm() / y_ref.norm()) <= RTOL
    assert float((bar - bar_ref).norm() / bar_ref.norm()) <= RTOL


@every_method
@every_store
def test_gradient_is_exact_for_tuple_states(method, store):
    """(a, b) of shapes (2, 2) and (3,), coupled, against the oracle on the flat state."""
    weight = torch.randn(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2
    start = torch.linspace(-1, 1, 7, dtype=torch.float64)
    v = torch.randn(9, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def rhs(t, y, w):
        return torch.tanh(w @ y + t)

    def by_tuple(w, a, b, alpha):
        def f(t, y):
            out = rhs(t, torch.cat([y[0].reshape(-1), y[1]]), w)
            return out[:4].view(2, 2), out[4:]

        t = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)
        ya, yb = pfde.fdeint(f, (a, b), t, alpha, method=method, params=[w], gradient=pfde.Discrete(store=store))
        assert ya.shape == (9, 2, 2) and yb.shape == (9, 3)
        return torch.cat([ya.reshape(9, 4), yb], dim=1)

    def by_dense(w, a, b, alpha):
        y0 = torch.cat([a.reshape(-1), b])
        return oracle.solve(method, lambda t, y: rhs(t, y, w), y0, alpha.reshape(1), 0.0, 1 / 8, 8)

    found = []
    for solve in (by_tuple, by_dense):
        values = (weight, start[:4].view(2, 2), start[4:], ALPHAS["scalar"])
        inputs = [x.clone().requires_grad_() for x in values]
        y = solve(*inputs)
        found.append([y.detach(), *torch.autograd.grad((v * y).sum(), inputs)])
    for x, ref in zip(*found, strict=True):
        assert float((x - ref).norm() / ref.norm()) <= RTOL


@pytest.mark.parametrize(("method", "kind", "how"), pairs(METHODS, ["scalar", "row"], ["state", "graph", "backprop"]))
def test_float32_gradient_is_the_float64_one_to_float32_rounding(method, kind, how):
    """N = 40 steps, each committing a few eps_32 = 1.2e-7 and leaving a Newton residual of up to 32 eps_32 = 4e-6,
    whose errors do not all point the same way: 2e-5. The derivative form divides by the small h^alpha what it takes
    from the difference y - y_0, which loses another factor of 1 / w < 10: 1e-4 (measured: 2e-6 and 3.8e-5)."""
    rtol = 2e-5 if METHODS[method].form == "integral" else 1e-4
    v = cotangent(40)
    reference = by_oracle(method, 40, ALPHAS[kind], v, key=(kind,))
    func, y0 = Net().float(), state().float().requires_grad_()
    alpha = ALPHAS[kind].clone().requires_grad_()
    y = pfde.fdeint(func, y0, torch.linspace(0.2, 1.4, 41), alpha, method=method, gradient=GRADIENTS[how])
    bars = torch.autograd.grad((v.float() * y).sum(), [y0, *func.parameters(), alpha])
    assert y.dtype == bars[0].dtype == bars[1].dtype == torch.float32 and bars[-1].dtype == torch.float64
    theta = torch.cat([b.reshape(-1) for b in bars[1:-1]]).double()
    assert_close(Result(y.detach().double(), bars[0].double(), theta, bars[-1]), reference, rtol)


def test_float32_order_gets_a_float32_gradient():
    alpha = torch.tensor([0.35, 0.7, 0.95], requires_grad=True)
    y = pfde.fdeint(Net().float(), state().float(), torch.linspace(0, 1, 5), alpha, method="pece")
    (bar,) = torch.autograd.grad(y.sum(), alpha)
    assert bar.dtype == torch.float32 and bar.shape == (3,) and bool(bar.abs().gt(0).all())


def test_orders_that_are_not_differentiated_get_no_gradient():
    y0 = state().requires_grad_()
    alpha = ALPHAS["row"].clone()
    y = pfde.fdeint(Net(), y0, torch.linspace(0, 1, 5, dtype=torch.float64), alpha)
    y.sum().backward()
    assert alpha.grad is None and y0.grad is not None


# -- promise 2: the tangent is the transpose's transpose, and both are derivatives -------------------------------------


@every_method
def test_dot_product_of_tangent_and_adjoint_agrees_to_rounding(method):
    for kind, steps in (("scalar", 20), ("full", 12)):
        t = torch.linspace(0.2, 1.4, steps + 1, dtype=torch.float64)
        error = testing.dot_product_error(Net(), state(), t, ALPHAS[kind], method=method)
        assert error <= 50 * EPS * math.sqrt(steps)


@every_method
def test_taylor_remainders_vanish_at_rates_one_and_two(method):
    t = torch.linspace(0.2, 1.4, 8, dtype=torch.float64)
    for kind in ("full", ("number", "one")[list(METHODS).index(method) % 2]):
        slopes = testing.taylor_slopes(Net(), state(), t, ALPHAS[kind], method=method)
        assert slopes.worst <= 0.02, slopes


# -- promise 3: bitwise -----------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("kind", ["scalar", "full"])
def test_every_store_gives_the_same_gradient(method, kind):
    """The same f at the same states, products in the same order: keeping a graph or building it again is no difference.

    But for "graph" with the derivative form: its buffer holds X_n = y_n - y_0, and y_0 + X_n differs from the y_n at
    which the graph was built by a rounding, hence gradients by some roundings of N steps: N eps = 2e-14, times 10.
    `pece` builds its predictors again, at 70 steps in more than one block.
    """
    steps = 12 if METHODS[method].implicit else 70
    v = cotangent(steps)
    results = [by_pfde(method, steps, ALPHAS[kind], pfde.Discrete(store=store), v) for store in STORES]
    assert_bitwise(results[1], results[0])
    if METHODS[method].form == "integral":
        assert_bitwise(results[2], results[0])
    else:
        assert_close(results[2], results[0], 10 * steps * EPS)


@every_method
def test_the_explicit_schedule_store_all_is_the_default(method):
    v = cotangent(12)
    default = by_pfde(method, 12, ALPHAS["row"], None, v)
    assert_bitwise(by_pfde(method, 12, ALPHAS["row"], pfde.Discrete(schedule=pfde.StoreAll()), v), default)


@every_method
@every_store
def test_a_repeated_backward_pass_is_bitwise_the_same(method, store):
    """The first backward pass spends the trajectory; the second computes it again."""
    func, alpha, y0 = Net(), ALPHAS["row"].clone().requires_grad_(), state().requires_grad_()
    t = torch.linspace(0.2, 1.4, 8, dtype=torch.float64)
    inputs = [y0, alpha, *func.parameters()]
    y = pfde.fdeint(func, y0, t, alpha, method=method, gradient=pfde.Discrete(store=store))
    loss = (cotangent(7) * y).sum()
    first, second, third = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(3))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@every_method
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_pending_solves_share_nothing(method, order):
    """Two forward passes, then their backward passes in either order: bitwise the gradients of each alone."""
    t, v = torch.linspace(0.2, 1.4, 9, dtype=torch.float64), cotangent(8)
    func = Net()

    def start(shift):
        y0 = (state() + shift).requires_grad_()
        alpha = (ALPHAS["scalar"] + shift).requires_grad_()
        y = pfde.fdeint(func, y0, t, alpha, method=method)
        return (v * y).sum(), [y0, alpha, *func.parameters()]

    alone = [torch.autograd.grad(*start(shift)) for shift in (0.0, 0.1)]
    pending = [start(shift) for shift in (0.0, 0.1)]
    for i in order:
        for a, b in zip(torch.autograd.grad(*pending[i]), alone[i], strict=True):
            assert torch.equal(a, b)


@every_method
def test_the_same_solve_twice_is_bitwise_the_same(method):
    v = cotangent(12)
    assert_bitwise(*(by_pfde(method, 12, ALPHAS["full"], pfde.Discrete(), v) for _ in range(2)))


# -- the history's algorithm and the solver's form make no difference beyond rounding ----------------------------------


@pytest.mark.parametrize(
    ("method", "steps", "kind"),
    [
        *(("euler", 300, "scalar"), ("euler", 140, "row"), ("pece", 140, "scalar"), ("pece", 140, "row")),
        *(("trapezoid", 40, "row"), ("bdf2", 40, "scalar")),
    ],
)
def test_every_history_algorithm_gives_the_same_gradient(method, steps, kind):
    """The FFT's error is relative to the norm of what it transforms, c log2(N) eps: 1e-12 leaves a factor of 1e2."""
    v = cotangent(steps)
    direct, *others = (
        by_pfde(method, steps, ALPHAS[kind], pfde.Discrete(), v, history=pfde.Exact(algorithm))
        for algorithm in ("direct", "blocked", "fft")
    )
    for other in others:
        assert_close(other, direct)


@pytest.mark.parametrize("method", IMPLICIT)
def test_every_form_of_the_newton_matrix_gives_the_same_gradient(method):
    """The rows of y are independent systems (a batch), so that "blocks" applies."""
    v = cotangent(12)
    reference = by_oracle(method, 12, ALPHAS["row"], v)
    for form in ("auto", "matrix_free", "dense", "blocks"):
        result = by_pfde(method, 12, ALPHAS["row"], pfde.Discrete(), v, options={"fde_jacobian": form})
        assert_close(result, reference)


@pytest.mark.parametrize("method", IMPLICIT)
def test_the_gradient_follows_a_loosened_newton_tolerance(method):
    """The error of the gradient is proportional to the residual left: at most 10 atol here, and there to be seen."""
    v = cotangent(20)
    tight = by_pfde(method, 20, ALPHAS["scalar"], pfde.Discrete(), v)
    errors = []
    for atol in (1e-3, 1e-5, 1e-7):
        loose = by_pfde(method, 20, ALPHAS["scalar"], pfde.Discrete(), v, options={"snes_atol": atol})
        errors.append(float((loose.theta - tight.theta).norm() / tight.theta.norm()))
        assert errors[-1] <= 10 * atol, errors
    assert errors[0] > errors[1] > 1e-13, errors


# -- the battery on other models --------------------------------------------------------------------------------------


@every_method
def test_the_battery_accepts_tuple_states_and_plain_functions(method):
    weight = torch.tensor([0.7, -0.2], dtype=torch.float64, requires_grad=True)

    def f(t, y):
        return weight * torch.sin(y[1] + t), -y[0] * y[1]

    y0 = (torch.ones(2, dtype=torch.float64), torch.full((2,), 0.3, dtype=torch.float64))
    report = testing.verify(f, y0, torch.linspace(0, 1, 9, dtype=torch.float64), 0.7, method=method, params=[weight])
    assert report.passed, report
    assert weight.grad is None and weight._version == 0
