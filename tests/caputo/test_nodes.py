"""Sums of exponentials: counts of nodes, the certificate over every lag, linearity and derivative of the weights."""

import math

import pytest
import torch
from torch.autograd import forward_ad

from pfde.caputo.history.nodes import (
    Fit,
    certificate,
    certificate_continuous,
    exponential_nodes,
    sample_distances,
    sample_points,
)
from pfde.caputo.schemes import METHODS

ALPHAS = torch.tensor([0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999, 1.0], dtype=torch.float64)
TOLERANCES = [1e-3, 1e-6, 1e-10, 1e-13]
WINDOWS = {"euler": 2, "pece": 2, "beuler": 2, "trapezoid": 2, "gl": 4, "l1": 3, "bdf2": 20}
EXPONENTS = {name: (0.0, 1.0) if scheme.form == "integral" else (1.0, 2.0) for name, scheme in METHODS.items()}
every_method = pytest.mark.parametrize("name", METHODS)


def kernel(name, steps, alpha=ALPHAS):
    return METHODS[name].weights(alpha, 1.0, steps).kernel


def compress(name, steps, tolerance, exponents=None):
    """Window, nodes per lag, sampled lags and the fit of a method."""
    n0 = WINDOWS[name]
    exponents = exponents or EXPONENTS[name]
    nodes = exponential_nodes(steps / n0, tolerance, exponents) / n0
    lags = sample_points(n0, steps)
    fit = Fit(nodes, (lags - n0).double(), lags.double() ** (sum(exponents) / 2))
    return n0, nodes, lags, fit


def power_kernel(alpha):
    return lambda x: x[:, None] ** (alpha - 1) * torch.exp(-torch.lgamma(alpha))


def brute_force(kappa, n0, nodes, weights):
    k = torch.arange(n0, kappa.shape[1], dtype=torch.float64)
    error = (torch.exp(-(k - n0)[:, None] * nodes) @ weights - kappa[:, n0:]).abs()
    return float(torch.where(error == 0, 0.0, error / kappa[:, n0:].abs()).max())


# shared/numerics.md's table at alpha = 0.5: relative error on [1, N] for N = 1e2 .. 1e6.
TAILORED = {1e-6: (13, 17, 21, 25, 28), 1e-10: (21, 27, 33, 39, 45), 1e-13: (27, 35, 42, 50, 57)}


@pytest.mark.parametrize("tolerance", TAILORED)
def test_counts_for_one_order_are_those_of_the_tailored_rule(tolerance):
    counts = [len(exponential_nodes(10.0**p, tolerance, (0.5, 0.5))) for p in range(2, 7)]
    assert all(expected - 2 <= q <= expected for q, expected in zip(counts, TAILORED[tolerance], strict=True)), counts


def test_counts_for_all_orders_cost_a_few_nodes_more():
    # A whole range of orders costs a step Delta for its largest exponent and a slow end for all: measured 8 to 13 %
    # over alpha = 0.5 for (0, 1), 18 to 23 % for (1, 2), whose largest exponents also need more when alone.
    for tolerance in TAILORED:
        for p in range(3, 7):
            one, integral, derivative = (
                len(exponential_nodes(10.0**p, tolerance, e)) for e in ((0.5, 0.5), (0.0, 1.0), (1.0, 2.0))
            )
            assert integral <= 1.13 * one + 1 and derivative <= 1.25 * one + 1, (one, integral, derivative)


def test_nodes_are_increasing_positive_and_the_callers_own():
    nodes = exponential_nodes(1e4, 1e-8, (0.0, 1.0))
    again = exponential_nodes(1e4, 1e-8, (0.0, 1.0))
    assert nodes.dtype == torch.float64 and bool((nodes.diff() > 0).all()) and nodes[0] > 0
    nodes.zero_()
    assert torch.equal(exponential_nodes(1e4, 1e-8, (0.0, 1.0)), again)


@pytest.mark.parametrize(
    ("ratio", "tolerance", "exponents", "named"),
    [
        (0.5, 1e-3, (0.0, 1.0), "ratio"),
        (math.inf, 1e-3, (0.0, 1.0), "ratio"),
        (10.0, 0.0, (0.0, 1.0), "tolerance"),
        (10.0, math.nan, (0.0, 1.0), "tolerance"),
        (10.0, 1e-3, (1.0, 0.0), "exponents"),
        (10.0, 1e-3, (0.0, 2.5), "exponents"),
    ],
)
def test_arguments_out_of_range_are_named(ratio, tolerance, exponents, named):
    with pytest.raises(ValueError, match=f"^{named} must be"):
        exponential_nodes(ratio, tolerance, exponents)


def test_samples_are_all_first_lags_then_geometric():
    for n0, steps in ((1, 1), (3, 3), (2, 10), (16, 17), (2, 10**6)):
        lags = sample_points(n0, steps)
        assert lags.dtype == torch.int64 and lags[0] == n0 and lags[-1] == steps and bool((lags.diff() >= 0).all())
    assert torch.equal(lags.unique()[:25], torch.arange(2, 27)) and len(lags) < 600
    with pytest.raises(ValueError, match=r"n0 must be in 1\.\.steps = 4: got 5"):
        sample_points(5, 4)


@every_method
@pytest.mark.parametrize("tolerance", TOLERANCES)
def test_every_lag_of_every_order_is_within_the_tolerance(name, tolerance):
    for steps in (10**2, 10**3, 10**4):
        n0, nodes, lags, fit = compress(name, steps, tolerance)
        kappa = kernel(name, steps)
        error = certificate(kappa, n0, nodes, fit.weights(kappa[:, lags]))
        assert error <= tolerance, f"N = {steps}: {error:.2e}"


@pytest.mark.parametrize(("name", "tolerance"), [("euler", 1e-10), ("trapezoid", 1e-13), ("gl", 1e-3), ("bdf2", 1e-13)])
def test_a_million_lags(name, tolerance):
    # Rounding: rows spread over 1e3 (euler) and 1e9 (bdf2) in size, and a row's own accuracy is asked for.
    steps, alpha = 10**6, ALPHAS[[0, 4, 9]]
    n0, nodes, lags, fit = compress(name, steps, tolerance)
    kappa = kernel(name, steps, alpha)
    assert certificate(kappa, n0, nodes, fit.weights(kappa[:, lags])) <= tolerance


@every_method
def test_no_length_and_no_tolerance_is_missed(name):
    # The number of nodes jumps with both, and is smallest just before: 40 of the 11 000 cases nodes.py reports.
    generator = torch.Generator().manual_seed(1)
    for u, v in torch.rand(40, 2, dtype=torch.float64, generator=generator).tolist():
        steps, tolerance = int(30 * 600**u), 10 ** (-2 - 11 * v)
        n0, nodes, lags, fit = compress(name, steps, tolerance)
        kappa = kernel(name, steps)
        error = certificate(kappa, n0, nodes, fit.weights(kappa[:, lags]))
        assert error <= tolerance, f"N = {steps}, tolerance {tolerance:.2e}: {error:.2e}"


@every_method
def test_short_histories(name):
    n0 = WINDOWS[name]
    for steps in (n0, n0 + 1, n0 + 5, 2 * n0 + 3):
        _, nodes, lags, fit = compress(name, steps, 1e-10)
        kappa = kernel(name, steps)
        assert certificate(kappa, n0, nodes, fit.weights(kappa[:, lags])) <= 1e-10


@pytest.mark.parametrize("name", ["trapezoid", "pece", "l1"])
@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.95])
def test_nodes_made_for_one_order(name, alpha):
    # pece and l1 decay like their trapezoid and derivative exponents, 1 - alpha and 1 + alpha
    beta = 1 - alpha if METHODS[name].form == "integral" else 1 + alpha
    n0, nodes, lags, fit = compress(name, 1000, 1e-10, (beta, beta))
    kappa = kernel(name, 1000, torch.tensor([alpha], dtype=torch.float64))
    assert certificate(kappa, n0, nodes, fit.weights(kappa[:, lags])) <= 1e-10
    assert len(nodes) <= 30


@pytest.mark.smoke
@pytest.mark.parametrize("steps", [2, 3, 40, 1000, 70_001])
def test_certificate_is_the_largest_relative_error(steps):
    # Weights with an error of 1e-3, so that rounding (1e-15 of kappa) shows at 1e-12 of the certificate.
    n0, nodes, lags, fit = compress("pece", steps, 1e-3)
    kappa = kernel("pece", steps)
    weights = fit.weights(kappa[:, lags]) * 1.001
    assert certificate(kappa, n0, nodes, weights) == pytest.approx(brute_force(kappa, n0, nodes, weights), rel=1e-10)


@pytest.mark.parametrize("lag", [2, 3, 1025, 4095, 5000])
def test_certificate_sees_one_wrong_lag(lag):
    n0, nodes, lags, fit = compress("euler", 5000, 1e-10)
    kappa = kernel("euler", 5000)
    weights = fit.weights(kappa[:, lags])
    kappa = kappa.clone()
    kappa[0, lag, 3] *= 1.5
    assert certificate(kappa, n0, nodes, weights) == pytest.approx(1 / 3, rel=1e-9)


def test_certificate_of_zeros():
    kappa, nodes = torch.zeros(1, 9, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    assert certificate(kappa, 2, nodes, zero) == 0
    assert certificate(kappa, 2, nodes, zero + 1e-30) == math.inf
    assert certificate(kappa + 1, 2, nodes, zero + math.nan) == math.inf
    assert certificate(kappa, 9, nodes, zero + 1) == 0  # no lag beyond the window


@pytest.mark.parametrize("name", ["gl", "l1", "bdf2"])
def test_at_order_one_a_derivative_has_no_memory(name):
    one = torch.ones(1, dtype=torch.float64)
    n0, nodes, lags, fit = compress(name, 1000, 1e-6)
    kappa = kernel(name, 1000, one)
    weights = fit.weights(kappa[:, lags])
    assert bool((weights == 0).all()) and certificate(kappa, n0, nodes, weights) == 0
    # Just below, the kernel is 1e-12 k^-2: relative accuracy does not suffer.
    kappa = kernel(name, 1000, one - 1e-12)
    assert certificate(kappa, n0, nodes, fit.weights(kappa[:, lags])) <= 1e-6


@pytest.mark.parametrize("name", ["euler", "beuler", "trapezoid"])
def test_at_order_one_an_integral_is_a_constant(name):
    n0, nodes, lags, fit = compress(name, 10**4, 1e-10)
    kappa = kernel(name, 10**4, torch.ones(1, dtype=torch.float64))
    weights = fit.weights(kappa[:, lags])
    assert certificate(kappa, n0, nodes, weights) <= 1e-10
    assert float(weights.sum()) == pytest.approx(1, abs=1e-10)


@every_method
def test_weights_do_not_cancel(name):
    # The largest measured is 4.6. Float32 histories lose that factor at most. (At 1e-13, of no use to them, 33.)
    for tolerance in (1e-2, 1e-3, 1e-6, 1e-8, 1e-10, 1e-12):
        for steps in (100, 1000, 10_000):
            n0, _, lags, fit = compress(name, steps, tolerance)
            kappa = kernel(name, steps)[..., :-1]  # derivative kernels vanish at alpha = 1
            growth = float((fit.weights(kappa[:, lags]).abs().sum(1) / kappa[:, n0].abs()).max())
            assert growth <= 6, f"tolerance {tolerance:g}, N = {steps}: {growth:.2f}"


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["trapezoid", "pece", "l1", "bdf2"])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-10])
def test_weights_are_linear_in_the_kernel(name, tolerance):
    _, _, lags, fit = compress(name, 1000, tolerance)
    x = kernel(name, 1000)[:, lags]
    y = (lags**-0.8 * lags.log())[None, :, None] * x[:, :, :1].sign()
    both = fit.weights(2 * x - 3 * y)
    parts = 2 * fit.weights(x) - 3 * fit.weights(y)
    # W is determined to 1e-16 times the condition number only, its sum of exponentials to rounding, at each lag.
    gap = (fit.evaluate(both) - fit.evaluate(parts)).abs()
    assert bool((gap <= 1e-13 * (2 * x.abs() + 3 * y.abs())).all())
    assert torch.equal(fit.weights(-4 * x), -4 * fit.weights(x))


@every_method
@pytest.mark.parametrize("tolerance", [1e-3, 1e-10])
def test_derivative_of_the_compressed_kernel(name, tolerance):
    """d/dalpha (P kappa) = P kappa', forward and reverse mode, against differences of the compressed kernel itself."""
    n0, nodes, lags, fit = compress(name, 1000, tolerance)
    alpha = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def weights(a):
        return fit.weights(kernel(name, 1000, a)[:, lags])

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(alpha, torch.ones_like(alpha))
        kappa_dot = forward_ad.unpack_dual(kernel(name, 1000, dual)).tangent
        W_dot = forward_ad.unpack_dual(weights(dual)).tangent
    # The same linear map: not a bit lost.
    assert torch.equal(W_dot, fit.weights(kappa_dot[:, lags]))
    # Five points, step 1e-3: truncation 1e-12 f^(5)/30 with logarithms of up to ln(1000)^5 = 1.6e4, rounding 1e-12.
    e = 1e-3
    stencil = [(1, 8), (2, -1), (-1, -8), (-2, 1)]
    difference = sum(c * fit.evaluate(weights(alpha + j * e)) for j, c in stencil) / (12 * e)
    scale = kernel(name, 1000, alpha)[:, lags].abs() + kappa_dot[:, lags].abs()
    assert float(((fit.evaluate(W_dot) - difference).abs() / scale).max()) < 1e-8
    # And it approximates kappa' about as well as W does kappa: the two measures differ by a logarithm.
    k = torch.arange(n0, 1001, dtype=torch.float64)[:, None]
    error = (torch.exp(-(k - n0) * nodes) @ W_dot - kappa_dot[:, n0:]).abs()
    assert bool((error <= 2 * tolerance * (kappa_dot[:, n0:].abs() + kernel(name, 1000, alpha)[:, n0:].abs())).all())


def test_reverse_mode_is_the_transpose():
    # Only at a loose tolerance: an arbitrary cotangent of W is magnified by 1 / (smallest singular value).
    _, _, lags, fit = compress("bdf2", 1000, 1e-3)
    values = kernel("bdf2", 1000)[:, lags].requires_grad_()
    tangent = torch.randn(values.shape, dtype=torch.float64) / lags[:, None] ** 1.5
    W_bar = torch.randn(1, len(fit.weights(values)[0]), len(ALPHAS), dtype=torch.float64)
    (values_bar,) = torch.autograd.grad((W_bar * fit.weights(values)).sum(), values)
    assert float((values_bar * tangent).sum()) == pytest.approx(float((W_bar * fit.weights(tangent)).sum()), rel=1e-8)


@pytest.mark.smoke
@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("ratio", [1.0, 2.0, 1e2, 1e6])
def test_continuous_power_kernel(tolerance, ratio):
    x = sample_distances(ratio)
    nodes = exponential_nodes(ratio, tolerance, (0.0, 1.0))
    weights = Fit(nodes, x, x**0.5).weights(power_kernel(ALPHAS)(x))
    found = certificate_continuous(power_kernel(ALPHAS), ratio, nodes, weights)
    assert found <= tolerance
    # The grid resolves the error: 20 000 random distances find nothing larger. Evaluation rounds at 1e-15 or so.
    generator = torch.Generator().manual_seed(7)
    at = torch.exp(torch.rand(20_000, dtype=torch.float64, generator=generator) * math.log(ratio))
    exact = power_kernel(ALPHAS)(at)
    error = float(((torch.exp(-at[:, None] * nodes) @ weights - exact) / exact).abs().max())
    assert error <= 1.01 * found + 5e-15


def test_an_unreachable_tolerance_shows_in_the_certificate():
    n0, nodes, lags, fit = compress("trapezoid", 10**4, 1e-16)
    kappa = kernel("trapezoid", 10**4)
    assert 1e-16 < certificate(kappa, n0, nodes, fit.weights(kappa[:, lags])) < 1e-13


def test_fit_names_shapes_that_do_not_match():
    s, x = torch.ones(3, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\(3,\), \(5,\), \(4,\)"):
        Fit(s, x, x[:4])
