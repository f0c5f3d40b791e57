"""The weights of pfde.caputo.intervals on grids of all kinds against their integrals in 80 digits; graded grids.

Tolerances. A rectangle is a product of a power, an expm1 of a log1p, and 1/Gamma, each within 1 or 2 ulp, of arguments
with 2 or 3 roundings (measured: 6e-16, derivatives 9e-15). A hat is a difference of two such terms, which loses at most
2/v = 16 (measured: 8e-15, derivatives 1e-14). Allowed: 1e-14 for values, 1e-13 for derivatives, these relative to
max(|w'|, |w|), which leaves out log t, of size 25 here. Sums of such weights, and quotients of two: 2e-14.
"""

import math
import random
from functools import cache
from itertools import pairwise

import mpmath
import pytest
import torch
from mpmath import mpf

from pfde.caputo import intervals
from pfde.caputo.graded import graded
from pfde.caputo.intervals import quadrature
from pfde.caputo.schemes import METHODS

ALPHAS = [0.01, 0.3, 0.5, 0.9, 0.999, 1.0]
N = 64
RULES = ["left", "right", "linear"]
every_rule = pytest.mark.parametrize("rule", RULES)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def random_steps(count, decades):
    """Steps of sizes spread over this many decades."""
    h = 10 ** (decades * torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return torch.cat([tensor([0.0]), h.cumsum(0) / 10**decades])


GRIDS = {
    "uniform": 3 + 0.1 * torch.arange(N + 1, dtype=torch.float64),
    "graded 2": graded(0.0, 1.0, N, 2),
    "graded 5": graded(0.0, 2.0, N, 5),
    "decreasing": 1 - graded(0.0, 1.0, N, 3).flip(0),
    "six decades": random_steps(N, 6),
    "one step": tensor([1.0, 1.5]),
    "long": torch.linspace(0, 1, 10001, dtype=torch.float64),
    "long, six decades": random_steps(10000, 6),
}
every_grid = pytest.mark.parametrize("name", GRIDS)


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(80):
        yield


def forward_derivative(function, alpha):
    return torch.func.jvp(function, (alpha,), (torch.ones_like(alpha),))


def integral(a, b, alpha, values):
    """int u^(alpha-1) p(u) du / Gamma(alpha) over [a, b], for the linear p with these values at a and b."""
    first, last = values
    mass = (b**alpha - (a**alpha if a else 0)) / alpha
    moment = (b ** (alpha + 1) - a ** (alpha + 1)) / (alpha + 1)
    return (first * (b * mass - moment) + last * (moment - a * mass)) / ((b - a) * mpmath.gamma(alpha))


def exact_weight(rule, t, n, j, alpha):
    """The weight of F_j in row n, j = 0..n, from the exact times t."""
    found = mpf(0)
    if j > 0 and rule != "left":
        found += integral(t[n] - t[j], t[n] - t[j - 1], alpha, (1, 1 if rule == "right" else 0))
    if j < n and rule != "right":
        found += integral(t[n] - t[j + 1], t[n] - t[j], alpha, (1 if rule == "left" else 0, 1))
    return found


@cache
def sample(steps):
    """Pairs (n, j): the edges, and lags of every size."""
    chance = random.Random(1)
    pairs = {(1, 0), (1, 1), (steps, 0), (steps, steps)}
    for _ in range(45 if steps > 1 else 0):
        n = chance.randint(2, steps)
        j = max(0, n - int(10 ** chance.uniform(0, math.log10(steps))))
        pairs |= {(n, j), (n, n - 1), (n, 0)} if chance.random() < 0.1 else {(n, j)}
    return sorted(pairs)


@every_rule
@every_grid
def test_weights_and_their_derivatives_equal_the_integrals(name, rule):
    """Entry by entry, those of a block in the middle of a larger one; all orders at once, forward mode."""
    times, alpha = GRIDS[name], tensor(ALPHAS)
    steps = len(times) - 1
    t = [mpf(time) for time in times.tolist()]
    q = quadrature(rule, times)
    start, local, near = (forward_derivative(f, alpha) for f in (q.start, q.local, q.near))
    whole = forward_derivative(lambda a: q.block(a, 1, steps + 1, 1, steps + 1), alpha) if steps <= N else None
    worst = {"value": (0.0, None), "derivative": (0.0, None)}
    for n, j in sample(steps):
        if j == 0 or j == n:
            found = [part[n] for part in (start if j == 0 else local)]
        elif whole is not None:
            found = [part[n - 1, j - 1] for part in whole]
        else:
            n0, j0 = max(1, n - 20), max(1, j - 20)

            def block(a, n0=n0, j0=j0, n=n, j=j):
                return q.block(a, n0, min(n + 5, steps + 1), j0, j + 5)[n - n0, j - j0]

            found = forward_derivative(block, alpha)
        for i, a in enumerate(map(mpf, ALPHAS)):
            e = mpf(10) ** -20
            value = exact_weight(rule, t, n, j, a)
            slope = (exact_weight(rule, t, n, j, a + e) - exact_weight(rule, t, n, j, a - e)) / (2 * e)
            if value == 0:
                assert found[0][i] == 0 and found[1][i] == 0, (n, j)
                continue
            errors = {
                "value": float(abs(found[0][i].item() - value) / value),
                "derivative": float(abs(found[1][i].item() - slope) / max(abs(slope), value)),
            }
            for what, error in errors.items():
                if not error <= worst[what][0]:
                    worst[what] = (error, (n, j, ALPHAS[i]))
            if j == n - 1 and j > 0:
                assert abs(near[0][n, i].item() - value) <= 1e-14 * value
                assert abs(near[1][n, i].item() - slope) <= 1e-13 * max(abs(slope), value)
    print(name, rule, worst)
    assert worst["value"][0] <= 1e-14 and worst["derivative"][0] <= 1e-13, worst


@pytest.mark.smoke
@pytest.mark.parametrize("method", [name for name, scheme in METHODS.items() if scheme.rules])
def test_on_a_uniform_grid_they_are_the_uniform_weights(method):
    """Of every scheme that names its quadratures. The grid's own rounding, lag * 1e-16 in t, is common to both sides
    only where h is a power of 2; then both are within 1e-14 of the integral."""
    scheme, alpha, steps, h = METHODS[method], tensor(ALPHAS), 300, 2.0**-5
    weights = scheme.weights(alpha, h, steps)
    assert len(scheme.rules) == scheme.channels
    for channel, rule in enumerate(scheme.rules):
        q = quadrature(rule, h * torch.arange(steps + 1, dtype=torch.float64))
        block = q.block(alpha, 1, steps + 1, 1, steps + 1)
        for n in (2, 3, 17, 18, 19, 150, steps):
            uniform = weights.kernel[channel, 1:n].flip(0)
            torch.testing.assert_close(block[n - 1, : n - 1], uniform, rtol=2e-14, atol=0)
        if weights.start is None:
            assert not q.start(alpha).any()
        else:
            torch.testing.assert_close(q.start(alpha)[1:], weights.start[channel, 1:], rtol=2e-14, atol=0)
        if channel == 0:
            local = weights.local.expand(steps, -1)
            torch.testing.assert_close(q.local(alpha)[1:], local, rtol=2e-14, atol=0)
        torch.testing.assert_close(
            q.near(alpha)[2:], weights.kernel[channel, 1].expand(steps - 1, -1), rtol=2e-14, atol=0
        )
    assert METHODS["pece"].rules == ("linear", "left")
    assert not METHODS["gl"].rules and not METHODS["l1"].rules and not METHODS["bdf2"].rules


@pytest.mark.smoke
@every_rule
@pytest.mark.parametrize("name", ["uniform", "graded 5", "decreasing", "six decades"])
def test_constants_and_linear_functions_are_integrated_exactly(name, rule):
    """sum_j (t_j - t_0)^p w_nj = Gamma(p+1) (t_n - t_0)^(p+alpha) / Gamma(p+1+alpha), p = 0, for hats 1 too."""
    t, alpha = GRIDS[name], tensor(ALPHAS)
    q = quadrature(rule, t)
    elapsed = (t - t[0])[:, None]
    for p in (0, 1) if rule == "linear" else (0,):
        f = elapsed**p
        rows = torch.einsum("njg,jk->ng", q.block(alpha, 0, N + 1, 1, N + 1), f[1:])
        rows = rows + q.start(alpha) * f[0] + q.local(alpha) * f
        exact = elapsed ** (p + alpha) * tensor([float(mpmath.rgamma(p + 1 + mpf(a))) for a in ALPHAS])
        torch.testing.assert_close(rows[1:], exact[1:], rtol=2e-14, atol=0)
        assert not rows[0].any()


@every_rule
def test_blocks_are_parts_of_one_triangle(rule):
    """Any block is the same part of the whole, to the rounding of a tile's shorter series; zero on and above the
    diagonal; its first subdiagonal is `near`, its column 0 `start`; one order at a time or all together."""
    steps = 700
    t, alpha = random_steps(steps, 3), tensor([0.2, 0.7, 1.0])
    q = quadrature(rule, t)
    whole = q.block(alpha, 0, steps + 1, 0, steps + 1)
    assert whole.shape == (steps + 1, steps + 1, 3) and whole.is_contiguous()
    above = torch.ones(steps + 1, steps + 1, dtype=torch.bool).triu()
    assert not whole[above].any()
    assert (whole[~above][:, 1] > 0).all() or rule == "right"  # its column 0 is zero
    torch.testing.assert_close(whole[:, 0], q.start(alpha), rtol=1e-14, atol=0)
    torch.testing.assert_close(whole.diagonal(-1).T[1:], q.near(alpha)[2:], rtol=1e-14, atol=0)
    for n0, n1, j0, j1 in [(1, 20, 1, 20), (500, 701, 30, 333), (699, 700, 1, 701), (5, 5, 1, 9), (9, 12, 50, 60)]:
        block = q.block(alpha, n0, n1, j0, j1)
        assert block.shape == (n1 - n0, j1 - j0, 3)
        torch.testing.assert_close(block, whole[n0:n1, j0:j1], rtol=1e-14, atol=0)
    for i in range(3):
        torch.testing.assert_close(q.block(alpha[i : i + 1], 0, 701, 0, 701)[..., 0], whole[..., i], rtol=1e-14, atol=0)


@every_rule
def test_moments_give_the_weights_of_a_sum_of_exponentials(rule):
    """K(u) = sum_q w_q exp(-s_q u), integrated analytically in 80 digits against the rule's functions.

    An entry is a sum of at most two positive products of exponentials (s h to half an ulp moves exp(-s h) by up to
    s h * 1e-16, s h < 40 here: 5e-15) and functions phi (2e-15): 1e-14.
    """
    times = GRIDS["six decades"] / GRIDS["six decades"][-1] * 3
    t = [mpf(time) for time in times.tolist()]
    s = tensor([0.0, 1e-12, 1e-3, 0.4, 1.0, 3.0, 11.0, 90.0])
    w = tensor([0.3, 0.2, 1.0, 0.5, 2.0, 0.1, 0.7, 0.9])
    q = quadrature(rule, times)
    g = q.moments(s, 1, N)
    assert g.shape == (len(s), N - 1)
    torch.testing.assert_close(q.moments(s, 7, 9), g[:, 6:8], rtol=1e-15, atol=0)

    def piece(s, start, end, values):
        """int exp(-s (T - x)) p(x) dx over [start, end], T = end, for the linear p with these values at the ends."""
        h = end - start
        if s == 0:
            return h * (values[0] + values[1]) / 2
        decay = mpmath.exp(-s * h)
        mass = (1 - decay) / s
        slope = (1 - decay * (1 + s * h)) / s**2 / h  # int exp(-s v) v / h dv, v = end - x
        return values[1] * (mass - slope) + values[0] * slope

    exact = mpmath.matrix(len(s), N)
    for i, rate in enumerate(map(mpf, s.tolist())):
        for j in range(1, N):
            if rule != "left":
                values = (1, 1) if rule == "right" else (0, 1)
                exact[i, j] += mpmath.exp(-rate * (t[j + 1] - t[j])) * piece(rate, t[j - 1], t[j], values)
            if rule != "right":
                exact[i, j] += piece(rate, t[j], t[j + 1], (1, 1) if rule == "left" else (1, 0))
            assert abs(g[i, j - 1].item() - exact[i, j]) <= 1e-14 * exact[i, j], (i, j)
    n = N
    for j in (1, 5, 30, N - 2):
        lag = times[n] - times[j + 1]
        found = (w * torch.exp(-s * lag) * g[:, j - 1]).sum().item()
        kernel = sum(
            mpf(w[i].item()) * mpmath.exp(-mpf(s[i].item()) * (t[n] - t[j + 1])) * exact[i, j] for i in range(len(s))
        )
        assert abs(found - kernel) <= 1e-13 * kernel


def test_integrals_of_exponentials():
    """phi_0, phi_a, phi_b on both sides of the switch at 1 and everywhere else."""
    chance = random.Random(2)
    x = [0.0, 5e-324, 1 - 2.0**-53, 1.0, 1 + 2.0**-52, 700.0, 1e5]
    x += [10 ** chance.uniform(-20, 4) for _ in range(300)] + [chance.uniform(0.5, 2) for _ in range(300)]
    found = [f(tensor(x)).tolist() for f in (intervals.phi_0, intervals.phi_a, intervals.phi_b)]
    for i, point in enumerate(map(mpf, x)):
        with mpmath.workdps(80 if point > 1e-30 else 800):
            decay = mpmath.exp(-point)
            exact = (
                (1 - decay) / point if point else 1,
                (1 - decay * (1 + point)) / point**2 if point else mpf(0.5),
                (point - 1 + decay) / point**2 if point else mpf(0.5),
            )
            for values, e in zip(found, exact, strict=True):
                assert abs(values[i] - e) <= 2e-15 * e, x[i]
    huge = tensor([1e200, 1e308])
    torch.testing.assert_close(intervals.phi_b(huge), 1 / huge, rtol=2e-15, atol=0)
    assert not intervals.phi_a(huge).any()


@every_rule
@pytest.mark.parametrize("part", ["block", "start", "local", "near"])
def test_reverse_mode_is_the_transpose_of_forward_mode(rule, part):
    """The same products of N^2/2 derivatives, summed in different order: 1e-13 of the sum of their sizes."""
    q = quadrature(rule, GRIDS["six decades"])
    alpha = tensor(ALPHAS).requires_grad_()

    def table(a):
        return q.block(a, 0, N + 1, 0, N + 1) if part == "block" else getattr(q, part)(a)

    value, derivative = forward_derivative(table, alpha.detach())
    cotangent = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = table(alpha)
    torch.testing.assert_close(found, value, rtol=1e-14, atol=0)
    if found.requires_grad:
        (reverse,) = torch.autograd.grad(found, alpha, cotangent)
    else:
        assert (rule, part) == ("left", "local")
        reverse = torch.zeros_like(alpha)
    products = (cotangent * derivative).flatten(0, -2)
    assert torch.isfinite(reverse).all()
    assert ((reverse - products.sum(0)).abs() <= 1e-13 * products.abs().sum(0)).all()


@every_rule
def test_second_derivatives_agree_at_the_end_of_the_range_too(rule):
    q = quadrature(rule, GRIDS["graded 2"])

    def loss(alpha):
        return (1 + q.block(alpha, 1, N + 1, 0, N)).square().sum()

    alpha = tensor([0.3, 1.0])
    by_reverse = torch.autograd.functional.hessian(loss, alpha)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacfwd(loss))(alpha), by_reverse, rtol=1e-10, atol=1e-10)


def test_steps_of_any_size_within_reason():
    """Grading 100 (r = 1/alpha at alpha = 0.01): a first step of 1e-181, finite in every derivative, exact row sums."""
    t, alpha = graded(0.0, 1.0, N, 100), tensor([0.01, 0.5]).requires_grad_()
    exact = t[1:, None] ** alpha.detach() * tensor([float(mpmath.rgamma(1 + mpf(a))) for a in alpha.tolist()])
    for rule in RULES:
        q = quadrature(rule, t)
        block = q.block(alpha, 1, N + 1, 0, N + 1)
        rows = block.sum(1) + q.local(alpha)[1:]
        torch.testing.assert_close(rows.detach(), exact, rtol=1e-13, atol=0)
        (slope,) = torch.autograd.grad(rows.sum(), alpha)
        assert torch.isfinite(slope).all()


def solve(rule, t, alpha, rate):
    """y of D^alpha y = rate * y, y(t_0) = 1, by the implicit method of this rule, row by row."""
    steps = len(t) - 1
    order = tensor([alpha])
    q = quadrature(rule, t)
    B = q.block(order, 0, steps + 1, 0, steps + 1)[..., 0]
    local = q.local(order)[:, 0]
    y = torch.ones(steps + 1, dtype=torch.float64)
    for n in range(1, steps + 1):
        y[n] = (1 + rate * (B[n, :n] @ y[:n])) / (1 - rate * local[n])
    return y


def mittag_leffler(z, alpha):
    """E_alpha(z) for |z| <= 1, by its series."""
    return sum(z**k / math.gamma(1 + alpha * k) for k in range(int(160 / alpha)) if alpha * k < 100)


@pytest.mark.parametrize(
    "rule, alpha, r, order",
    [
        ("linear", 0.6, 1, 1.2),
        ("linear", 0.6, 1 / 0.6, 2.0),
        ("linear", 0.4, 1 / 0.4, 2.0),
        ("linear", 0.6, 2.5, 2.0),
        ("right", 0.3, 1, 0.6),
        ("right", 0.3, 1 / 0.3, 1.0),
    ],
)
def test_grading_restores_the_order_in_the_maximum_norm(rule, alpha, r, order):
    """min(p, 2 alpha r), as the docstring of pfde.caputo.graded says, for a solution that behaves like t^alpha at 0.

    The rate from N = 256 to 512 comes to within 0.15 of it (measured: 0.13 at most, and shrinking). Without the grading
    it would be less by 0.4 at least.
    """
    errors = []
    for steps in (128, 256, 512):
        t = graded(0.0, 1.0, steps, r)
        exact = tensor([mittag_leffler(-(time**alpha), alpha) for time in t.tolist()])
        errors.append((solve(rule, t, alpha, -1.0) - exact).abs().max().item())
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert abs(rates[-1] - order) <= 0.15, f"errors {errors}, rates {rates}"


@pytest.mark.smoke
def test_graded_grid():
    t = graded(1.0, 3.0, 4, 2)
    assert t.dtype == torch.float64 and t.tolist() == [1.0, 1.125, 1.5, 2.125, 3.0]
    assert torch.equal(graded(0, 0.3, 7, 1)[[0, -1]], tensor([0.0, 0.3]))
    assert graded(0.1, 0.7, 1, 3.3).tolist() == [0.1, 0.7]
    fine = graded(0.0, 0.1, 1000, 7.3)
    assert fine[-1] == 0.1 and (fine.diff() > 0).all() and (fine.diff().diff() > 0).all()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0.0, 1.0, 0, 2.0), ValueError, "N must be at least 1.*got 0"),
        ((0.0, 1.0, 4.0, 2.0), TypeError, r"N must be an integer.*got 4\.0; use int"),
        ((0.0, 1.0, True, 2.0), TypeError, "N must be an integer"),
        ((0.0, 1.0, 4, 0.5), ValueError, r"r must be at least 1: got 0\.5; r = 1 is"),
        ((0.0, 1.0, 4, math.inf), ValueError, "r must be finite: got inf"),
        ((0.0, 1.0, 4, "2"), TypeError, "r must be a number: got '2'"),
        ((0.0, math.nan, 4, 2.0), ValueError, "T must be finite"),
        ((1.0, 1.0, 4, 2.0), ValueError, "T must be greater than t0.*t0=1, T=1"),
        ((-1e308, 1e308, 4, 2.0), ValueError, "T must be greater than t0, by a finite amount"),
        ((1.0, 2.0, 100, 9), ValueError, "r=9 with N=100.*reduce r or N, or put t0 at 0"),
        ((0.0, 1.0, 1000, 200.0), ValueError, "r=200 with N=1000"),
    ],
)
def test_graded_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        graded(*arguments)


@pytest.mark.parametrize(
    "rule, t, error, message",
    [
        ("middle", tensor([0.0, 1.0]), ValueError, "rule must be one of left, right, linear: got 'middle'"),
        ("left", [0.0, 1.0], TypeError, "t must be a float64 tensor: got list"),
        ("left", torch.arange(3.0), TypeError, r"t must be a float64 tensor: got torch\.float32"),
        ("left", tensor([0.0]), ValueError, r"at least two times: got shape \(1,\)"),
        ("left", tensor([0.0, 1.0, 1.0]), ValueError, r"strictly increasing: got t\[1\]=1, t\[2\]=1"),
        ("left", tensor([0.0, math.inf]), ValueError, "t must be finite"),
        ("linear", tensor([0.0, 1e-290, 1.0]), ValueError, "every step of t must be at least 1e-280.*reduce"),
        ("left", tensor([0.0, 1.0]).requires_grad_(), ValueError, "t requires a gradient.*detach"),
    ],
)
def test_quadrature_says_what_is_wrong(rule, t, error, message):
    with pytest.raises(error, match=message):
        quadrature(rule, t)


def test_a_quadrature_is_frozen():
    q = quadrature("linear", tensor([0.0, 1.0]))
    assert q.steps == 1
    with pytest.raises(AttributeError):
        q.t = q.h
