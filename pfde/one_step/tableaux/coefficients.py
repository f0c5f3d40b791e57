"""The numbers of a tableau: rows of fractions, read from text, and the dense output that every method has."""

from __future__ import annotations

from fractions import Fraction

Row = tuple[Fraction, ...]
Matrix = tuple[Row, ...]


def row(text: str) -> Row:
    """Fractions and decimals, separated by blanks."""
    return tuple(map(Fraction, text.split()))


def rows(*texts: str) -> Matrix:
    """The rows of a matrix."""
    return tuple(map(row, texts))


def lower(*texts: str) -> Matrix:
    """A square matrix by the leading entries of its rows."""
    return tuple(x + (Fraction(0),) * (len(texts) - len(x)) for x in map(row, texts))


def hermite(b: Row, last: bool = False) -> Matrix:
    """P of the cubic Hermite polynomial: y and f at both ends of the step, of order min(order, 3).

    b_i(theta) = (3 theta^2 - 2 theta^3) b_i + [i = 1] (theta - 2 theta^2 + theta^3) + [at the end] (theta^3 - theta^2).
    The slope at the end is K_s where `last`, which Y_s = y_{n+1} must justify, else K_{s+1}.
    """
    P = [[Fraction(0), 3 * x, -2 * x] for x in (b if last else (*b, Fraction(0)))]
    for i, slope in ((0, (1, -2, 1)), (-1, (0, -1, 1))):
        P[i] = [x + y for x, y in zip(P[i], slope, strict=True)]
    return tuple(map(tuple, P))
