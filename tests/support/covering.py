"""Covering arrays: of a product of factors the few combinations in which every pair of values of two factors occurs.

A fault that needs one value, or two together, is met by them as by the whole product, which takes many times longer.
PFDE_EXHAUSTIVE=1 takes the whole product. The choice is greedy (Cohen, Dalal, Fredman, Patton 1997,
doi:10.1109/32.605761) and always the same.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product

EXHAUSTIVE = os.environ.get("PFDE_EXHAUSTIVE", "0") not in ("", "0")


def pairs(*factors: Iterable, valid: Callable[..., bool] = lambda *_: True) -> list[tuple]:
    """Rows with one value of each factor, all `valid`, in which every pair that a valid row can have occurs."""
    values = [list(factor) for factor in factors]
    rows = [index for index in product(*(range(len(v)) for v in values)) if valid(*_named(values, index))]
    return [_named(values, index) for index in (rows if EXHAUSTIVE else _cover(rows, len(values)))]


def some(cases: Iterable, count: int) -> list:
    """So many of these cases, evenly spread over them, the first among them."""
    cases = list(cases)
    if EXHAUSTIVE or count >= len(cases):
        return cases
    return [cases[i * len(cases) // count] for i in range(count)]


def _named(values: Sequence[list], index: tuple[int, ...]) -> tuple:
    return tuple(v[i] for v, i in zip(values, index, strict=True))


def _cover(rows: list[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """Again and again the row with the most pairs that have not occurred, of those the one least used so far."""
    columns = list(combinations(range(count), 2)) or [(0, 0)]
    bits: dict[tuple[int, int, int, int], int] = {}  # of each pair one, so that a set of pairs is a number
    met = {row: sum(bits.setdefault((i, j, row[i], row[j]), 1 << len(bits)) for i, j in columns) for row in rows}
    missing = (1 << len(bits)) - 1
    used: dict[tuple[int, int], int] = {}
    chosen = []
    while missing:
        most = max((pairs & missing).bit_count() for pairs in met.values())
        met = {row: pairs for row, pairs in met.items() if pairs & missing}
        best = max(
            (row for row, pairs in met.items() if (pairs & missing).bit_count() == most),
            key=lambda row: -sum(used.get(x, 0) for x in enumerate(row)),
        )
        missing &= ~met[best]
        for x in enumerate(best):
            used[x] = used.get(x, 0) + 1
        chosen.append(best)
    return sorted(chosen)
