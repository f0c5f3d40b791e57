"""Runge-Kutta tableaux: the coefficients of the methods for y' = f(t, y), each checked when it is made.

A method with s stages is a lower triangular A, weights b and nodes c. A step from (t_n, y_n) of size h is

    Y_i = y_n + h sum_{j<=i} a_ij K_j,     K_i = f(t_n + c_i h, Y_i),     y_{n+1} = y_n + h sum_i b_i K_i

explicit where a_ii = 0 for all i (K_i = f of what is known), diagonally implicit otherwise. Beside it stand

    the embedded method     y^_{n+1} = y_n + h sum_i b^_i K_i,  whose difference from y_{n+1} estimates the error
    the dense output        y(t_n + theta h) ~ y_n + h sum_i b_i(theta) K_i,   b_i(theta) = sum_k P[i][k] theta^(k+1)

The dense output is continuous, P(1) = b. Its sum may end with one more slope, K_{s+1} = f(t_{n+1}, y_{n+1}), where the
method does not evaluate that in any case. An additive method for y' = f(t, y) + g(t, y) has two tableaux, one implicit
and one explicit, with the nodes and weights of one:

    Y_i = y_n + h sum_{j<=i} a_ij f(t_n + c_j h, Y_j) + h sum_{j<i} a^E_ij g(t_n + c_j h, Y_j)

No coefficient is taken on trust. A tableau satisfies the conditions of `rooted_trees` or it cannot be made: to `order`
with b, to `embedded_order` with b^, to `dense_order` with P. To rationals this is exact. Coefficients that are
published rounded (to 16..30 digits) have a `tolerance`, and are checked in Decimal with 60 digits: in Fraction their
denominators would grow without bound, and fill seconds for the 200 trees of order 8.

References stand with each tableau, in `source`. Books: Hairer, Norsett, Wanner, Solving ODEs I
(doi:10.1007/978-3-540-78862-1), and Hairer, Wanner, Solving ODEs II (doi:10.1007/978-3-642-05221-7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import cached_property
from typing import Any

from ...registry import Registry
from .coefficients import Matrix, Row
from .rooted_trees import dense_residuals, elementary_weights, residuals

Floats = tuple[float, ...]

_DIGITS = 60


@dataclass(frozen=True, eq=False)
class Tableau:
    """A Runge-Kutta method, explicit or diagonally implicit.

    name : as in `method=`
    order : of y_{n+1}
    A, b, c : the coefficients, A with all its zeros
    P : (s or s+1 rows) coefficients of the dense output, of theta, theta^2, ...
    dense_order : of the dense output
    stability : what is known of the stability region
    source : where the coefficients are from
    b_hat, embedded_order : the weights of the embedded method and its order, or None
    tolerance : what the conditions may fail by; 0 where the coefficients are exact
    """

    name: str
    order: int
    A: Matrix
    b: Row
    c: Row
    P: Matrix
    dense_order: int
    stability: str
    source: str
    b_hat: Row | None = None
    embedded_order: int | None = None
    tolerance: Fraction | float = 0

    def __post_init__(self) -> None:
        """Raise ValueError, naming the tableau and the first condition that fails, unless all hold."""
        self._check_shapes()
        for i, row in enumerate(self.A):
            self._check(f"sum_j a_{i + 1},j = c_{i + 1}", sum(row) - self.c[i])
        self._check_conditions()
        for i, row in enumerate(self.P):
            self._check(f"b_{i + 1}(1) = b_{i + 1}", sum(row) - (self.b[i] if i < self.stages else 0))

    @property
    def stages(self) -> int:
        """s."""
        return len(self.b)

    @property
    def active(self) -> int:
        """How many leading stages y_{n+1} needs; those after it serve the error and the dense output only."""
        return max(i + 1 for i, b in enumerate(self.b) if b)

    @cached_property
    def explicit(self) -> bool:
        """Whether a_ii = 0 for all i."""
        return not any(row[i] for i, row in enumerate(self.A))

    @cached_property
    def first_same_as_last(self) -> bool:
        """Whether Y_s = y_{n+1} in an explicit method, so that K_s is K_1 of the next step."""
        return self.explicit and self.A[-1] == self.b and self.c[-1] == 1

    @cached_property
    def stiffly_accurate(self) -> bool:
        """Whether Y_s = y_{n+1} and Y_s is implicit."""
        return self.A[-1] == self.b and self.A[-1][-1] != 0

    @property
    def extra_slope(self) -> bool:
        """Whether the dense output takes K_{s+1} = f(t_{n+1}, y_{n+1})."""
        return len(self.P) == self.stages + 1

    @cached_property
    def combination(self) -> Floats | None:
        """d with y_{n+1} = (1 - sum_i d_i) y_n + sum_i d_i Y_i; None for an explicit method.

        d^T = b^T A^{-1}, which is e_s for a stiffly accurate method, also where A is singular.
        """
        if self.explicit:
            return None
        if self.stiffly_accurate:
            return (0.0,) * (self.stages - 1) + (1.0,)
        if not all(row[i] for i, row in enumerate(self.A)):
            raise ValueError(f"tableau '{self.name}': y_{{n+1}} is no combination of the Y_i, A is singular")
        d: list[Fraction] = []  # from d_s to d_1, by back substitution in A^T d = b
        for j in reversed(range(self.stages)):
            later = sum(self.A[self.stages - 1 - k][j] * x for k, x in enumerate(d))
            d.append((self.b[j] - later) / self.A[j][j])
        return _floats(reversed(d))

    @cached_property
    def a(self) -> tuple[Floats, ...]:
        """A in float."""
        return tuple(map(_floats, self.A))

    @cached_property
    def weights(self) -> Floats:
        """b in float."""
        return _floats(self.b)

    @cached_property
    def nodes(self) -> Floats:
        """c in float."""
        return _floats(self.c)

    @cached_property
    def error(self) -> Floats | None:
        """b - b^ in float, rounded once; None without an embedded method."""
        return None if self.b_hat is None else _floats(x - y for x, y in zip(self.b, self.b_hat, strict=True))

    @cached_property
    def dense(self) -> tuple[Floats, ...]:
        """P in float."""
        return tuple(map(_floats, self.P))

    def _check_shapes(self) -> None:
        """Raise unless A is square and lower triangular and the rest fits it."""
        s = len(self.b)
        triangular = all(not x for i, row in enumerate(self.A) for x in row[i + 1 :])
        if len(self.A) != s or any(len(row) != s for row in self.A) or not triangular:
            self._fail(f"A must be {s} x {s}, as b has {s} entries, and lower triangular")
        if len(self.c) != s or (self.b_hat is not None and len(self.b_hat) != s):
            self._fail(f"c and b_hat must have {s} entries, as b has")
        if (self.b_hat is None) != (self.embedded_order is None):
            self._fail("b_hat and embedded_order come together")
        if len(self.P) not in (s, s + 1) or len({len(row) for row in self.P}) != 1:
            self._fail(f"P must have {s} or {s + 1} rows of one length")

    def _check_conditions(self) -> None:
        """Raise unless the order conditions of b, b_hat and P hold."""
        with localcontext(Context(prec=_DIGITS)):
            number = _number(self.tolerance)
            A, b = _numbers(_extended(self.A, self.b), number), [number(x) for x in self.b]
            phi = elementary_weights([A], max(self.order, self.embedded_order or 0, self.dense_order))
            for tree, r in residuals([b], phi, self.order):
                self._check(f"the order condition of b for the tree {tree}", r)
            if self.b_hat is not None and self.embedded_order is not None:
                for tree, r in residuals([[number(x) for x in self.b_hat]], phi, self.embedded_order):
                    self._check(f"the order condition of b_hat for the tree {tree}", r)
            P = _numbers(_padded(self.P, self.stages + 1), number)
            for tree, k, r in dense_residuals(P, phi, self.dense_order):
                self._check(f"the order condition of P for the tree {tree}, at theta^{k},", r)

    def _check(self, what: str, residual: Any) -> None:
        """Raise unless the residual is within the tolerance."""
        if abs(residual) > self.tolerance:
            self._fail(f"{what} fails by {float(residual):.2g}; allowed is {float(self.tolerance):.2g}")

    def _fail(self, what: str) -> None:
        raise ValueError(f"tableau '{self.name}': {what}; compare the coefficients with {self.source}")


@dataclass(frozen=True, eq=False)
class AdditiveTableau:
    """An additive Runge-Kutta method: f is taken implicitly, g explicitly, with one c, b, b_hat and P.

    name, order : of the pair
    implicit, explicit : the two tableaux
    """

    name: str
    order: int
    implicit: Tableau
    explicit: Tableau

    def __post_init__(self) -> None:
        """Raise ValueError, naming the pair and the first condition that fails, unless all hold."""
        one, two = self.implicit, self.explicit
        if one.explicit or not two.explicit:
            self._fail("the first tableau must be implicit and the second explicit")
        if one.c != two.c or len(one.b) != len(two.b) or one.P != two.P or one.dense_order != two.dense_order:
            self._fail("the two tableaux must agree in c, in P, and in how many weights they have")
        if one.embedded_order != two.embedded_order:
            self._fail("the two tableaux must both have an embedded method, of one order")
        self._check_conditions()

    @property
    def tolerance(self) -> Fraction | float:
        """What the conditions may fail by."""
        return max(self.implicit.tolerance, self.explicit.tolerance)

    @property
    def stages(self) -> int:
        """s."""
        return self.implicit.stages

    @property
    def extra_slope(self) -> bool:
        """Whether the dense output takes f and g at (t_{n+1}, y_{n+1})."""
        return self.implicit.extra_slope

    @property
    def dense_order(self) -> int:
        """The order of the dense output."""
        return self.implicit.dense_order

    @property
    def embedded_order(self) -> int | None:
        """The order of the embedded method, or None."""
        return self.implicit.embedded_order

    def _check_conditions(self) -> None:
        """Raise unless the order conditions with trees of two colours hold."""
        pair = (self.implicit, self.explicit)
        with localcontext(Context(prec=_DIGITS)):
            number = _number(self.tolerance)
            matrices = [_numbers(_extended(one.A, one.b), number) for one in pair]
            phi = elementary_weights(matrices, max(self.order, self.embedded_order or 0, self.dense_order))
            for tree, r in residuals([[number(x) for x in one.b] for one in pair], phi, self.order):
                self._check(f"the order condition of b for the tree {tree}", r)
            b_hat = [[number(x) for x in one.b_hat or ()] for one in pair]
            for tree, r in residuals(b_hat, phi, self.embedded_order or 0):
                self._check(f"the order condition of b_hat for the tree {tree}", r)
            P = _numbers(_padded(self.implicit.P, self.stages + 1), number)
            for tree, k, r in dense_residuals(P, phi, self.dense_order, colours=2):
                self._check(f"the order condition of P for the tree {tree}, at theta^{k},", r)

    def _check(self, what: str, residual: Any) -> None:
        """Raise unless the residual is within the tolerance."""
        if abs(residual) > self.tolerance:
            self._fail(f"{what} fails by {float(residual):.2g}; allowed is {float(self.tolerance):.2g}")

    def _fail(self, what: str) -> None:
        raise ValueError(f"additive tableau '{self.name}': {what}; compare with {self.implicit.source}")


TABLEAUX: Registry[Tableau] = Registry("tableau")
ADDITIVE: Registry[AdditiveTableau] = Registry("additive tableau")


def _floats(numbers: Iterable[Fraction]) -> Floats:
    return tuple(map(float, numbers))


def _number(tolerance: Fraction | float) -> Callable[[Fraction], Any]:
    """What to compute with: Fraction where the conditions are exact, else Decimal, in the context of the caller."""
    return (lambda x: Decimal(x.numerator) / Decimal(x.denominator)) if tolerance else Fraction


def _numbers(rows: Matrix, number: Callable[[Fraction], Any]) -> list[list[Any]]:
    return [[number(x) for x in row] for row in rows]


def _extended(A: Matrix, b: Row) -> Matrix:
    """A with the stage of K_{s+1} = f(t_{n+1}, y_{n+1}), its row b."""
    zero = (Fraction(0),)
    return (*(row + zero for row in A), b + zero)


def _padded(P: Matrix, rows: int) -> Matrix:
    """P with rows of zeros at its end."""
    return P + ((Fraction(0),) * len(P[0]),) * (rows - len(P))
