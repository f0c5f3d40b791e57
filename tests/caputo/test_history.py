"""Exact histories against the sum they are defined by, their transposes, resumption, random access and workspace."""

from __future__ import annotations

import math

import pytest
import torch

from pfde.caputo.history import Exact
from pfde.caputo.history.skeleton import interpolation, nodes
from support.covering import pairs

ALGORITHMS = ["direct", "blocked", "fft"]
LENGTHS = [1, 2, 7, 8, 9, 31, 64, 100, 257]
CHANNELS = [(1, 1), (2, 1), (1, 2), (2, 2)]
EPS = torch.finfo(torch.float64).eps


def make_kernel(outputs, inputs, N, G=None, dtype=torch.float64):
    """A decaying kernel with both signs; lag 0 is NaN, since it must not be used."""
    shape = (outputs, inputs, N + 1) if G is None else (outputs, inputs, N + 1, G)
    lags = torch.arange(1, N + 2, dtype=torch.float64).sqrt().reshape(-1, *([1] * (len(shape) - 3)))
    kernel = (torch.randn(shape, dtype=torch.float64) / lags).to(dtype)
    kernel[:, :, 0] = math.nan
    return kernel


def make_group(d, G):
    """Interleaved, unequal groups: half of the components belong to the last."""
    return torch.clamp(torch.arange(d) % (2 * G), max=G - 1)


def dense(kernel, rows, *, reverse=False, group=None):
    """All outputs, (O, N, d), by the full matrix, in float64."""
    N, d = rows[0].shape
    n = torch.arange(N)
    lag = (n[None, :] - n[:, None]) if reverse else (n[:, None] - n[None, :])
    if group is None:
        kernel, group = kernel.unsqueeze(-1), torch.zeros(d, dtype=torch.int64)
    kernel = torch.where((lag > 0)[..., None], kernel.double()[:, :, lag.clamp(min=0)], 0.0)
    out = torch.empty(kernel.shape[0], N, d, dtype=torch.float64)
    for g in range(kernel.shape[-1]):
        mine = group == g
        out[:, :, mine] = sum(kernel[:, i, :, :, g] @ x[:, mine].double() for i, x in enumerate(rows))
    return out


def inner(c, rows, n):
    return sum(float(a @ x[n - 1]) for a, x in zip(c, rows, strict=True))


def sweep(algorithm, kernel, rows, *, reverse=False, group=None, start=None):
    """All outputs read online, (O, N, d): the buffers hold NaN in the rows not yet passed, and are filled in turn."""
    N = len(rows[0])
    order = range(N, 0, -1) if reverse else range(1, N + 1)
    buffers = [torch.full_like(x, math.nan) for x in rows]
    out = torch.full((kernel.shape[0], *rows[0].shape), math.nan, dtype=rows[0].dtype)
    convolution = None
    for n in order:
        if start is None or n == start or convolution is not None:
            if convolution is None:
                convolution = Exact(algorithm).convolution(kernel, buffers, reverse=reverse, group=group)
            out[:, n - 1] = torch.stack(convolution.read(n))
        for buffer, x in zip(buffers, rows, strict=True):
            buffer[n - 1] = x[n - 1]
    return out


def bound(algorithm, kernel, rows, *, reverse, group, eps=EPS):
    """50 eps sum |kappa| |X|: of each entry, or, by FFT, with the largest in its column."""
    size = dense(kernel.abs(), [x.abs() for x in rows], reverse=reverse, group=group)
    if algorithm == "fft":
        norm = sum(x.double().norm(dim=0) for x in rows)
        size = size + norm * kernel[:, :, 1:].double().norm()
    return 50 * eps * size + 1e-300


# N, d, groups; every N with the transpose below, here those that differ in kind.
CASES = [(1, 1, None), (2, 5, None), (9, 33, None), (100, 5, None), (257, 1, None), (257, 33, None)]
CASES += [(1, 5, 3), (9, 5, 5), (9, 33, 1), (100, 33, 3), (100, 5, 5), (31, 33, 33), (257, 5, 3), (64, 1, 1)]


@pytest.mark.parametrize(
    ("algorithm", "reverse", "channels", "case"), pairs(ALGORITHMS, [False, True], CHANNELS, CASES)
)
def test_equals_the_dense_sum(algorithm, reverse, channels, case):
    torch.manual_seed(0)
    (outputs, inputs), (N, d, G) = channels, case
    group = None if G is None else make_group(d, G)
    kernel = make_kernel(outputs, inputs, N, G)
    rows = [torch.randn(N, d, dtype=torch.float64) for _ in range(inputs)]
    error = (
        sweep(algorithm, kernel, rows, reverse=reverse, group=group) - dense(kernel, rows, reverse=reverse, group=group)
    ).abs()
    allowed = bound(algorithm, kernel, rows, reverse=reverse, group=group)
    assert (error <= allowed).all(), f"{(error / allowed).max():.3g} of the bound"


@pytest.mark.parametrize(
    ("algorithm", "channels", "groups", "N", "d"),
    pairs(ALGORITHMS, CHANNELS, ["none", "two", "all"], LENGTHS, [1, 5, 33]),
)
def test_reverse_is_the_transpose(algorithm, channels, groups, N, d):
    torch.manual_seed(1)
    outputs, inputs = channels
    G = {"none": None, "two": min(2, d), "all": d if N <= 31 else 1}[groups]
    group = None if G is None else make_group(d, G)
    kernel = make_kernel(outputs, inputs, N, G)
    X = [torch.randn(N, d, dtype=torch.float64) for _ in range(inputs)]
    Y = [torch.randn(N, d, dtype=torch.float64) for _ in range(outputs)]
    # Reading is tested elsewhere; here all rows are known, which saves the time of filling them.
    forward = Exact(algorithm).convolution(kernel, X, group=group)
    back = Exact(algorithm).convolution(kernel.transpose(0, 1), Y, reverse=True, group=group)
    left = sum(inner(forward.read(n), Y, n) for n in range(1, N + 1))
    right = sum(inner(back.read(n), X, n) for n in range(N, 0, -1))
    size = dense(kernel.abs(), [x.abs() for x in X], group=group)
    size = float(sum((size[o] * Y[o].abs()).sum() for o in range(outputs)))
    if algorithm == "fft":  # its errors are relative to norms
        size += float(kernel[:, :, 1:].norm()) * sum(float(x.norm()) * float(y.norm()) for x in X for y in Y)
    assert abs(left - right) <= 50 * EPS * math.sqrt(N) * size, f"{left} {right}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("G", [None, 3])
def test_float32(algorithm, reverse, G):
    torch.manual_seed(2)
    N, d = 200, 50
    group = None if G is None else make_group(d, G)
    kernel = make_kernel(2, 1, N, G, torch.float32)
    rows = [torch.randn(N, d)]
    out = sweep(algorithm, kernel, rows, reverse=reverse, group=group)
    assert out.dtype == torch.float32
    error = (out - dense(kernel, rows, reverse=reverse, group=group)).abs()
    eps = torch.finfo(torch.float32).eps
    assert (error <= bound(algorithm, kernel, rows, reverse=reverse, group=group, eps=eps)).all()


def test_long_enough_for_every_level():
    """Several FFT segments per pull, pushes by FFT, and superblocks cut short at the end."""
    torch.manual_seed(3)
    for N, d, G, reverse in [(2050, 3, 3, False), (1100, 40, 2, True), (1300, 2, None, True)]:
        group = None if G is None else make_group(d, G)
        kernel = make_kernel(1, 1, N, G)
        rows = [torch.randn(N, d, dtype=torch.float64)]
        reference = sweep("direct", kernel, rows, reverse=reverse, group=group)
        for algorithm in ("blocked", "fft"):
            error = (sweep(algorithm, kernel, rows, reverse=reverse, group=group) - reference).abs()
            assert error.max() <= 50 * EPS * float(rows[0].norm() * kernel[:, :, 1:].norm()), (algorithm, N, G)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("algorithm", ["blocked", "fft"])
def test_more_orders_than_can_be_tabulated(algorithm, reverse):
    """As many groups as components: the parts of the kernel are gathered from it, a few components at a time."""
    torch.manual_seed(7)
    N, d = 90, 2000
    kernel, rows = make_kernel(1, 1, N, d), [torch.randn(N, d, dtype=torch.float64)]
    group = torch.randperm(d)
    convolution = Exact(algorithm).convolution(kernel, rows, reverse=reverse, group=group)
    lags = torch.arange(1, N)
    for n in range(N, 0, -1) if reverse else range(1, N + 1):
        weights = kernel[0, 0, lags[: N - n] if reverse else lags[: n - 1].flip(0)][:, group]
        part = rows[0][n:] if reverse else rows[0][: n - 1]
        error = (convolution.read(n)[0] - (weights * part).sum(0)).abs()
        size = (weights.abs() * part.abs()).sum(0)
        if algorithm == "fft":
            size = size + kernel[0, 0, 1:].norm(dim=0)[group] * rows[0].norm(dim=0)
        assert (error <= 50 * EPS * size).all(), n


def test_pushes_by_fft(monkeypatch):
    """The scalar history makes them from N = 16384 on only."""
    monkeypatch.setattr("pfde.caputo.history.online_product.FFT_FROM", 32)
    test_long_enough_for_every_level()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("G", [None, 2])
def test_resumed_sweep_is_bitwise_the_same(algorithm, reverse, G):
    torch.manual_seed(4)
    N, d = 600, 4
    group = None if G is None else make_group(d, G)
    kernel, rows = make_kernel(2, 1, N, G), [torch.randn(N, d, dtype=torch.float64)]
    whole = sweep(algorithm, kernel, rows, reverse=reverse, group=group)
    assert torch.equal(whole, sweep(algorithm, kernel, rows, reverse=reverse, group=group))
    for start in (1, 40, 41, 333, N):
        resumed = sweep(algorithm, kernel, rows, reverse=reverse, group=group, start=start)
        part = slice(None, start) if reverse else slice(start - 1, None)
        assert torch.equal(resumed[:, part], whole[:, part]), start


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("G", [None, 2])
def test_rows_equal_read_and_leave_it_alone(algorithm, G):
    torch.manual_seed(5)
    N, d = 150, 4
    group = None if G is None else make_group(d, G)
    kernel, rows = make_kernel(2, 1, N, G), [torch.randn(N, d, dtype=torch.float64)]
    whole = sweep(algorithm, kernel, rows, group=group)
    buffer = rows[0].clone()
    convolution = Exact(algorithm).convolution(kernel, [buffer], group=group)
    for n in range(1, 60):
        convolution.read(n)
    for n0, n1 in [(140, 151), (1, 2), (1, 20), (57, 100), (100, 101)]:
        buffer[:] = math.nan
        buffer[: n1 - 2] = rows[0][: n1 - 2]
        blocks = convolution.rows(n0, n1)
        assert all(block.shape == (n1 - n0, d) for block in blocks)
        assert torch.equal(torch.stack(blocks), whole[:, n0 - 1 : n1 - 1])
    buffer.copy_(rows[0])
    assert torch.equal(torch.stack(convolution.read(60)), whole[:, 59])
    assert convolution.block >= 1


def test_buffers_are_neither_written_nor_copied():
    torch.manual_seed(6)
    rows = [torch.randn(100, 9, dtype=torch.float64)]
    before = rows[0].clone()
    for algorithm in ALGORITHMS:
        convolution = Exact(algorithm).convolution(make_kernel(1, 1, 100), rows)
        for n in range(1, 101):
            convolution.read(n)
    assert torch.equal(rows[0], before)


@pytest.mark.parametrize("outputs", [1, 2])
def test_workspace_is_bounded(outputs):
    """A sixteenth of the buffers per output; temporaries and matrices a little more; with a floor for the small."""
    for N, d in [(32, 8192), (128, 8192), (1024, 8192), (4096, 512)]:
        for algorithm in [None, *ALGORITHMS]:
            if algorithm == "fft" and N < 1024:
                continue
            kernel = torch.ones(outputs, 1, N + 1)
            convolution = Exact(algorithm).convolution(kernel, [torch.zeros(N, d)])
            workspace = convolution.workspace_bytes - (256 << 10) * (N > 32)
            assert workspace <= (0.07 * outputs + 0.15) * N * d * 4, (N, d, algorithm, workspace / (N * d * 4))
    # Thin buffers: matrices, which do not depend on d, are bounded by a constant and by the kernel's length.
    for algorithm in ALGORITHMS:
        convolution = Exact(algorithm).convolution(torch.ones(outputs, 1, 100_001), [torch.zeros(100_000, 1)])
        assert convolution.workspace_bytes <= 4 << 20


def smooth_kernels(N, dtype):
    """What schemes have: power laws, with log, differences of powers with a part 3^-k; a constant, and zero."""
    k = torch.arange(N + 1, dtype=torch.float64)
    k[0] = math.nan
    powers = [k ** (a - 1) for a in (0.01, 0.3, 0.99)] + [k ** (-1 - a) for a in (0.01, 0.5, 0.99)]
    others = [k**-0.7 * (k.log() + 1), k**-1.5 * (k.log() - 3), k**-1.5 - 3.0**-k, 0 * k + 2, 0 * k]
    return [kernel.to(dtype) for kernel in powers + others]


@pytest.mark.parametrize(
    ("dtype", "N", "part"),
    pairs([torch.float32, torch.float64], [129, 200, 300, 512, 768, 1000, 1024, 1025], range(4)),
)
def test_interpolated_pulls(dtype, N, part):
    """Equal to the dense sum, and transposes, to rounding; whole superblocks and cut short ones, and too small N."""
    torch.manual_seed(8)
    eps, exact, size = torch.finfo(dtype).eps, Exact("blocked"), 3
    kernels = smooth_kernels(N, dtype)
    for channels in [*((kernel,) for kernel in kernels), kernels[2:4], kernels[7:9]][part::4]:
        kernel = torch.stack(channels).unsqueeze(1)
        X = torch.randn(N, size, dtype=dtype)
        Y = [torch.randn(N, size, dtype=dtype) for _ in channels]
        forward = exact.convolution(kernel, [X])
        back = exact.convolution(kernel.transpose(0, 1), Y, reverse=True)
        least = 512 if dtype == torch.float32 else 768
        expected = least <= N
        assert (forward.interpolated, back.interpolated) == (expected, expected)
        left = torch.stack([torch.stack(forward.read(n)) for n in range(1, N + 1)], dim=1)
        right = torch.stack([torch.stack(back.read(n)) for n in range(N, 0, -1)], dim=1).flip(1)
        assert_rounding(left, kernel, [X], False, eps)
        assert_rounding(right, kernel.transpose(0, 1), Y, True, eps)
        product = sum(float((c.double() * y.double()).sum()) for c, y in zip(left, Y, strict=True))
        scale = dense(kernel.abs(), [X.abs()])
        scale = float(sum((scale[o] * Y[o].double().abs()).sum() for o in range(len(Y))))
        assert abs(product - float((right[0].double() * X.double()).sum())) <= 50 * eps * math.sqrt(N) * scale


def assert_rounding(out, kernel, rows, reverse, eps):
    error = (out - dense(kernel, rows, reverse=reverse)).abs()
    allowed = 50 * eps * dense(kernel.abs(), [x.abs() for x in rows], reverse=reverse)
    assert (error <= allowed).all(), f"{(error / allowed).max():.3g} of the bound"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("N", [700, 1024])
def test_interpolated_sweeps_resume_and_replay(reverse, N):
    """Bitwise, from buffers that hold NaN in the rows not yet passed."""
    torch.manual_seed(9)
    kernel = torch.stack(smooth_kernels(N, torch.float32)[:2]).unsqueeze(1)
    rows = [torch.randn(N, 3)]
    whole = sweep("blocked", kernel, rows, reverse=reverse)
    for start in (1, 129, 300, 640, 650, N):
        resumed = sweep("blocked", kernel, rows, reverse=reverse, start=start)
        part = slice(None, start) if reverse else slice(start - 1, None)
        assert torch.equal(resumed[:, part], whole[:, part]), start
    if not reverse:
        convolution = Exact("blocked").convolution(kernel, rows)
        assert convolution.interpolated
        for n0, n1 in [(N - 30, N + 1), (1, 20), (500, 700)]:
            assert torch.equal(torch.stack(convolution.rows(n0, n1)), whole[:, n0 - 1 : n1 - 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reverse", [False, True])
def test_rough_kernels_are_not_interpolated(dtype, reverse):
    """Random ones, one lag out of line, a kink, an oscillation, in one channel of two: all fall back."""
    torch.manual_seed(10)
    N, eps = 1024, torch.finfo(dtype).eps
    k = torch.arange(N + 1, dtype=torch.float64).clamp(min=1)
    rows = [torch.randn(N, 2, dtype=dtype)]
    spikes = [k**-0.5 * (1 + 1e3 * eps * (k == lag).double()) for lag in (70, 444, 1000)]
    for rough in [torch.randn(N + 1), *spikes, (k - 500).abs(), (-1) ** k / k, torch.where(k == 900, math.nan, k)]:
        kernel = torch.stack([k**-0.3, rough]).unsqueeze(1).to(dtype)
        if reverse:
            kernel = kernel[1:]
        convolution = Exact("blocked").convolution(kernel, rows, reverse=reverse)
        assert not convolution.interpolated
        out = [torch.stack(convolution.read(n)) for n in (range(N, 0, -1) if reverse else range(1, N + 1))]
        out = torch.stack(out, dim=1)
        if not kernel.isnan().any():
            assert_rounding(out.flip(1) if reverse else out, kernel, rows, reverse, eps)


def test_interpolation_reproduces_polynomials():
    """P to the accuracy of its definition, of sizes that cannot have Chebyshev points (r near M) too."""
    for M, r in [(128, 16), (128, 32), (64, 16), (96, 32), (48, 16), (12, 11)]:
        points, P = nodes(M, r), interpolation(M, r)
        assert points == sorted(set(points)) and points[0] == 0 and points[-1] == M - 1 and len(points) == r
        assert torch.equal(P[points], torch.eye(r, dtype=torch.float64))
        x = torch.linspace(-1, 1, M, dtype=torch.float64)
        for degree in range(r):
            values = torch.cos(degree * x.acos())
            assert (P @ values[points] - values).abs().max() <= 50 * EPS * float(P.abs().sum(1).max())


def test_default_chooses():
    names = {N: Exact().convolution(torch.ones(1, 1, N + 1), [torch.zeros(N, 64)]).algorithm for N in (16, 8192, 32768)}
    assert names == {16: "direct", 8192: "blocked", 32768: "fft"}


def test_out_of_order_reads_raise():
    for algorithm in ALGORITHMS:
        kernel, rows = torch.ones(1, 1, 41), [torch.zeros(40, 2)]
        forward = Exact(algorithm).convolution(kernel, rows)
        back = Exact(algorithm).convolution(kernel, rows, reverse=True)
        for convolution, first, wrong in [(forward, 3, 5), (back, 30, 31)]:
            with pytest.raises(RuntimeError, match="out of order"):
                convolution.read(41)
            convolution.read(first)
            for n in (first, wrong, 0):
                with pytest.raises(RuntimeError, match=rf"got n = {n}, expected {first + (1 if wrong == 5 else -1)}"):
                    convolution.read(n)
        with pytest.raises(RuntimeError, match="forward history"):
            back.rows(1, 3)


def test_invalid_arguments():
    with pytest.raises(ValueError, match=r"algorithm must be None or one of .*direct.*got 'fast'"):
        Exact("fast")
    make = Exact().convolution
    rows, group = [torch.zeros(10, 3)], torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="kernel must be"):
        make(torch.ones(1, 1, 10), rows)
    with pytest.raises(ValueError, match=r"kernel must be .*G"):
        make(torch.ones(1, 1, 11), rows, group=group)
    with pytest.raises(ValueError, match="contiguous"):
        make(torch.ones(1, 1, 11), [torch.zeros(3, 10).t()])
    with pytest.raises(ValueError, match="group must index"):
        make(torch.ones(1, 1, 11, 2), rows, group=group + 2)
    with pytest.raises(ValueError, match=r"rows\[1\] must"):
        make(torch.ones(1, 2, 11), [rows[0], rows[0].double()])
    with pytest.raises(TypeError, match="float32 or float64"):
        make(torch.ones(1, 1, 11), [torch.zeros(10, 3, dtype=torch.int64)])
