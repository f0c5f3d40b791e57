"""Rooted trees and the order conditions of Runge-Kutta methods.

The error of a Runge-Kutta step expands over rooted trees (Butcher). A tree tau = [tau_1, ..., tau_m] is a root with the
subtrees tau_k; the order |tau| counts its vertices, and with s stages

    density             gamma(tau) = |tau| gamma(tau_1) ... gamma(tau_m),           gamma(leaf) = 1
    elementary weight   Phi_i(tau) = prod_k sum_j a_ij Phi_j(tau_k),                Phi_i(leaf) = 1,   i = 1..s

    the method has order p           iff  sum_i b_i Phi_i(tau) = 1 / gamma(tau)                    for all |tau| <= p
    its dense output has order q     iff  sum_i b_i(theta) Phi_i(tau) = theta^|tau| / gamma(tau)   for all |tau| <= q

where b_i(theta) = sum_k P[i][k] theta^(k+1), k = 0, 1, ..., and the second is an identity of polynomials in theta.

Of an additive method, y' = f^[0] + f^[1] with coefficients A^[0], b^[0], A^[1], b^[1], every vertex carries a colour:
that of the root says which b, that of a child which A,

    Phi_i(tau) = prod_k sum_j a^[colour of tau_k]_ij Phi_j(tau_k),     sum_i b^[colour of tau]_i Phi_i(tau) = 1/gamma.

There are 1, 1, 2, 4, 9, 20, 48, 115 trees of 1..8 vertices, and 2, 4, 14, 52, 214 of two colours. What is computed here
is computed in the number type that comes in: Fraction, Decimal, float.

References: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, II.2 (doi:10.1007/978-3-540-78862-1);
Butcher, Numerical Methods for Ordinary Differential Equations (doi:10.1002/9781119121534); Kennedy, Carpenter, Appl.
Numer. Math. 44 (2003) 139 (doi:10.1016/S0168-9274(02)00138-1) for the coloured ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

# Fraction, Decimal or float; one type within a call
Number = Any
Vector = Sequence[Number]
Matrix = Sequence[Vector]


@dataclass(frozen=True, eq=False)
class Tree:
    """A rooted tree, one object for each.

    index : its place among `rooted_trees`, where its subtrees come before it
    colour : of its root
    children : the subtrees of the root, by decreasing index
    order : |tau|, the number of vertices
    density : gamma(tau)
    """

    index: int
    colour: int
    children: tuple[Tree, ...]
    order: int
    density: int

    def __str__(self) -> str:
        """In brackets; a vertex is written t, or t and u where there are two colours."""
        root = "tuvw"[self.colour]
        if not self.children:
            return root
        inner = " ".join(map(str, self.children))
        return f"[{inner}]" if not self.colour else f"[{inner}]{root}"


@lru_cache
def rooted_trees(order: int, colours: int = 1) -> tuple[Tree, ...]:
    """All rooted trees of 1..order vertices, in `colours` colours, by increasing order."""
    trees: list[Tree] = []
    for size in range(1, order + 1):
        # the list grows while the forests are drawn, but these hold smaller trees only
        for children in list(_forests(trees, size - 1, len(trees))):
            density = size * prod(child.density for child in children)
            trees += [Tree(len(trees) + k, k, children, size, density) for k in range(colours)]
    return tuple(trees)


def _forests(trees: Sequence[Tree], size: int, end: int) -> Iterator[tuple[Tree, ...]]:
    """The multisets of trees of index below `end` with `size` vertices altogether, by decreasing index."""
    if size == 0:
        yield ()
    for tree in trees[:end]:
        if tree.order <= size:
            for rest in _forests(trees, size - tree.order, tree.index + 1):
                yield (tree, *rest)


def elementary_weights(matrices: Sequence[Matrix], order: int) -> tuple[tuple[Number, ...], ...]:
    """Phi(tau), s numbers for each of rooted_trees(order, len(matrices)), of lower triangular A, one for each colour.

    Cost: one product A Phi for each tree of fewer than `order` vertices, and one product of numbers for each child.
    """
    stages = range(len(matrices[0]))
    one = matrices[0][0][0] * 0 + 1
    rows = [[[(j, a) for j, a in enumerate(row) if a] for row in A] for A in matrices]
    phi: list[tuple[Number, ...]] = []
    inner: list[list[Number]] = []  # A Phi, in which a tree enters the weights of those it is a child of
    for tree in rooted_trees(order, len(matrices)):
        w = [one for _ in stages]
        for child in tree.children:
            w = [x * y for x, y in zip(w, inner[child.index], strict=True)]
        phi.append(tuple(w))
        if tree.order < order:
            inner.append([sum(a * w[j] for j, a in row) + 0 * one for row in rows[tree.colour]])
    return tuple(phi)


def residuals(
    weights: Sequence[Vector], phi: Sequence[Vector], order: int, above: int = 0
) -> Iterator[tuple[Tree, Number]]:
    """sum_i b_i Phi_i(tau) - 1/gamma(tau) for every tree with above < |tau| <= order.

    weights : b, one for each colour; where b is shorter than Phi, what is missing is 0
    phi : `elementary_weights` up to `order` at least, in as many colours
    """
    for tree in rooted_trees(order, len(weights)):
        if tree.order > above:
            w = phi[tree.index]
            one = w[0] * 0 + 1
            yield tree, sum(b * x for b, x in zip(weights[tree.colour], w, strict=False)) - one / tree.density


def dense_residuals(
    P: Matrix, phi: Sequence[Vector], order: int, colours: int = 1, above: int = 0
) -> Iterator[tuple[Tree, int, Number]]:
    """The coefficient of theta^k in sum_i b_i(theta) Phi_i(tau) - theta^|tau| / gamma(tau), for k >= 1.

    P : the coefficients of b_i(theta), one row for each entry of Phi; the same for all colours
    phi : `elementary_weights` up to `order` at least
    """
    powers = [[row[k] if k < len(row) else 0 for row in P] for k in range(max(order, *map(len, P)))]
    for tree in rooted_trees(order, colours):
        if tree.order > above:
            w = phi[tree.index]
            one = w[0] * 0 + 1
            for k, column in enumerate(powers, 1):
                exact = one / tree.density if k == tree.order else 0
                yield tree, k, sum(p * x for p, x in zip(column, w, strict=True)) - exact
