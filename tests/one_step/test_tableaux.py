"""The tableaux against the order conditions, and the order conditions against what they stand for.

That a condition holds is no proof where the conditions may be wrong. So the trees are counted and satisfy
sum_tau 1 / (gamma sigma) = 1/n (the tree of the exact solution), and every method takes steps of a problem with a known
solution, in 50 digits, whose local errors show the orders of y_{n+1}, of the embedded method and of the dense output.
"""

import gc
import importlib
import sys
from collections import Counter
from dataclasses import replace
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import cache
from math import factorial, prod

import mpmath
import numpy as np
import pytest
from mpmath import mpf

from pfde import one_step
from pfde.one_step import tableaux
from pfde.one_step.tableaux import ADDITIVE, TABLEAUX, AdditiveTableau, Tableau
from pfde.one_step.tableaux.rooted_trees import dense_residuals, elementary_weights, residuals, rooted_trees

EXPLICIT = [
    *("euler", "midpoint", "heun2", "ralston", "bosh3", "rk4", "rk4_classic"),
    *("fehlberg", "dopri5", "tsit5", "dopri8"),
]
IMPLICIT = ["beuler", "cn", "implicit_midpoint", "sdirk4", "esdirk3", "esdirk4"]
EMBEDDED = {"bosh3": 2, "fehlberg": 4, "dopri5": 4, "tsit5": 4, "dopri8": 7, "sdirk4": 3, "esdirk3": 2, "esdirk4": 3}
DENSE = {"fehlberg": 4, "dopri5": 4, "tsit5": 4, "dopri8": 5, "esdirk4": 4}  # the others: min(order, 3)
every = pytest.mark.parametrize("name", [*EXPLICIT, *IMPLICIT])
every_pair = pytest.mark.parametrize("name", ["ark2", "ark3", "ark4"])


@cache
def symmetry(tree):
    """sigma(tau): the order of its group of symmetries."""
    return prod(factorial(m) * symmetry(child) ** m for child, m in Counter(tree.children).items())


# ---- trees ----


@pytest.mark.parametrize(
    ("colours", "counts"), [(1, [1, 1, 2, 4, 9, 20, 48, 115, 286]), (2, [2, 4, 14, 52, 214]), (3, [3, 9, 45])]
)
def test_trees(colours, counts):
    trees = rooted_trees(len(counts), colours)
    assert [tree.index for tree in trees] == list(range(len(trees)))
    assert [sum(t.order == n for t in trees) for n in range(1, len(counts) + 1)] == counts
    assert len(set(map(str, trees))) == len(trees)
    for n in range(1, len(counts) + 1):
        total = sum(Fraction(1, t.density * symmetry(t)) for t in trees if t.order == n)
        assert total == Fraction(colours**n, n), n


def test_elementary_weights_of_named_trees():
    """Phi of [[t] t], [[[t]]] and [t t t], written out for the 3/8 rule."""
    A = np.array(TABLEAUX["rk4"].A, dtype=object)
    one = np.array([Fraction(1)] * 4)
    by_name = dict(zip(map(str, rooted_trees(4)), elementary_weights([A.tolist()], 4), strict=True))
    assert by_name["[[t] t]"] == tuple((A @ A @ one) * (A @ one))
    assert by_name["[[[t]]]"] == tuple(A @ A @ A @ one)
    assert by_name["[t t t]"] == tuple((A @ one) ** 3)
    assert {str(t): t.density for t in rooted_trees(4)}["[[t] t]"] == 8


def test_colours_choose_the_coefficients():
    """A vertex u takes the second A, a root u the second b."""
    pair = ADDITIVE["ark4"]
    one, two = (np.array(t.a) for t in (pair.implicit, pair.explicit))
    trees, phi = rooted_trees(3, 2), elementary_weights([one.tolist(), two.tolist()], 3)
    by_name = {str(tree): np.array(w) for tree, w in zip(trees, phi, strict=True)}
    assert by_name["[[u]]"] == pytest.approx(one @ two @ np.ones(6))
    assert by_name["[[t]u]"] == pytest.approx(two @ one @ np.ones(6))
    assert by_name["[u t]u"] == pytest.approx((one @ np.ones(6)) * (two @ np.ones(6)))
    weights = [[1.0] * 6, [2.0] * 6]
    by_root = {str(tree): r for tree, r in residuals(weights, phi, 1)}
    assert by_root == {"t": pytest.approx(5), "u": pytest.approx(11)}


# ---- orders ----


def number(x):
    return Decimal(x.numerator) / Decimal(x.denominator)


def numbers(rows, width=None):
    return [[number(x) for x in row] + [Decimal(0)] * ((width or len(row)) - len(row)) for row in rows]


def worst(found):
    return max(abs(float(r[-1])) for r in found)


def conditions(methods, order, weights=None, dense=False):
    """The largest residual up to `order`, and that at order + 1; of b, of `weights`, or of P."""
    with localcontext(Context(prec=50)):
        s = methods[0].stages
        matrices = [numbers((*t.A, t.b), s + 1) for t in methods]
        phi = elementary_weights(matrices, order + 1)
        if dense:
            P = numbers(methods[0].P) + [[Decimal(0)] * len(methods[0].P[0])] * (s + 1 - len(methods[0].P))
            colours = len(methods)
            return (
                worst(dense_residuals(P, phi, order, colours)),
                worst(dense_residuals(P, phi, order + 1, colours, above=order)),
            )
        b = numbers(weights or [t.b for t in methods])
        return worst(residuals(b, phi, order)), worst(residuals(b, phi, order + 1, above=order))


def expect_exactly(found, tolerance, what):
    """The conditions hold to the order and fail beyond: 1e-7 is far below any real failure here, and far above
    what rounding to the published digits leaves.
    """
    below, above = found
    assert below <= max(tolerance, 1e-40), f"{what}: a condition fails by {below:.1e}"
    assert above > 1e-7, f"{what}: holds at the next order too, within {above:.1e}"


@every
def test_orders_are_exact(name):
    t = TABLEAUX[name]
    assert t.name == name
    expect_exactly(conditions([t], t.order), t.tolerance, "b")
    expect_exactly(conditions([t], t.dense_order, dense=True), t.tolerance, "P")
    assert t.embedded_order == EMBEDDED.get(name)
    if t.b_hat is not None:
        expect_exactly(conditions([t], t.embedded_order, [t.b_hat]), t.tolerance, "b_hat")
    assert t.dense_order == DENSE.get(name, min(t.order, 3))


@every_pair
def test_orders_of_pairs_are_exact(name):
    pair = ADDITIVE[name]
    methods = [pair.implicit, pair.explicit]
    assert pair.order == int(name[-1])
    expect_exactly(conditions(methods, pair.order), pair.tolerance, "b")
    expect_exactly(conditions(methods, pair.dense_order, dense=True), pair.tolerance, "P")
    expect_exactly(conditions(methods, pair.embedded_order, [t.b_hat for t in methods]), pair.tolerance, "b_hat")
    assert (pair.embedded_order, pair.dense_order) == (pair.order - 1, min(pair.order, 3))


def local_errors(methods, parts, h, theta):
    """Errors of y_{n+1}, y^_{n+1}, dense output after one step of y' = sum of parts, y = 1/(1+t^2), from t = 1/2.

    An implicit stage by fixed-point iteration, which gains two digits or more a turn at these h.
    """
    t0, y0 = mpf(1) / 2, mpf(4) / 5
    s = methods[0].stages
    A = [[[mpf(x.numerator) / x.denominator for x in row] for row in (*t.A, t.b)] for t in methods]
    nodes = [mpf(x.numerator) / x.denominator for x in methods[0].c] + [mpf(1)]
    K = [[], []]
    for i in range(s + 1):
        Y = r = y0 + h * sum(a * k for At, Kt in zip(A, K, strict=False) for a, k in zip(At[i], Kt, strict=False))
        if i < s:
            for _ in range(30 if A[0][i][i] else 0):
                Y = r + h * A[0][i][i] * parts[0](t0 + nodes[i] * h, Y)
        for Kt, f in zip(K, parts, strict=False):
            Kt.append(f(t0 + nodes[i] * h, Y))
    total = [sum(k) for k in zip(*K[: len(parts)], strict=True)]

    def result(weights, theta):
        exact = 1 / (1 + (t0 + theta * h) ** 2)
        return abs(
            y0 + h * sum(mpf(w.numerator) / w.denominator * k for w, k in zip(weights, total, strict=False)) - exact
        )

    one = methods[0]
    dense = [sum(p * Fraction(theta) ** (k + 1) for k, p in enumerate(row)) for row in one.P]
    return [result(one.b, 1), result(one.b_hat, 1) if one.b_hat else None, result(dense, theta)]


def observe(methods, parts, orders, h):
    """Halving h divides the local errors by 2^(order+1), up to O(h) of the next term."""
    with mpmath.workdps(50):
        coarse, fine = (local_errors(methods, parts, mpf(step), Fraction(3, 8)) for step in (h, h / 2))
        rates = [float(mpmath.log(c / f, 2)) for c, f in zip(coarse, fine, strict=True) if c is not None]
    expected = [p + 1 for p in orders if p is not None]
    assert rates == pytest.approx(expected, abs=0.15)


@every
def test_local_errors_have_the_orders(name):
    t = TABLEAUX[name]
    h = 2**-4 if name == "dopri8" else 2**-9  # dopri8 while the rounding of its coefficients, 1e-18 h, does not show
    observe([t], [lambda t, y: -2 * t * y * y], [t.order, t.embedded_order, t.dense_order], h)


@every_pair
def test_local_errors_of_pairs_have_the_orders(name):
    pair = ADDITIVE[name]
    parts = [lambda t, y: -y * y * t - 3 * y * t, lambda t, y: -y * y * t + 3 * y * t]
    observe([pair.implicit, pair.explicit], parts, [pair.order, pair.embedded_order, pair.dense_order], 2**-9)


# ---- stability ----


def stability_function(t, z):
    """R(z) = 1 + z b^T (I - z A)^{-1} 1."""
    A, b = np.array(t.a), np.array(t.weights)
    return 1 + z * (b @ np.linalg.solve(np.eye(t.stages) - z * A, np.ones(t.stages)))


@pytest.mark.parametrize("name", EXPLICIT)
def test_explicit_stability_function_is_the_exponential_series(name):
    """R(z) = sum z^k b^T A^(k-1) 1, whose coefficients are 1/k! up to the order and no further."""
    t = TABLEAUX[name]
    A, b, v = np.array(t.a), np.array(t.weights), np.ones(t.stages)
    series = [1.0]
    for _ in range(t.stages):
        series.append(b @ v)
        v = A @ v
    for k in range(t.order + 1):
        assert series[k] == pytest.approx(1 / factorial(k), rel=1e-9)
    beyond = series[t.order + 1] if t.order < t.stages else 0.0
    assert abs(beyond * factorial(t.order + 1) - 1) > 1e-3
    assert not v.any()  # A is nilpotent


@pytest.mark.parametrize("name", EXPLICIT)
def test_real_stability_interval_is_as_stated(name):
    t = TABLEAUX[name]
    assert t.explicit
    left = float(t.stability.removeprefix("real interval [").removesuffix(", 0]"))
    inside = [abs(stability_function(t, z)) for z in np.linspace(left, -1e-3, 200)]
    assert max(inside) <= 1 + 1e-12
    assert abs(stability_function(t, left - 0.02)) > 1


@pytest.mark.parametrize("name", IMPLICIT)
def test_implicit_methods_are_a_stable(name):
    """|R(iy)| <= 1, and R has no pole in the left half plane as all a_ii >= 0; of L-stable ones R(infinity) = 0."""
    t = TABLEAUX[name]
    check_implicit(t)


@every_pair
def test_implicit_parts_are_l_stable(name):
    pair = ADDITIVE[name]
    check_implicit(pair.implicit)
    assert pair.implicit.stability == "L-stable"
    assert pair.explicit.explicit and not pair.explicit.first_same_as_last


def check_implicit(t):
    assert not t.explicit and all(row[i] >= 0 for i, row in enumerate(t.A))
    grid = np.concatenate([np.linspace(0, 20, 400), np.logspace(1.3, 6, 100)])
    assert max(abs(stability_function(t, 1j * y)) for y in grid) <= 1 + 1e-10
    far = abs(stability_function(t, -1e9))
    assert t.stability in ("L-stable", "A-stable")
    assert far < 1e-6 if t.stability == "L-stable" else far == pytest.approx(1, abs=1e-6)


# ---- what a tableau says of itself ----


@every
def test_views(name):
    t = TABLEAUX[name]
    s = t.stages
    assert np.shape(t.a) == (s, s) and len(t.weights) == len(t.nodes) == s
    assert t.a == tuple(tuple(map(float, row)) for row in t.A) and t.weights == tuple(map(float, t.b))
    assert isinstance(t.a[0][0], float) and isinstance(t.dense[0][0], float) and isinstance(t.nodes[0], float)
    assert len(t.dense) == s + t.extra_slope
    assert t.dense is t.dense  # made once
    assert sum(t.weights) == pytest.approx(1)
    if t.b_hat is None:
        assert t.error is None
    else:
        assert t.error == tuple(float(x - y) for x, y in zip(t.b, t.b_hat, strict=True))
        assert any(t.error)


def test_classes_of_tableaux():
    def those(holds):
        return {name for name in TABLEAUX if holds(TABLEAUX[name])}

    assert list(TABLEAUX) == [*EXPLICIT, *IMPLICIT]
    assert those(lambda t: t.explicit) == set(EXPLICIT)
    assert those(lambda t: t.first_same_as_last) == {"bosh3", "dopri5", "tsit5"}
    assert those(lambda t: t.stiffly_accurate) == {"beuler", "cn", "sdirk4", "esdirk3", "esdirk4"}
    assert those(lambda t: t.active == t.stages - 1) == {"bosh3", "dopri5", "tsit5"}
    assert those(lambda t: t.active == t.stages) == set(TABLEAUX) - {"bosh3", "dopri5", "tsit5"}
    slopes = {"euler", "midpoint", "heun2", "ralston", "rk4", "rk4_classic", "fehlberg", "dopri8", "implicit_midpoint"}
    assert those(lambda t: t.extra_slope) == slopes


@pytest.mark.parametrize("name", IMPLICIT)
def test_combination_of_stages_is_the_step(name):
    """With Y = y 1 + h A K for any K, (1 - sum d) y + d^T Y = y + h b^T K."""
    t = TABLEAUX[name]
    K, y = np.random.default_rng(0).standard_normal(t.stages), 0.7
    Y = y + 0.3 * np.array(t.a) @ K
    d = np.array(t.combination)
    assert (1 - d.sum()) * y + d @ Y == pytest.approx(y + 0.3 * np.array(t.weights) @ K, rel=1e-13)
    assert TABLEAUX["implicit_midpoint"].combination == (2.0,)
    assert TABLEAUX["rk4"].combination is None


@pytest.mark.parametrize("name", ["bosh3", "fehlberg", "dopri5", "tsit5", "dopri8", "rk4", "esdirk3", "esdirk4", "cn"])
def test_dense_output_is_once_differentiable(name):
    """b'(0) = e_1 and b'(1) = the slope at the end: pieces of neighbouring steps join with equal slopes."""
    t = TABLEAUX[name]
    P = np.array(t.dense)
    first, last = np.eye(len(P))[0], np.eye(len(P))[-1]
    assert P[:, 0] == pytest.approx(first, abs=1e-13)
    assert P @ np.arange(1, P.shape[1] + 1) == pytest.approx(last, abs=1e-12)


# ---- what a tableau refuses ----


def moved(row, i, by):
    return (*row[:i], row[i] + by, *row[i + 1 :])


@pytest.mark.parametrize("name", ["bosh3", "dopri5", "tsit5", "dopri8", "sdirk4", "esdirk3"])
@pytest.mark.parametrize("what", ["A", "c", "b", "b_hat", "P", "A in balance", "P in balance"])
def test_a_wrong_coefficient_is_refused(name, what):
    """By 1e-12."""
    t, by = TABLEAUX[name], Fraction(1, 10**12)
    if what == "A":
        change = {"A": (*t.A[:2], moved(t.A[2], 0, by), *t.A[3:])}
    elif what == "A in balance":  # the row sum stays
        change = {"A": (*t.A[:2], moved(moved(t.A[2], 0, by), 1, -by), *t.A[3:])}
    elif what == "P":
        change = {"P": (moved(t.P[0], 1, by), *t.P[1:])}
    elif what == "P in balance":  # P(1) = b stays
        change = {"P": (moved(moved(t.P[0], 1, by), 2, -by), *t.P[1:])}
    else:
        change = {what: moved(getattr(t, what), 0, by)}
    with pytest.raises(ValueError, match=f"tableau '{name}': "):
        replace(t, **change)


def test_the_first_failing_condition_is_named():
    t = TABLEAUX["rk4_classic"]
    with pytest.raises(ValueError, match=r"'rk4_classic': sum_j a_2,j = c_2 fails by 0\.5"):
        replace(t, A=(t.A[0], moved(t.A[1], 0, Fraction(1, 2)), *t.A[2:]))
    with pytest.raises(ValueError, match=r"order condition of b for the tree \[t\] fails by -0\.083; allowed is 0"):
        replace(t, b=(Fraction(1, 3), Fraction(1, 3), Fraction(1, 6), Fraction(1, 6)))
    with pytest.raises(ValueError, match=r"order condition of b for the tree \[t t t t\]"):
        replace(t, order=5)
    with pytest.raises(ValueError, match=r"order condition of P for the tree .*, at theta\^"):
        replace(t, dense_order=4)
    with pytest.raises(ValueError, match="order condition of b_hat"):
        replace(TABLEAUX["bosh3"], embedded_order=3)


def test_a_wrong_shape_is_refused():
    t = TABLEAUX["rk4"]
    for change in (
        {"A": t.A[:-1]},
        {"A": (moved(t.A[0], 3, Fraction(1)), *t.A[1:])},
        {"c": t.c[:-1]},
        {"b_hat": t.b},
        {"embedded_order": 3},
        {"P": t.P[:-2]},
        {"P": (t.P[0][:-1], *t.P[1:])},
    ):
        with pytest.raises(ValueError, match="tableau 'rk4'"):
            replace(t, **change)


def test_wrong_pairs_are_refused():
    pair = ADDITIVE["ark3"]
    A = pair.explicit.A
    by = Fraction(1, 10**12)
    with pytest.raises(ValueError, match=r"'ark3 \(explicit part\)'"):
        replace(pair.explicit, A=(*A[:3], moved(moved(A[3], 0, by), 1, -by)))
    with pytest.raises(ValueError, match=r"additive tableau 'ark3': .*implicit and the second explicit"):
        replace(pair, implicit=pair.explicit)
    with pytest.raises(ValueError, match=r"additive tableau 'ark3': .*order condition of b for"):
        replace(pair, order=4)
    with pytest.raises(ValueError, match=r"additive tableau 'x': .*must agree"):
        AdditiveTableau("x", 3, TABLEAUX["esdirk3"], pair.explicit)


def test_coupling_conditions_are_checked():
    """Either part of order 4 by itself and the two not together.

    A divided difference of third order, added to a row of A^I, is orthogonal to 1, c and c^2 and so, as
    A^I c = c^2 / 2, leaves the implicit part's conditions. It does not leave b^T A^I A^E c = 1/24.
    """
    pair = ADDITIVE["ark4"]
    A, c = pair.implicit.A, pair.implicit.c
    difference = [1 / prod(c[j] - c[k] for k in range(4) if k != j) / 1000 for j in range(4)]
    row = tuple(a + d for a, d in zip(A[4], [*difference, 0, 0], strict=True))
    changed = replace(pair.implicit, A=(*A[:4], row, A[5]))
    with pytest.raises(ValueError, match=r"additive tableau 'ark4': .*of b for the tree \[\[\[[tu]\]u\]\] fails"):
        replace(pair, implicit=changed)


def test_unknown_names():
    assert "rk5" not in TABLEAUX and "rk4" in TABLEAUX and len(ADDITIVE) == 3
    with pytest.raises(ValueError, match="tableau 'rk4' is registered twice"):
        TABLEAUX.register("rk4")(lambda: TABLEAUX["rk4"])


def test_nothing_is_made_before_it_is_asked_for(monkeypatch):
    """Fresh copies of the modules: names cost nothing, and one tableau makes one."""
    for name in ("", ".tableau", ".explicit", ".implicit"):
        module = importlib.import_module(f"pfde.one_step.tableaux{name}")
        if name:
            monkeypatch.delattr(tableaux, name[1:])  # put back afterwards
        monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.setattr(one_step, "tableaux", tableaux)
    fresh = importlib.import_module("pfde.one_step.tableaux")
    assert fresh.Tableau is not Tableau

    def alive():
        return sum(
            type(x) in (fresh.Tableau, fresh.AdditiveTableau) for x in gc.get_objects()
        )  # isinstance would ask x

    assert list(fresh.TABLEAUX) == list(TABLEAUX) and list(fresh.ADDITIVE) == list(ADDITIVE)
    assert "dopri8" in fresh.TABLEAUX
    assert alive() == 0
    assert fresh.TABLEAUX["dopri8"] is fresh.TABLEAUX["dopri8"]
    assert alive() == 1
    _ = fresh.ADDITIVE["ark3"]
    assert alive() == 4
