"""Differences of powers, binomial coefficients and 1/Gamma: the sequences convolution weights are made of.

Every weight of a uniform-grid scheme for ``D^alpha y = f`` is 1/Gamma times one of four sequences in the lag k: a first
or second difference of k^p (product rectangle, p = alpha; trapezoid, p = 1 + alpha; L1, p = 1 - alpha; Diethelm, Ford,
Freed 2004, doi:10.1023/B:NUMA.0000027736.85078.be), the trapezoid's start column, or the binomial coefficients
(-1)^k C(alpha, k) of Gruenwald-Letnikov (Lubich 1986, doi:10.1137/0517050). Taken literally each loses digits with k
(second differences of k^p: all of them near k = 1e8), so each is written here as a leading power of k, times a factor
that carries the zeros in the order exactly (p (p - 1), alpha (1 - alpha)), times a short series in 1/k whose terms do
not cancel. Symbols: k or n the lag, p or alpha the order, G the number of orders, C(p, m) a binomial coefficient.

Arguments ``p``, ``alpha`` are float64 tensors of shape (G,), results are (count, G). All functions are plain torch
operations, differentiable in the order by forward and by reverse mode up to and including alpha = 1.

NOTE 1. The order is the float64 number received. A caller who rounds p = 1 + alpha or 1 - alpha moves alpha by up to
1.1e-16, which is a relative change of up to 1.1e-16 / alpha in a second difference.

NOTE 2. Lags are evaluated in blocks, laid out (G, rows), of at most 2^14 numbers: temporaries stay in cache, torch does
not split ``pow`` over threads, and an entry's bits depend neither on ``count``, nor on the other orders, nor on the
thread count. (torch's vectorised and scalar ``pow`` round differently, so a loop's end shows in the last bit. Hence
blocks are computed whole, cut at multiples of 16. Above G = 1024 blocks grow, and threads may show in the last bit.)
On a machine whose cores are all busy run with one thread: each block's log1p and expm1 still wait for all threads.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

_BITS = 54  # series stop below 2^-54 of their first term
_BLOCK_NUMBERS = 2**14  # G * rows of one block; half of what torch would split over threads
_BLOCK_ROWS = 16  # smallest block, and the multiple at which blocks end: two AVX-512 vectors
_HORNER_TERMS = 8  # longest series evaluated term by term
_STIRLING_FLOOR = 16  # from this lag on the gamma ratio's asymptotic series reaches 2^-54


def first_difference(count: int, p: Tensor) -> Tensor:
    """First differences (k+1)^p - k^p for k = 0..count-1, shape (count, G), p in [0, 2].

    Evaluated as k^p expm1(p log1p(1/k)), relative error below 2e-15 for every k, also as p -> 0. Entry 0 is 1, with
    derivative 0, at p = 0 too (the limit p -> 0+, which L1 needs at alpha = 1). Cost: O(count G), 0.3 s for 1e7.
    """

    def block(k: Tensor, floor: int) -> Tensor:
        return k ** p[:, None] * torch.expm1(p[:, None] * torch.log1p(1 / k))

    return _tabulate(count, [torch.ones_like(p), torch.expm1(p * math.log(2))], block)


def second_difference(count: int, p: Tensor) -> Tensor:
    """Second differences (k+1)^p - 2 k^p + (k-1)^p for k = 0..count-1, shape (count, G), p in [0, 2].

    Entry 0 is 1 with derivative 0: the caller's weight at lag 0 follows another formula (product trapezoid and L1 both
    have 1 there). Entry 1 is 2^p - 2 (0^p := 0). From k = 2 on 2 k^(p-2) sum_{m>=1} C(p, 2m) k^(-2(m-1)): all terms
    have one sign and the factor p (p - 1), so the relative error stays below 2e-15 also as p -> 0, 1, where
    the sequence vanishes. Cost: O(count G), 0.3 s for 1e7.
    """
    j = 2.0 * torch.arange(3, 1 + _terms(2, 2), dtype=p.dtype, device=p.device)
    later = ((j - 2) - p[:, None]) * ((j - 1) - p[:, None]) / (j * (j - 1))
    coefficients = _running_products(p * (p - 1), (2 - p) * (3 - p) / 12, later)  # 2 C(p, 2m)

    def block(k: Tensor, floor: int) -> Tensor:
        x = 1 / k**2
        return k ** p[:, None] * x * _power_series(coefficients[:, : _terms(floor, 2)], x)

    return _tabulate(count, [torch.ones_like(p), 2 * torch.expm1((p - 1) * math.log(2))], block)


def starting_difference(count: int, alpha: Tensor) -> Tensor:
    """Start column (n-1)^(alpha+1) - (n-1-alpha) n^alpha for n = 0..count-1, shape (count, G), alpha in [0, 1].

    Divided by Gamma(alpha+2) this is the product trapezoid's weight of F_0 in row n. Entry 0 := 0 and entry 1 = alpha.
    From n = 2 on n^(alpha-1) sum_{m>=2} C(alpha+1, m) (-1/n)^(m-2), whose terms are positive with the factor alpha:
    relative error below 2e-15. Cost: O(count G), 0.4 s for 1e7.
    """
    m = torch.arange(4, 2 + _terms(2, 1), dtype=alpha.dtype, device=alpha.device)
    later = ((m - 2) - alpha[:, None]) / m
    coefficients = _running_products(alpha * (alpha + 1) / 2, (1 - alpha) / 3, later)  # (-1)^m C(alpha+1, m)

    def block(n: Tensor, floor: int) -> Tensor:
        return n ** alpha[:, None] / n * _power_series(coefficients[:, : _terms(floor, 1)], 1 / n)

    return _tabulate(count, [torch.zeros_like(alpha), alpha], block)


def binomial_coefficients(count: int, alpha: Tensor) -> Tensor:
    """Gruenwald-Letnikov coefficients g_k = (-1)^k C(alpha, k) for k = 0..count-1, shape (count, G), alpha in [0, 1].

    Below k = 16 the recursion g_k = ((k-1) - alpha)/k g_{k-1}. From there on, where a product of k factors would
    collect k roundings, g_k = Gamma(k-alpha) / (Gamma(-alpha) Gamma(k+1)) by the expansion of Tricomi and Erdelyi
    (1951, doi:10.2140/pjm.1951.1.133) about w = k - alpha/2, where it has even powers only:

        g_k = -alpha (1-alpha) / Gamma(2-alpha) w^(-1-alpha) sum_m c_m w^(-2m),    c_0 = 1,
        c_m = (1+alpha)_{2m} [t^(2m)] (sinh(t/2) / (t/2))^alpha.

    Relative error below 4e-15 for every k; exactly zero for k >= 2 at alpha = 1 (its derivative: 1/(k(k-1))).
    Cost: O(count G), 0.4 s for 1e7.
    """
    k = torch.arange(3, _STIRLING_FLOOR, dtype=alpha.dtype, device=alpha.device)
    head = _running_products(-alpha, (1 - alpha) / 2, ((k - 1) - alpha[:, None]) / k).unbind(1)
    scale = -alpha * (1 - alpha) * reciprocal_gamma(2 - alpha)
    coefficients = _gamma_ratio_series(alpha, _terms(_STIRLING_FLOOR, 2))

    def block(k: Tensor, floor: int) -> Tensor:
        w = k - alpha[:, None] / 2
        return scale[:, None] * w ** -alpha[:, None] / w * _power_series(coefficients[:, : _terms(floor, 2)], 1 / w**2)

    return _tabulate(count, [torch.ones_like(alpha), *head], block)


def reciprocal_gamma(x: Tensor) -> Tensor:
    """1/Gamma(x) for x in [0, 4], the shape of x; relative error below 1e-15, exact at x = 0, 1, 2.

    Reduced by Gamma(x+1) = x Gamma(x) to (1, 2], where log Gamma is small and its rounding harmless.
    """
    one = torch.ones_like(x)
    reduced = torch.where(x <= 1, x + 1, torch.where(x > 3, x - 2, torch.where(x > 2, x - 1, x)))
    factor = torch.where(x <= 1, x, one) / (torch.where(x > 2, x - 1, one) * torch.where(x > 3, x - 2, one))
    return factor * torch.exp(-torch.lgamma(reduced))


def _tabulate(count: int, head: Sequence[Tensor], block: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Entries ``head`` for the first lags, then ``block(k, floor)`` on rows k of shape (1, rows); (count, G)."""
    orders = head[-1]
    assert orders.dim() == 1 and orders.dtype == torch.float64 and len(head) in (2, _STIRLING_FLOOR)
    columns = [torch.stack(list(head), dim=1)]
    for floor, start, stop in _blocks(len(head), count, len(orders)):
        k = torch.arange(start, stop, dtype=orders.dtype, device=orders.device)[None, :]
        columns.append(block(k, floor))
    return torch.cat(columns, dim=1)[:, :count].T.contiguous()


def _blocks(first: int, count: int, orders: int) -> Iterator[tuple[int, int, int]]:
    """Ranges (start, stop) that cover first..count-1, each within one level [floor, 8 floor) of series length."""
    rows = max(_BLOCK_ROWS, _BLOCK_NUMBERS >> (orders - 1).bit_length())
    floor = first
    while floor < count:
        for start in range(floor, min(8 * floor, count), rows):
            yield floor, start, min(start + rows, 8 * floor)
        floor *= 8


def _terms(floor: int, powers: int) -> int:
    """Terms of a series in k^-powers, k >= floor = 2^j, with coefficients not above its first, to 2^-54 of the sum."""
    return math.ceil(_BITS / (powers * (floor.bit_length() - 1)))


def _running_products(first: Tensor, second: Tensor, later: Tensor) -> Tensor:
    """Running products of the factors first (G,), second (G,), later (G, n), shape (G, n + 2).

    ``later`` must not vanish: torch (2.13) differentiates cumprod twice wrongly at a zero factor.
    """
    tail = torch.cat([torch.ones_like(first)[:, None], later.cumprod(1)], dim=1)
    return torch.cat([first[:, None], (first * second)[:, None] * tail], dim=1)


def _power_series(coefficients: Tensor, x: Tensor) -> Tensor:
    """sum_m coefficients[:, m] x^m, shape (G, rows), for coefficients (G, terms) and x (1 or G, rows).

    Long series, which have few rows, are summed in one operation: under jvp each operation costs 0.1 ms. Short ones by
    Horner, where reverse mode keeps x once when it is constant, not one intermediate per term.
    """
    terms = coefficients.shape[1]
    if terms > _HORNER_TERMS:
        powers = x[:, :, None] ** torch.arange(terms, dtype=x.dtype, device=x.device)
        return (coefficients[:, None, :] * powers).sum(2)
    *lower, value = torch.split(coefficients, 1, dim=1)
    for coefficient in reversed(lower):
        value = value * x + coefficient
    return value


def _gamma_ratio_series(alpha: Tensor, terms: int) -> Tensor:
    """c_m = (1+alpha)_{2m} [t^(2m)] (sinh(t/2)/(t/2))^alpha for m = 0..terms-1, shape (G, terms)."""
    table = torch.tensor(_sinhc_power(terms), dtype=alpha.dtype, device=alpha.device)
    power = _power_series(table, alpha[None, :]).T
    m = torch.arange(1, terms, dtype=alpha.dtype, device=alpha.device)
    pairs = (alpha[:, None] + (2 * m - 1)) * (alpha[:, None] + 2 * m)
    return torch.cat([torch.ones_like(alpha)[:, None], pairs.cumprod(1)], dim=1) * power


@cache
def _sinhc_power(terms: int) -> list[list[float]]:
    """table[m][j]: [t^(2m) alpha^j] (sinh(t/2)/(t/2))^alpha, by Miller's recursion on polynomials in alpha.

    With u = t^2 and sinh(t/2)/(t/2) = sum f_i u^i, the power s satisfies m s_m = sum_i ((alpha+1) i - m) f_i s_{m-i}.
    """
    table = [[1.0] + [0.0] * (terms - 1)]
    for m in range(1, terms):
        row = [0.0] * terms
        for i in range(1, m + 1):
            scale = 1 / (4**i * math.factorial(2 * i + 1) * m)
            for j, s in enumerate(table[m - i][:-1]):
                row[j] += scale * (i - m) * s
                row[j + 1] += scale * i * s
        table.append(row)
    return table
