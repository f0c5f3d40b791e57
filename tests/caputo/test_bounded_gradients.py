"""Gradients with bounded histories, and on nonuniform grids: exact to rounding for the scheme that is integrated.

Two references. `pfde.Backprop` sums a compressed history with every term of its kernel, on autograd's graph: the
recurrences are tested by their definition. `oracle` is told what the compression consists of, nodes and weights, builds
the compressed matrices from its own 60-digit ones, and shares nothing else with pfde.

Tolerances: 1e-12 in the relative 2-norm of each group of inputs, as in test_gradients (measured: 1e-13), whatever the
tolerance of the history is; 50 eps sqrt(N) for the dot product (measured: 0.1 eps); slopes within 0.02. A graph of
autograd through the weights of exponentials transposes an ill-conditioned fit, which costs Backprop's alpha_bar two
digits at most (`history.nodes`, note in Fit.weights).
"""

import math

import numpy as np
import pytest
import torch

import pfde
from pfde import testing
from pfde.caputo.schemes import METHODS
from support import oracle
from support.compressed import GRIDDED, ORDERS, START, times
from support.models import Net

RTOL = 1e-12
EPS = torch.finfo(torch.float64).eps
TOLERANCES = (1e-3, 1e-6, 1e-10, 1e-12)
SHORT = pfde.ShortMemory(0.3)
HISTORIES = [*map(pfde.SumOfExponentials, TOLERANCES), SHORT]
SOE = pfde.SumOfExponentials(1e-6)
STEPS = 67  # three blocks of 32 steps; with two orders a block has 8
every_method = pytest.mark.parametrize("method", METHODS)


def named(history):
    return str(history).removeprefix("SumOf")


def check(method, alpha, t, history, *, func=None, y0=START, store="state", product=False, **keywords):
    """The exactness checks of the battery: against autograd, and the dot product."""
    keywords |= {"method": method, "history": history, "gradient": pfde.Discrete(store=store)}
    func = func or Net()
    errors = testing.gradient_error(func, y0, t, alpha, **keywords)
    assert errors.worst <= RTOL, f"{method}, {history}: {errors}"
    if product:
        found = testing.dot_product_error(func, y0, t, alpha, **keywords)
        assert found <= 50 * EPS * math.sqrt(len(t) - 1), f"{method}, {history}: {found:.1e}"


# -- uniform grids -----------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("method", ["euler", "pece", "gl"])
def test_gradient_is_exact_in_a_nutshell(method):
    check(method, ORDERS, times(13), SOE, product=True)


@every_method
@pytest.mark.parametrize("history", HISTORIES, ids=named)
def test_gradient_is_exact(method, history):
    first, third = history == HISTORIES[0], history == HISTORIES[2]
    explicit = not METHODS[method].implicit
    long = first or (explicit and third)
    check(method, 0.6, times(STEPS if long else STEPS // 2), history, product=long if explicit else third)


@every_method
@pytest.mark.parametrize("history", [HISTORIES[2], SHORT], ids=named)
def test_gradient_is_exact_for_several_orders(method, history):
    check(method, ORDERS, times(21), history, product=True)


@every_method
@pytest.mark.parametrize("alpha", [(0.05, 0.999), (1.0, 0.01)])
def test_gradient_is_exact_at_both_ends_of_the_orders(method, alpha):
    check(method, torch.tensor(alpha, dtype=torch.float64), times(17), pfde.SumOfExponentials(1e-10))


@every_method
@pytest.mark.parametrize(("store", "history"), [("stages", SOE), ("graph", SHORT)])
def test_gradient_is_exact_whatever_is_stored(method, store, history):
    check(method, ORDERS, times(17), history, store=store)


@every_method
def test_outputs_may_be_coarser_than_the_steps(method):
    check(method, 0.6, times(4), SOE, step_size=0.05)


@pytest.mark.parametrize("method", ["pece", "trapezoid", "bdf2"])
def test_gradient_is_exact_for_tuple_states(method):
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()

    def f(t, y):
        out = torch.tanh(weight @ torch.cat([y[0].reshape(-1), y[1]]) + t)
        return out[:2].view(2, 1), out[2:]

    y0 = START.view(2, 1), torch.tensor([0.7], dtype=torch.float64)
    check(method, 0.6, times(40), SOE, func=f, y0=y0, params=[weight])


@pytest.mark.parametrize(("method", "history"), [("pece", SOE), ("l1", SOE), ("trapezoid", SHORT)])
def test_taylor_slopes(method, history):
    slopes = testing.taylor_slopes(Net(), START, times(35), 0.6, method=method, history=history)
    assert slopes.worst <= 0.02, slopes


@every_method
def test_float32_gradient_is_the_float64_one_to_float32_rounding(method):
    """40 eps of float32, one for each step (measured: 7)."""
    v = torch.randn(41, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = []
    for dtype in (torch.float32, torch.float64):
        func, y0 = Net().to(dtype), START.to(dtype).requires_grad_()
        alpha = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
        y = pfde.fdeint(func, y0, times(40).to(dtype), alpha, method=method, history=pfde.SumOfExponentials(1e-7))
        assert y.dtype == dtype
        bars = torch.autograd.grad((v.to(dtype) * y).sum(), [y0, *func.parameters(), alpha])
        found.append([y.detach(), *bars])
    for x, ref in zip(*found, strict=True):
        assert float((x - ref).norm() / ref.norm()) <= 40 * torch.finfo(torch.float32).eps


# -- nonuniform grids --------------------------------------------------------------------------------------------------


def nonuniform(kind, steps):
    if kind == "graded":
        return pfde.graded(0.2, 1.4, steps, 2.5)
    h = 10 ** (2 * torch.rand(steps, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    return 0.2 + 1.2 * torch.cat([torch.zeros(1), h.cumsum(0) / h.sum()])


@pytest.mark.parametrize("method", GRIDDED)
@pytest.mark.parametrize("kind", ["graded", "random"])
@pytest.mark.parametrize("history", [pfde.Exact(), HISTORIES[0]], ids=named)
def test_gradient_is_exact_on_nonuniform_grids(method, kind, history):
    store = "graph" if kind == "random" else "state"
    check(method, ORDERS, nonuniform(kind, 17), history, store=store, product=kind == "random")
    if kind == "random":
        implicit = METHODS[method].implicit
        check(method, 0.6, nonuniform(kind, STEPS // 2 + 6 if implicit else STEPS), history, product=not implicit)


@pytest.mark.parametrize("method", GRIDDED)
@pytest.mark.parametrize("history", [pfde.Exact(), SOE], ids=named)
def test_gradient_is_exact_on_nonuniform_grids_of_few_steps(method, history):
    for steps, alpha in ((2, ORDERS), (3, 1.0), (3, ORDERS), (4, ORDERS)):
        check(method, alpha, nonuniform("random", steps), history)


@pytest.mark.parametrize("history", [pfde.Exact(), SOE], ids=named)
def test_taylor_slopes_on_a_nonuniform_grid(history):
    slopes = testing.taylor_slopes(Net(), START, nonuniform("graded", 35), 0.6, method="trapezoid", history=history)
    assert slopes.worst <= 0.02, slopes


# -- against dense matrices --------------------------------------------------------------------------------------------


def compressed(history, original):
    """`oracle.matrices` with the kernels that the nodes and weights of this history stand for."""

    def forget(compression, lags):
        """The compressed kernel from the exact one, (N+1,)."""
        window, nodes = compression.window, compression.nodes.numpy()
        weights = compression.weights(torch.from_numpy(lags)[None, :, None])[0, :, 0].numpy()
        k = np.arange(len(lags))
        return np.where(k < window, lags, np.exp(-np.outer((k - window).clip(min=0), nodes)) @ weights)

    def matrices(method, a, h, steps):
        scheme = METHODS[method]
        compression = history.compress(steps, h, scheme.window, scheme.exponents)
        lag = np.subtract.outer(np.arange(steps + 1), np.arange(steps + 1))
        below, found = (lag >= 0) & (np.arange(steps + 1) > 0), []
        for value, slope in original(method, a, h, steps + 1):  # one row more: lag N is in its column 1
            d, d_dot = (np.ascontiguousarray(m.numpy()[-1, :0:-1]) for m in (value, slope))
            M, M_dot = value.numpy()[:-1, :-1].copy(), slope.numpy()[:-1, :-1].copy()
            if scheme.form == "integral":
                kernels = forget(compression, d), forget(compression, d_dot)
            else:  # kappa = -d / d_0 is what is compressed
                kappa, kappa_dot = d / d[0], d_dot / d[0] - d * d_dot[0] / d[0] ** 2
                kappa, kappa_dot = forget(compression, kappa), forget(compression, kappa_dot)
                kernels = d[0] * kappa, d_dot[0] * kappa + d[0] * kappa_dot
            for matrix, kernel in zip((M, M_dot), kernels, strict=True):
                matrix[below] = kernel[lag[below]]
                if scheme.form == "derivative":
                    matrix[:, 0] = -matrix[:, 1:].sum(1)
                elif isinstance(history, pfde.ShortMemory):
                    matrix[compression.window :, 0] = 0.0
            found.append((torch.from_numpy(M), torch.from_numpy(M_dot)))
        return found

    return matrices


def gradient_of(solve, alpha, func):
    y0, alpha = START.clone().requires_grad_(), alpha.clone().requires_grad_()
    y = solve(func, y0, alpha)
    v = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    return y.detach(), *torch.autograd.grad((v * y).sum(), [y0, *func.parameters(), alpha])


def assert_close(found, expected):
    for x, ref in zip(found, expected, strict=True):
        error = float((x - ref).norm() / ref.norm())
        assert error <= RTOL, f"relative error {error:.1e}"


@every_method
@pytest.mark.parametrize("history", [HISTORIES[0], SHORT], ids=named)
def test_gradient_equals_that_of_dense_matrices(monkeypatch, method, history):
    monkeypatch.setattr(oracle, "matrices", compressed(history, oracle.matrices))
    steps = 36
    for alpha in (torch.tensor([0.6], dtype=torch.float64), ORDERS):

        def by_pfde(func, y0, alpha):
            return pfde.fdeint(func, y0, times(steps), alpha, method=method, history=history)

        def dense(func, y0, alpha):
            f = lambda t, y: func(torch.tensor(t, dtype=torch.float64), y)  # noqa: E731
            return oracle.solve(method, f, y0, alpha, 0.2, 1.2 / steps, steps)

        assert_close(gradient_of(by_pfde, alpha, Net()), gradient_of(dense, alpha, Net()))


def test_gradient_on_a_graded_grid_equals_that_of_dense_sums():
    """`euler`: h_n^alpha / Gamma(alpha+1) for the last interval, for all others but the first the exponentials'

    sum_q w_q exp(-s_q (t_n - t_{j+1})) (1 - exp(-s_q h_{j+1})) / s_q."""
    t, history = pfde.graded(0.2, 1.4, 50, 2.5), pfde.SumOfExponentials(1e-4)
    compression = history.compress_intervals(t, METHODS["euler"].exponents)
    s, h = compression.nodes[:, None], t.diff()

    def gamma(x):
        return torch.exp(torch.lgamma(x))

    def dense(func, y0, alpha):
        def weights(a):
            return compression.weights(lambda x: (x ** (a - 1) / gamma(a))[:, None])[:, 0]

        # the weights are linear in the kernel: forward mode is their derivative, and well conditioned
        at = alpha.detach()[0]
        w, w_dot = torch.func.jvp(weights, (at,), (torch.ones_like(at),))
        w = w + w_dot * (alpha - alpha.detach())
        fs = [func(t[0], y0)]
        ys = [y0]
        for n in range(1, len(t)):
            y = y0 + fs[0] * ((t[n] - t[0]) ** alpha - (t[n] - t[1]) ** alpha) / gamma(alpha + 1)
            if n > 1:
                y = y + fs[n - 1] * h[n - 1] ** alpha / gamma(alpha + 1)
            if n > 2:
                B = (w[:, None] * torch.exp(-s * (t[n] - t[2:n])) * -torch.expm1(-s * h[1 : n - 1]) / s).sum(0)
                y = y + (B[:, None] * torch.stack(fs[1 : n - 1])).sum(0)
            ys.append(y)
            fs.append(func(t[n], y))
        return torch.stack(ys)

    def by_pfde(func, y0, alpha):
        return pfde.fdeint(func, y0, t, alpha, method="euler", history=history)

    alpha = torch.tensor([0.6], dtype=torch.float64)
    assert_close(gradient_of(by_pfde, alpha, Net()), gradient_of(dense, alpha, Net()))
