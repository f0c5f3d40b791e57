"""Bounded histories against the dense sum of their own kernel: values, transposes, resumption, what they may not read.

Each kernel is written down twice: as pfde's blocks see it (`LagKernel`, `IntervalKernel`), and here as a matrix,

    uniform      kappa_k = near_k (k <= L),   sum_q w_q exp(-s_q (k - L - 1)) beyond
    nonuniform   kappa_nj = near_n (j = n - 1),   sum_q w_q exp(-s_q (t_n - t_{j+1})) g_qj  (1 <= j <= n - 2)

Tolerance: 50 eps times the sum of the absolute values of all terms, modes counted one by one since they may cancel. An
entry is a sum of a few dozen products of at most three factors. Of these exp(-x) has an error of x eps; modes have
decayed in up to N / b = 33 blocks, each with one rounding (measured: 10 eps).
"""

import math

import pytest
import torch

from pfde.caputo.graded import graded
from pfde.caputo.history.bounded import BLOCK, GROUPED_BLOCK, PUSH_FROM, BoundedConvolution
from pfde.caputo.history.exponentials import IntervalKernel, LagKernel
from pfde.caputo.intervals import quadrature
from support.covering import pairs

CHANNELS = [(1, 1), (2, 1), (1, 2), (2, 2)]
LENGTHS = [1, 2, 31, 32, 33, 64, 100, 257]
KINDS = ["exponentials", "long window", "short memory", "graded", "random steps"]
MODES = 9
every_kind = pytest.mark.parametrize("kind", KINDS)


def size_of(G):
    return BLOCK if G == 1 else GROUPED_BLOCK


def by_order(d, G):
    """The order of each component, interleaved and of unequal numbers; None for one order."""
    return None if G == 1 else torch.clamp(torch.arange(d) % (2 * G), max=G - 1)


class Lags:
    """A uniform kernel with O outputs and I inputs: L exact lags, and modes."""

    def __init__(self, kind, outputs, inputs, N, G):
        L, Q = {"exponentials": (1, MODES), "long window": (40, MODES), "short memory": (12, 0)}[kind]
        self.G, self.N = G, N
        nodes = torch.logspace(-4, 1, Q, dtype=torch.float64)
        modes = torch.randn(outputs, inputs, Q, G, dtype=torch.float64)
        near = torch.full((outputs, inputs, L + size_of(G), G), math.nan, dtype=torch.float64)  # lag 0 is not used
        near[:, :, 1 : L + 1] = torch.randn(outputs, inputs, L, G, dtype=torch.float64)
        k = torch.arange(near.shape[2] - L - 1, dtype=torch.float64)
        near[:, :, L + 1 :] = torch.einsum("kq,oiqg->oikg", torch.exp(-k[:, None] * nodes), modes)
        self.near, self.modes, self.nodes, self.L = near, modes, nodes, L

    def transposed(self):
        other = object.__new__(Lags)
        other.__dict__.update(self.__dict__)
        other.near, other.modes = self.near.transpose(0, 1), self.modes.transpose(0, 1)
        return other

    def blocks(self, *, reverse):
        return LagKernel(self.near, self.modes, self.nodes, self.N, size_of(self.G))

    def dense(self, *, reverse):
        """(O, I, N, N, G) of the values and of the sums of absolute values."""
        k = torch.arange(self.N + 1, dtype=torch.float64)
        found = []
        for near, modes in ((self.near, self.modes), (self.near.abs(), self.modes.abs())):
            decays = torch.exp(-(k - self.L - 1).clamp(min=0)[:, None] * self.nodes)
            kernel = torch.einsum("kq,oiqg->oikg", decays, modes)
            exact = min(self.L, self.N)
            kernel[:, :, 1 : exact + 1] = near[:, :, 1 : exact + 1]
            n = torch.arange(self.N)
            lag = n[None, :] - n[:, None] if reverse else n[:, None] - n[None, :]
            found.append(torch.where((lag > 0)[:, :, None], kernel[:, :, lag.clamp(min=0)], 0.0))
        return found


class OnGrid:
    """A kernel on a nonuniform grid: by channel a rule, and a sum of exponentials with O x I weights."""

    def __init__(self, kind, outputs, inputs, N, G):
        self.G, self.N, self.outputs, self.inputs = G, N, outputs, inputs
        steps = 10 ** (2 * torch.rand(N, dtype=torch.float64))
        self.t = graded(1.0, 3.0, N, 2.5) if kind == "graded" else torch.cat([torch.zeros(1), steps.cumsum(0) / 100])
        self.rules = tuple(quadrature(rule, self.t) for rule in ("linear", "left")[:outputs])
        self.nodes = torch.logspace(-2, 3, MODES, dtype=torch.float64)
        self.near = torch.randn(outputs, inputs, N + 1, G, dtype=torch.float64)
        self.modes = torch.randn(outputs, inputs, MODES, G, dtype=torch.float64)
        self.turned = False

    def transposed(self):
        other = object.__new__(OnGrid)
        other.__dict__.update(self.__dict__)
        other.turned = True
        return other

    def blocks(self, *, reverse):
        assert reverse == self.turned
        near, modes = (x.transpose(0, 1) if reverse else x for x in (self.near, self.modes))
        return IntervalKernel(near, modes, self.nodes, self.t, self.rules, size_of(self.G), reverse=reverse)

    def dense(self, *, reverse):
        """As of `Lags`; the row of F_0 is not part of it."""
        t, N, s = self.t, self.N, self.nodes
        n = torch.arange(1, N + 1)
        distance = (t[1:, None] - t[(n + 1).clamp(max=N)]).clamp(min=0)
        decays = torch.exp(-distance[:, :, None] * s)
        later = (n[:, None] - n >= 2)[:, :, None]
        found = []
        for near, modes in ((self.near, self.modes), (self.near.abs(), self.modes.abs())):
            kernel = torch.zeros(self.outputs, self.inputs, N, N, self.G, dtype=torch.float64)
            for c, rule in enumerate(self.rules):
                g = torch.nn.functional.pad(rule.moments(s, 1, N), (0, 1)).T
                kernel[c] = torch.where(later, ((decays * g) @ modes[c][:, None]), 0.0)
            kernel[:, :, n[1:] - 1, n[1:] - 2] = near[:, :, 2:]
            found.append(kernel.permute(1, 0, 3, 2, 4) if reverse else kernel)
        return found


def make(kind, outputs, inputs, N, G):
    return (OnGrid if kind in ("graded", "random steps") else Lags)(kind, outputs, inputs, N, G)


def apply(kernel, rows, group):
    """(O, N, d), the dense sum in float64."""
    out = torch.zeros(len(kernel), *rows[0].shape, dtype=torch.float64)
    for g in range(kernel.shape[4]):
        mine = slice(None) if group is None else group == g
        out[:, :, mine] = sum(kernel[:, i, :, :, g] @ x[:, mine].double() for i, x in enumerate(rows))
    return out


def convolution(kernel, d, dtype, *, reverse, group):
    return BoundedConvolution(
        kernel.blocks(reverse=reverse), d, dtype, torch.device("cpu"), reverse=reverse, group=group
    )


def poison(history):
    """NaN in all that a sweep has not passed yet: the rows of the ring to come, and the results to come."""
    passed = history._kernel.lags + history._u
    for ring in history._ring:
        ring[passed:] = math.nan


def sweep(history, rows, *, reverse, seen=None, first=0):
    """All outputs read online, (O, N, d), from the `first`-th step of travel on; `seen` gets each state."""
    N = len(rows[0])
    out = None
    for n in (range(N, 0, -1) if reverse else range(1, N + 1))[first:]:
        poison(history)
        c = torch.stack(history.read(n))
        out = torch.full((len(c), *rows[0].shape), math.nan, dtype=rows[0].dtype) if out is None else out
        out[:, n - 1] = c
        history.push(n, [x[n - 1] for x in rows])
        if seen is not None:
            seen.append({name: x.clone() for name, x in history.state().items()})
    return out


def check(kind, outputs, inputs, N, d, G, dtype):
    """The largest error of a sweep in each direction, over its bound."""
    kernel, group, worst = make(kind, outputs, inputs, N, G), by_order(d, G), 0.0
    for reverse in (False, True):
        if reverse:
            kernel, outputs, inputs = kernel.transposed(), inputs, outputs
        rows = [torch.randn(N, d, dtype=torch.float64).to(dtype) for _ in range(inputs)]
        dense, size = kernel.dense(reverse=reverse)
        out = sweep(convolution(kernel, d, dtype, reverse=reverse, group=group), rows, reverse=reverse)
        assert out.dtype == dtype and out.shape == (outputs, N, d)
        error = (out - apply(dense, rows, group)).abs()
        bound = torch.finfo(dtype).eps * apply(size, [x.abs() for x in rows], group) + 1e-300
        assert not error.isnan().any(), f"{kind} N={N} G={G} reverse={reverse}: a row not yet passed was read"
        worst = max(worst, float((error / bound).max()))
    return worst


@pytest.mark.parametrize(
    ("kind", "channels", "N", "G", "dtype"),
    pairs(KINDS, CHANNELS, LENGTHS, [1, 3], [torch.float64])
    + pairs(KINDS, CHANNELS, [33, 100], [1, 3], [torch.float32]),
)
def test_equals_the_dense_sum(kind, channels, N, G, dtype):
    torch.manual_seed(0)
    error = check(kind, *channels, N, 5, G, dtype)
    assert error <= 50, f"{error:.3g} eps, allowed 50"


@pytest.mark.smoke
@every_kind
def test_equals_the_dense_sum_of_wide_states(kind):
    """From PUSH_FROM components on rows are pushed more often."""
    torch.manual_seed(1)
    for d, G in ((1, 1), (PUSH_FROM, 1), (40, 2)):
        assert check(kind, 2, 1, 70, d, G, torch.float64) <= 50


@pytest.mark.parametrize(("kind", "channels", "N", "G"), pairs(KINDS, CHANNELS, [1, 2, 33, 100], [1, 3]))
def test_reverse_is_the_transpose(kind, channels, N, G):
    """<C x, z> = <x, C^T z>, both by recurrences."""
    torch.manual_seed(2)
    d, (outputs, inputs) = 5, channels
    group = by_order(d, G)
    kernel = make(kind, outputs, inputs, N, G)
    x = [torch.randn(N, d, dtype=torch.float64) for _ in range(inputs)]
    z = [torch.randn(N, d, dtype=torch.float64) for _ in range(outputs)]
    Cx = sweep(convolution(kernel, d, x[0].dtype, reverse=False, group=group), x, reverse=False)
    Ctz = sweep(convolution(kernel.transposed(), d, x[0].dtype, reverse=True, group=group), z, reverse=True)
    left, right = float((Cx * torch.stack(z)).sum()), float((Ctz * torch.stack(x)).sum())
    _, size = kernel.dense(reverse=False)
    scale = float((apply(size, [v.abs() for v in x], group) * torch.stack(z).abs()).sum())
    assert abs(left - right) <= 50 * torch.finfo(torch.float64).eps * scale, f"{left} {right}"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("G", [1, 3])
@every_kind
def test_a_restored_history_goes_on_bitwise(kind, G, reverse):
    """From the state behind any step, in a history that never saw the steps before, and in one that saw all."""
    torch.manual_seed(3)
    N, d, dtype = 99, 5, torch.float32 if G == 1 else torch.float64
    group, kernel = by_order(d, G), make(kind, 2, 1, N, G)
    kernel = kernel.transposed() if reverse else kernel
    rows = [torch.randn(N, d, dtype=dtype) for _ in range(2 if reverse else 1)]
    whole, states = convolution(kernel, d, dtype, reverse=reverse, group=group), []
    out = sweep(whole, rows, reverse=reverse, seen=states)
    largest = max(sum(x.numel() * x.element_size() for x in state.values()) for state in states)
    smallest = min(sum(x.numel() * x.element_size() for x in state.values()) for state in states)
    assert (smallest, largest) == whole.state_bytes and largest <= whole.workspace_bytes
    for taken in (1, 7, 8, 9, 15, 16, 17, 21, 31, 32, 33, 50, 64, 95, 96, 97, N - 1):
        fresh = convolution(kernel, d, dtype, reverse=reverse, group=group)
        for x in (*fresh._ring, *fresh._modes, fresh._W):
            x.fill_(math.nan)
        for history in (fresh, whole) if taken in (1, 16, 33, N - 1) else (fresh,):
            history.restore(taken, states[taken - 1])
            again = sweep(history, rows, reverse=reverse, first=taken)
            part = slice(0, N - taken) if reverse else slice(taken, N)
            assert torch.equal(again[:, part], out[:, part]), f"restored behind {taken} steps"


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["exponentials", "graded"])
def test_reads_out_of_order_raise(kind):
    for reverse, wrong, expected in ((False, 2, 1), (True, 39, 40)):
        kernel = make(kind, 1, 1, 40, 1)
        kernel = kernel.transposed() if reverse else kernel
        history = convolution(kernel, 2, torch.float64, reverse=reverse, group=None)
        with pytest.raises(RuntimeError, match=rf"read out of order: got n = {wrong}, expected {expected}"):
            history.read(wrong)
        history.read(expected)
        history.push(expected, [torch.ones(2, dtype=torch.float64)])
        with pytest.raises(RuntimeError, match="read out of order"):
            history.read(expected)


def test_memory_does_not_depend_on_the_steps():
    """Ring, modes and one block of results, whatever N is: (L + b + Q + b) d numbers."""
    for N in (100, 10_000):
        kernel = make("exponentials", 1, 1, N, 1)
        history = convolution(kernel, 64, torch.float32, reverse=False, group=None)
        assert history.workspace_bytes == (1 + BLOCK + MODES + BLOCK) * 64 * 4
        assert history.state_bytes == ((1 + MODES) * 64 * 4, (1 + BLOCK - 1 + MODES) * 64 * 4)
