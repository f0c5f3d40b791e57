"""The covering arrays that stand for products in the tests: every pair occurs, and there are few of them."""

from itertools import combinations, product

import pytest

from support import covering

FACTORS = (range(7), "abcd", [1.5, 2.5, 3.5], range(6))


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(covering, "EXHAUSTIVE", False)


@pytest.mark.parametrize(
    "valid", [lambda *_: True, lambda a, b, c, d: a != d and (b != "a" or c < 3)], ids=["free", "constrained"]
)
def test_every_pair_of_a_valid_row_occurs(valid):
    rows = covering.pairs(*FACTORS, valid=valid)
    whole = [row for row in product(*FACTORS) if valid(*row)]
    for i, j in combinations(range(len(FACTORS)), 2):
        assert {(r[i], r[j]) for r in rows} == {(r[i], r[j]) for r in whole}
    assert set(rows) <= set(whole) and len(rows) == len(set(rows))


def test_there_are_not_many_more_than_the_largest_two_factors_need():
    assert 42 <= len(covering.pairs(*FACTORS)) <= 50 and len(covering.pairs("abc", range(4))) == 12


def test_the_choice_is_always_the_same():
    assert covering.pairs(*FACTORS) == covering.pairs(*FACTORS)


def test_some_are_spread_evenly_from_the_first_on():
    assert covering.some(range(10), 5) == [0, 2, 4, 6, 8] and covering.some("ab", 5) == ["a", "b"]


def test_all_of_them_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(covering, "EXHAUSTIVE", True)
    assert covering.pairs(*FACTORS) == list(product(*FACTORS)) and covering.some(range(10), 5) == list(range(10))
