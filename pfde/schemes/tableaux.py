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

No coefficient is taken on trust. A tableau satisfies the conditions of `pfde.schemes.rooted_trees` or it cannot be
made: to `order` with b, to `embedded_order` with b^, to `dense_order` with P. To rationals this is exact. Coefficients
that are published rounded (to 16..30 digits) have a `tolerance`, and are checked in Decimal with 60 digits: in
Fraction their denominators would grow without bound, and fill seconds for the 200 trees of order 8.

References stand with each tableau, in `source`. Books: Hairer, Norsett, Wanner, Solving ODEs I
(doi:10.1007/978-3-540-78862-1), and Hairer, Wanner, Solving ODEs II (doi:10.1007/978-3-642-05221-7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import cached_property
from math import isqrt
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from .rooted_trees import dense_residuals, elementary_weights, residuals

Row = tuple[Fraction, ...]
Rows = tuple[Row, ...]
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
    A: Rows
    b: Row
    c: Row
    P: Rows
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


def tableau(name: str) -> Tableau:
    """The tableau of that name; ValueError where there is none."""
    if name not in TABLEAUX:
        raise ValueError(f"method must be one of {', '.join(TABLEAUX)}: got {name!r}")
    return TABLEAUX[name]


def additive_tableau(name: str) -> AdditiveTableau:
    """The additive tableau of that name; ValueError where there is none."""
    if name not in ADDITIVE:
        raise ValueError(f"method must be one of {', '.join(ADDITIVE)}: got {name!r}")
    return ADDITIVE[name]


T = TypeVar("T")


class _Lazy(Mapping[str, T], Generic[T]):
    """Names and what they stand for, which is made, and checked, when it is first asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], T]]) -> None:
        self._makers = MappingProxyType(dict(makers))
        self._made: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers  # Mapping's own would make it

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


# ---- numbers ----


def _floats(numbers: Iterable[Fraction]) -> Floats:
    return tuple(map(float, numbers))


def _number(tolerance: Fraction | float) -> Callable[[Fraction], Any]:
    """What to compute with: Fraction where the conditions are exact, else Decimal, in the context of the caller."""
    return (lambda x: Decimal(x.numerator) / Decimal(x.denominator)) if tolerance else Fraction


def _numbers(rows: Rows, number: Callable[[Fraction], Any]) -> list[list[Any]]:
    return [[number(x) for x in row] for row in rows]


def _extended(A: Rows, b: Row) -> Rows:
    """A with the stage of K_{s+1} = f(t_{n+1}, y_{n+1}), its row b."""
    zero = (Fraction(0),)
    return (*(row + zero for row in A), b + zero)


def _padded(P: Rows, rows: int) -> Rows:
    """P with rows of zeros at its end."""
    return P + ((Fraction(0),) * len(P[0]),) * (rows - len(P))


def _row(text: str) -> Row:
    """Fractions and decimals, separated by blanks."""
    return tuple(map(Fraction, text.split()))


def _rows(*texts: str) -> Rows:
    return tuple(map(_row, texts))


def _lower(*texts: str) -> Rows:
    """A square matrix by the leading entries of its rows."""
    return tuple(row + (Fraction(0),) * (len(texts) - len(row)) for row in map(_row, texts))


def _hermite(b: Row, last: bool = False) -> Rows:
    """P of the cubic Hermite polynomial: y and f at both ends of the step, of order min(order, 3).

    b_i(theta) = (3 theta^2 - 2 theta^3) b_i + [i = 1] (theta - 2 theta^2 + theta^3) + [at the end] (theta^3 - theta^2).
    The slope at the end is K_s where `last`, which Y_s = y_{n+1} must justify, else K_{s+1}.
    """
    P = [[Fraction(0), 3 * x, -2 * x] for x in (b if last else (*b, Fraction(0)))]
    for i, slope in ((0, (1, -2, 1)), (-1, (0, -1, 1))):
        P[i] = [x + y for x, y in zip(P[i], slope, strict=True)]
    return tuple(map(tuple, P))


# ---- explicit methods ----


def _explicit(name: str, order: int, A: Rows, b: Row, stability: str, source: str) -> Tableau:
    """An explicit method whose dense output is the cubic Hermite polynomial with one more slope."""
    c = tuple(Fraction(sum(row)) for row in A)
    return Tableau(name, order, A, b, c, _hermite(b), min(order, 3), stability, source)


def _euler() -> Tableau:
    """Forward Euler."""
    return _explicit("euler", 1, _lower("0"), _row("1"), "real interval [-2, 0]", "Euler 1768; HNW I, II.1")


def _midpoint() -> Tableau:
    return _explicit("midpoint", 2, _lower("0", "1/2"), _row("0 1"), "real interval [-2, 0]", "Runge 1895; HNW I, II.1")


def _heun2() -> Tableau:
    """The explicit trapezoidal rule."""
    return _explicit("heun2", 2, _lower("0", "1"), _row("1/2 1/2"), "real interval [-2, 0]", "HNW I, II.1")


def _ralston() -> Tableau:
    """The two-stage method with the smallest bound of the error."""
    source = "Ralston 1962, doi:10.1090/S0025-5718-1962-0150954-0"
    return _explicit("ralston", 2, _lower("0", "2/3"), _row("1/4 3/4"), "real interval [-2, 0]", source)


def _bosh3() -> Tableau:
    b = _row("2/9 1/3 4/9 0")
    return Tableau(
        name="bosh3",
        order=3,
        A=_lower("0", "1/2", "0 3/4", "2/9 1/3 4/9"),
        b=b,
        c=_row("0 1/2 3/4 1"),
        b_hat=_row("7/24 1/4 1/3 1/8"),
        embedded_order=2,
        P=_hermite(b, last=True),
        dense_order=3,
        stability="real interval [-2.51, 0]",
        source="Bogacki, Shampine 1989, doi:10.1016/0893-9659(89)90079-7",
    )


def _rk4() -> Tableau:
    """Kutta's 3/8 rule."""
    A = _lower("0", "1/3", "-1/3 1", "1 -1 1")
    return _explicit("rk4", 4, A, _row("1/8 3/8 3/8 1/8"), "real interval [-2.78, 0]", "Kutta 1901; HNW I, II.1")


def _rk4_classic() -> Tableau:
    A = _lower("0", "1/2", "0 1/2", "0 0 1")
    return _explicit(
        "rk4_classic", 4, A, _row("1/6 1/3 1/3 1/6"), "real interval [-2.78, 0]", "Kutta 1901; HNW I, II.1"
    )


def _fehlberg() -> Tableau:
    """RKF45 in local extrapolation: the solution of order 5 goes on, as in PETSc's `5f`; order 4 is compared."""
    return Tableau(
        name="fehlberg",
        order=5,
        A=_lower(
            "0",
            "1/4",
            "3/32 9/32",
            "1932/2197 -7200/2197 7296/2197",
            "439/216 -8 3680/513 -845/4104",
            "-8/27 2 -3544/2565 1859/4104 -11/40",
        ),
        b=_row("16/135 0 6656/12825 28561/56430 -9/50 2/55"),
        c=_row("0 1/4 3/8 12/13 1 1/2"),
        b_hat=_row("25/216 0 1408/2565 2197/4104 -1/5 0"),
        embedded_order=4,
        # Derived here. The quartics of order 4 with slopes f(t_n, y_n) and f(t_{n+1}, y_{n+1}) at the ends differ by
        # theta^2 (1 - theta)^2 times one vector; this one is near that of the least error of order 5.
        P=_rows(
            "1 -7201/2880 10691/4320 -493/576",
            "0 0 0 0",
            "0 21136/4275 -100192/12825 2896/855",
            "0 -2106923/601920 8148673/902880 -54925/10944",
            "0 479/400 -623/200 139/80",
            "0 -361/220 377/110 -7/4",
            "0 3/2 -4 5/2",
        ),
        dense_order=4,
        stability="real interval [-3.67, 0]",
        source="Fehlberg 1970, doi:10.1007/BF02241732; HNW I, table II.5.1",
    )


def _dopri5() -> Tableau:
    return Tableau(
        name="dopri5",
        order=5,
        A=_lower(
            "0",
            "1/5",
            "3/40 9/40",
            "44/45 -56/15 32/9",
            "19372/6561 -25360/2187 64448/6561 -212/729",
            "9017/3168 -355/33 46732/5247 49/176 -5103/18656",
            "35/384 0 500/1113 125/192 -2187/6784 11/84",
        ),
        b=_row("35/384 0 500/1113 125/192 -2187/6784 11/84 0"),
        c=_row("0 1/5 3/10 4/5 8/9 1 1"),
        b_hat=_row("5179/57600 0 7571/16695 393/640 -92097/339200 187/2100 1/40"),
        embedded_order=4,
        P=_rows(
            "1 -8048581381/2820520608 8663915743/2820520608 -12715105075/11282082432",
            "0 0 0 0",
            "0 131558114200/32700410799 -68118460800/10900136933 87487479700/32700410799",
            "0 -1754552775/470086768 14199869525/1410260304 -10690763975/1880347072",
            "0 127303824393/49829197408 -318862633887/49829197408 701980252875/199316789632",
            "0 -282668133/205662961 2019193451/616988883 -1453857185/822651844",
            "0 40617522/29380423 -110615467/29380423 69997945/29380423",
        ),
        dense_order=4,
        stability="real interval [-3.30, 0]",
        source="Dormand, Prince 1980, doi:10.1016/0771-050X(80)90013-3; dense output Shampine 1986, "
        "doi:10.1090/S0025-5718-1986-0815836-3",
    )


def _tsit5() -> Tableau:
    b = _row(
        "0.09646076681806522951816731316512876333712 0.01 0.4798896504144995747752495322905965199130 "
        "1.379008574103741893192274821856872770756 -3.290069515436080679901047585711363850116 "
        "2.324710524099773982415355918398765796109 0"
    )
    return Tableau(
        name="tsit5",
        order=5,
        A=_lower(
            "0",
            "0.161",
            "-0.008480655492356988544426874250230774675121 0.3354806554923569885444268742502307746751",
            "2.897153057105493432130432594192938764925 -6.359448489975074843148159912383825625953 "
            "4.362295432869581411017727318190886861028",
            "5.325864828439256604428877920840511317836 -11.74888356406282787774717033978577296189 "
            "7.495539342889836208304604784564358155659 -0.09249506636175524925650207933207191611350",
            "5.861455442946420028659251486982647890394 -12.92096931784710929170611868178335939542 "
            "8.159367898576158643180400794539253485182 -0.07158497328140099722453054252582973869127 "
            "-0.02826905039406838290900305721271224146718",
            " ".join(map(str, b[:6])),
        ),
        b=b,
        c=_row("0 0.161 0.327 0.9 0.9800255409045096857298102862870245954942 1 1"),
        b_hat=_row(
            "0.09468075576583945807478876255758922856118 0.009183565540343253096776363936645313759814 "
            "0.4877705284247615707855642599631228241517 1.234297566930478985655109673884237654036 "
            "-2.707712349983525454881109975059321670690 1.866628418170587035753719399566211498666 1/66"
        ),
        embedded_order=4,
        # as published to 17 digits, moved by less than 1e-14 to where the conditions hold in all digits of A: the last
        # row is the published one, 3/2 theta^2 - 4 theta^3 + 5/2 theta^4
        P=_rows(
            "1 -2.763706197274825868672988363027682 2.91325546182191265541864597871588 "
            "-1.053088497729021557227490302523069",
            "0 0.1317 -0.2234 0.1017",
            "0 3.930296236894751517409293669459986 -5.941033872131504735717589209757585 "
            "2.490627285651252793083545072588196",
            "0 -12.41107716693367703873047339671186 30.3381886302823216502300460808512 "
            "-16.54810288924490271830729786228247",
            "0 37.50931341651103917897843911106474 -88.17890489476640107756106856497494 "
            "47.37952196281928121868158186819883",
            "0 -27.89652628919728778898427102078519 65.09189467479367150762996571516544 "
            "-34.87065786149660973623033877598149",
            "0 1.5 -4 2.5",
        ),
        dense_order=4,
        stability="real interval [-3.50, 0]",
        source="Tsitouras 2011, doi:10.1016/j.camwa.2011.06.002",
        tolerance=1e-30,
    )


def _dopri8() -> Tableau:
    b = _row(
        "14005451/335480064 0 0 0 0 -59238493/1068277825 181606767/758867731 561292985/797845732 "
        "-1041891430/1371343529 760417239/1151165299 118820643/751138087 -528747749/2220607170 1/4"
    )
    return Tableau(
        name="dopri8",
        order=8,
        A=_lower(
            "0",
            "1/18",
            "1/48 1/16",
            "1/32 0 3/32",
            "5/16 0 -75/64 75/64",
            "3/80 0 0 3/16 3/20",
            "29443841/614563906 0 0 77736538/692538347 -28693883/1125000000 23124283/1800000000",
            "16016141/946692911 0 0 61564180/158732637 22789713/633445777 545815736/2771057229 -180193667/1043307555",
            "39632708/573591083 0 0 -433636366/683701615 -421739975/2616292301 100302831/723423059 "
            "790204164/839813087 800635310/3783071287",
            "246121993/1340847787 0 0 -37695042795/15268766246 -309121744/1061227803 -12992083/490766935 "
            "6005943493/2108947869 393006217/1396673457 123872331/1001029789",
            "-1028468189/846180014 0 0 8478235783/508512852 1311729495/1432422823 -10304129995/1701304382 "
            "-48777925059/3047939560 15336726248/1032824649 -45442868181/3398467696 3065993473/597172653",
            "185892177/718116043 0 0 -3185094517/667107341 -477755414/1098053517 -703635378/230739211 "
            "5731566787/1027545527 5232866602/850066563 -4093664535/808688257 3962137247/1805957418 65686358/487910083",
            "403863854/491063109 0 0 -5068492393/434740067 -411421997/543043805 652783627/914296604 "
            "11173962825/925320556 -13158990841/6184727034 3936647629/1978049680 -160528059/685178525 "
            "248638103/1413531060",
        ),
        b=b,
        c=_row("0 1/18 1/12 1/8 5/16 3/8 59/400 93/200 5490023248/9719169821 13/20 1201146811/1299019798 1 1"),
        b_hat=_row(
            "13451932/455176623 0 0 0 0 -808719846/976000145 1757004468/5645159321 656045339/265891186 "
            "-3867574721/1518517206 465885868/322736535 53011238/667516719 2/45 0"
        ),
        embedded_order=7,
        # Derived here, in 50 digits: degree 7; order 5, b(1) = b, b'(0) = e_1 and b'(1) = e_14 are imposed, which
        # leaves 20 parameters. These minimise the squares of the residuals of orders 6 and 7, over their trees'
        # symmetries, integrated over theta, plus 1e-14 sum P^2. Order 6 is out of reach with these 14 slopes.
        P=_rows(
            "1 -6.2518939894727683529 16.649338084815682755 -20.118140111104503618 "
            "8.0820214061812107148 3.14472756704291189 -2.4643054663210031432",
            "0 0 0 0 0 0 0",
            "0 0 0 0 0 0 0",
            "0 0 0 0 0 0 0",
            "0 0 0 0 0 0 0",
            "0 -3.6898555298523760824 25.128062910439580512 -46.497207244744072778 18.66383363120974934 "
            "19.712814179037602852 -13.373100274701723153",
            "0 9.2067405168310750329 -35.540673423501705005 50.014271501546579053 "
            "-21.066108012326227653 -10.106417719727576324 7.7314999443790349926",
            "0 -1.2252545330938498736 9.9458421611364618508 -15.451148878393125159 "
            "10.675270143336159574 -3.7296149447454405628 0.48841672116323719103",
            "0 0.67101164681073958631 -10.705511616782546801 21.492454031943811032 "
            "-6.9833435981420207048 -16.362003963172128906 11.127633885527684867",
            "0 1.9003031819890694311 -9.5408616967031969822 19.504195574442751099 "
            "-15.186392145175506433 5.1460696603462047205 -1.1627515439770354957",
            "0 -1.2246260288407694259 8.237722705842965597 -18.18976894255124418 11.34270270441180412 "
            "6.1634531172329723856 -6.171296073585605162",
            "0 0.8647694227322432513 -6.728026396275051966 15.624712179445293847 -4.7174902579123413214 "
            "-16.517664322342246918 11.235589835599240303",
            "0 -1.6159210567036136283 11.147064781697193842 -22.606217997448289984 "
            "4.1303092232147263323 24.799381702644710062 -15.604616653404726624",
            "0 1.3647263696002500613 -8.592957510669383802 16.226849886862800688 -4.9408030947975539695 "
            "-12.250745276317009225 8.1929296253208962469",
        ),
        dense_order=5,
        stability="real interval [-5.16, 0]",
        source="Prince, Dormand 1981, doi:10.1016/0771-050X(81)90010-3, RK8(7)13M, as in torchdiffeq",
        tolerance=1e-15,
    )


# ---- diagonally implicit methods ----


def _beuler() -> Tableau:
    """Backward Euler."""
    return Tableau("beuler", 1, _rows("1"), _row("1"), _row("1"), _rows("1"), 1, "L-stable", "HW II, IV.3")


def _cn() -> Tableau:
    """The trapezoidal rule (Crank, Nicolson)."""
    return Tableau(
        name="cn",
        order=2,
        A=_rows("0 0", "1/2 1/2"),
        b=_row("1/2 1/2"),
        c=_row("0 1"),
        P=_rows("1 -1/2", "0 1/2"),
        dense_order=2,
        stability="A-stable",
        source="Crank, Nicolson 1947, doi:10.1017/S0305004100023197",
    )


def _implicit_midpoint() -> Tableau:
    """The one-stage Gauss method, symplectic."""
    return Tableau(
        name="implicit_midpoint",
        order=2,
        A=_rows("1/2"),
        b=_row("1"),
        c=_row("1/2"),
        P=_rows("2 -1", "-1 1"),
        dense_order=2,
        stability="A-stable",
        source="HW II, IV.5",
    )


def _sdirk4() -> Tableau:
    return Tableau(
        name="sdirk4",
        order=4,
        A=_lower(
            "1/4",
            "1/2 1/4",
            "17/50 -1/25 1/4",
            "371/1360 -137/2720 15/544 1/4",
            "25/24 -49/48 125/16 -85/12 1/4",
        ),
        b=_row("25/24 -49/48 125/16 -85/12 1/4"),
        c=_row("1/4 3/4 11/20 1/2 1"),
        b_hat=_row("59/48 -17/96 225/32 -85/12 0"),
        embedded_order=3,
        P=_rows(
            "11/3 -463/72 217/36 -20/9",
            "11/2 -385/16 661/24 -10",
            "-125/18 20125/432 -8875/216 250/27",
            "0 -85/4 85/6 0",
            "-11/9 557/108 -359/54 80/27",
        ),
        dense_order=3,
        stability="L-stable",
        source="HW II, table IV.6.5, and the dense output given with it",
    )


_ARK3_B = "1471266399579/7840856788654 -4482444167858/7529755066697 11266239266428/11593286722821 "
_ARK3_GAMMA = "1767732205903/4055673282236"
_ARK3_B_HAT = (
    "2756255671327/12835298489170 -10771552573575/22201958757719 9247589265047/10645013368117 "
    "2193209047091/5459859503100"
)
_ARK3_SOURCE = "Kennedy, Carpenter 2003, doi:10.1016/S0168-9274(02)00138-1, ARK3(2)4L[2]SA"
_ARK4_B = "82889/524892 0 15625/83664 69875/102672 -2260/8211 1/4"
_ARK4_B_HAT = "4586570599/29645900160 0 178811875/945068544 814220225/1159782912 -3700637/11593932 61727/225920"
_ARK4_SOURCE = "Kennedy, Carpenter 2003, doi:10.1016/S0168-9274(02)00138-1, ARK4(3)6L[2]SA"


def _ark3_implicit(name: str, P: Rows, dense_order: int) -> Tableau:
    return Tableau(
        name=name,
        order=3,
        A=_lower(
            "0",
            f"{_ARK3_GAMMA} {_ARK3_GAMMA}",
            f"2746238789719/10658868560708 -640167445237/6845629431997 {_ARK3_GAMMA}",
            _ARK3_B + _ARK3_GAMMA,
        ),
        b=_row(_ARK3_B + _ARK3_GAMMA),
        c=_row("0 1767732205903/2027836641118 3/5 1"),
        b_hat=_row(_ARK3_B_HAT),
        embedded_order=2,
        P=P,
        dense_order=dense_order,
        stability="L-stable",
        source=_ARK3_SOURCE,
        tolerance=1e-23,
    )


def _ark4_implicit(name: str, P: Rows, dense_order: int, tolerance: float = 0) -> Tableau:
    return Tableau(
        name=name,
        order=4,
        A=_lower(
            "0",
            "1/4 1/4",
            "8611/62500 -1743/31250 1/4",
            "5012029/34652500 -654441/2922500 174375/388108 1/4",
            "15267082809/155376265600 -71443401/120774400 730878875/902184768 2285395/8070912 1/4",
            _ARK4_B,
        ),
        b=_row(_ARK4_B),
        c=_row("0 1/2 83/250 31/50 17/20 1"),
        b_hat=_row(_ARK4_B_HAT),
        embedded_order=3,
        P=P,
        dense_order=dense_order,
        stability="L-stable",
        source=_ARK4_SOURCE,
        tolerance=tolerance,
    )


def _esdirk3() -> Tableau:
    return _ark3_implicit("esdirk3", _hermite(_row(_ARK3_B + _ARK3_GAMMA), last=True), 3)


def _esdirk4() -> Tableau:
    # derived here: the quartics of order 4 with slopes K_1 and K_6 at the ends have one parameter, in which the last
    # row is the simplest
    P = _rows(
        "1 -8620844395/2892679812 5195427235/1446339906 -1051472152/723169953",
        "0 -648559/1041579 1297118/1041579 -648559/1041579",
        "0 3480859375/592807248 -22816046875/2074825368 5510265625/1037412684",
        "0 -18332228125/5092428528 25263688375/2546214264 -7182354625/1273107132",
        "0 71540300/45250821 -192900040/45250821 15557840/6464403",
        "0 -1/4 1/2 0",
    )
    return _ark4_implicit("esdirk4", P, 4)


# ---- additive methods ----


def _ark2() -> AdditiveTableau:
    root = Fraction(isqrt(2 * 10**100), 10**50)  # the square root of 2, to 50 digits
    gamma, delta = 1 - root / 2, root / 4
    zero = Fraction(0)
    common: dict[str, Any] = {
        "order": 2,
        "b": (delta, delta, gamma),
        "c": (zero, 2 * gamma, Fraction(1)),
        "b_hat": ((4 - root) / 8, (4 - root) / 8, root / 4),
        "embedded_order": 1,
        "P": ((root / 2, -root / 4), (root / 2, -root / 4), (1 - root, root / 2)),
        "dense_order": 2,
        "source": "Giraldo, Kelly, Constantinescu 2013, doi:10.1137/120876034, ARK2(2,3,2), with PETSc's dense output",
        "tolerance": 1e-45,
    }
    implicit = ((zero, zero, zero), (gamma, gamma, zero), (delta, delta, gamma))
    explicit = ((zero, zero, zero), (2 * gamma, zero, zero), ((3 - 2 * root) / 6, (3 + 2 * root) / 6, zero))
    return AdditiveTableau(
        "ark2",
        2,
        Tableau(name="ark2 (implicit part)", A=implicit, stability="L-stable", **common),
        Tableau(name="ark2 (explicit part)", A=explicit, stability="conditional", **common),
    )


def _ark3() -> AdditiveTableau:
    # derived here: the only cubic of order 3 without further slopes (the published one is quadratic, of order 2)
    P = _rows(
        "1 -1.350078131127539393697637536 0.5377191554742632188589296695",
        "0 -0.2882530517981419474979041084 -0.307044421778813000549918939",
        "0 2.217628682306934436908987085 -1.245838754585162313438475623",
        "0 -0.5792974993812530957134454401 1.015164020889712095129464888",
    )
    implicit = _ark3_implicit("ark3 (implicit part)", P, 3)
    explicit = Tableau(
        name="ark3 (explicit part)",
        order=3,
        A=_lower(
            "0",
            "1767732205903/2027836641118",
            "5535828885825/10492691773637 788022342437/10882634858940",
            "6485989280629/16251701735622 -4246266847089/9704473918619 10755448449292/10357097424841",
        ),
        b=implicit.b,
        c=implicit.c,
        b_hat=implicit.b_hat,
        embedded_order=2,
        P=P,
        dense_order=3,
        stability="conditional",
        source=_ARK3_SOURCE,
        tolerance=implicit.tolerance,
    )
    return AdditiveTableau("ark3", 3, implicit, explicit)


def _ark4() -> AdditiveTableau:
    P = _rows(
        "6943876665148/7220017795957 -54480133/30881146 6818779379841/7100303317025",
        "0 0 0",
        "7640104374378/9702883013639 -11436875/14766696 2173542590792/12501825683035",
        "-20649996744609/7521556579894 174696575/18121608 -31592104683404/5083833661969",
        "8854892464581/2390941311638 -12120380/966161 61146701046299/7138195549469",
        "-11397109935349/6675773540249 3843/706 -17219254887155/4939391667607",
    )
    implicit = _ark4_implicit("ark4 (implicit part)", P, 3, 1e-23)
    explicit = Tableau(
        name="ark4 (explicit part)",
        order=4,
        A=_lower(
            "0",
            "1/2",
            "13861/62500 6889/62500",
            "-116923316275/2393684061468 -2731218467317/15368042101831 9408046702089/11113171139209",
            "-451086348788/2902428689909 -2682348792572/7519795681897 12662868775082/11960479115383 "
            "3355817975965/11060851509271",
            "647845179188/3216320057751 73281519250/8382639484533 552539513391/3454668386233 "
            "3354512671639/8306763924573 4040/17871",
        ),
        b=implicit.b,
        c=implicit.c,
        b_hat=implicit.b_hat,
        embedded_order=3,
        P=P,
        dense_order=3,
        stability="conditional",
        source=_ARK4_SOURCE,
        tolerance=implicit.tolerance,
    )
    return AdditiveTableau("ark4", 4, implicit, explicit)


TABLEAUX: Mapping[str, Tableau] = _Lazy(
    {
        "euler": _euler,
        "midpoint": _midpoint,
        "heun2": _heun2,
        "ralston": _ralston,
        "bosh3": _bosh3,
        "rk4": _rk4,
        "rk4_classic": _rk4_classic,
        "fehlberg": _fehlberg,
        "dopri5": _dopri5,
        "tsit5": _tsit5,
        "dopri8": _dopri8,
        "beuler": _beuler,
        "cn": _cn,
        "implicit_midpoint": _implicit_midpoint,
        "sdirk4": _sdirk4,
        "esdirk3": _esdirk3,
        "esdirk4": _esdirk4,
    }
)
"""The methods by name; each is made when it is first asked for, names are free."""

ADDITIVE: Mapping[str, AdditiveTableau] = _Lazy({"ark2": _ark2, "ark3": _ark3, "ark4": _ark4})
"""The additive methods by name."""
