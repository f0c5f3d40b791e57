"""Steps taken again: what changed in between is found, and random numbers are drawn again.

A function that is not the same any more gives another state, which its fingerprint shows, bit for bit; then the error
names the step and what to do. torch's generators are part of a step: dropout gives the gradient of autograd through
the steps with the same numbers, to 1e-12 as in test_gradients.py, and the same bits under every schedule.
"""

import checkpoint_schedules as cs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pfde
from support.covering import EXHAUSTIVE

N = 45
T = torch.linspace(0.2, 1.4, N + 1, dtype=torch.float64)
RTOL = 1e-12
HISTORIES = {"exact": pfde.Exact(), "exponentials": pfde.SumOfExponentials(1e-6), "short": pfde.ShortMemory(0.4)}
# whichever is seen first: the state of a step that was computed again, or f at a state that was kept
WORDS = (
    rf"step (\d+) of {N}, (computed again for the backward pass, )?is not what it was in the forward pass: func must "
    r"give the same values again; .*store='graph'"
)

pytestmark = pytest.mark.filterwarnings("ignore:Numba not available:RuntimeWarning")


class Field(nn.Module):
    """f = a sin(s y) + t, s a buffer; what is learned is a."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64))
        self.register_buffer("s", torch.tensor(1.3, dtype=torch.float64))
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return self.a * torch.sin(self.s * y) + t


def start():
    return torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64, requires_grad=True)


def solve(f, schedule, method="euler", history="exponentials", **keywords):
    """y, its loss and the inputs that a gradient is asked of."""
    y0, alpha = start(), torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    gradient = pfde.Discrete(schedule=schedule, **keywords) if schedule != "backprop" else pfde.Backprop()
    history = HISTORIES[history] if isinstance(history, str) else history
    y = pfde.fdeint(f, y0, T, alpha, method=method, history=history, gradient=gradient)
    v = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)
    return y, (v * y).sum(), (y0, alpha, *f.parameters())


def gradients(*arguments, **keywords):
    y, loss, inputs = solve(*arguments, **keywords)
    return [y.detach(), *torch.autograd.grad(loss, inputs)]


def assert_close(found, expected):
    for x, ref in zip(found, expected, strict=True):
        error = float((x - ref).norm() / ref.norm())
        assert error <= RTOL, f"relative error {error:.2e}, allowed {RTOL:.0e}"


def assert_same(found, expected, what=""):
    for x, ref in zip(found, expected, strict=True):
        assert torch.equal(x, ref), f"{what}: differs by {float((x - ref).abs().max()):.1e}, should be bitwise equal"


# -- a function that changes -------------------------------------------------------------------------------------------


class Counting(Field):
    """Weaker at every call: a counter of Python's."""

    def forward(self, t, y):
        return super().forward(t, y) * (1 - 1e-9 * self.calls)


class Outside(Field):
    """Noise that torch's generators know nothing of."""

    def forward(self, t, y):
        return super().forward(t, y) + 1e-9 * float(np.random.default_rng().standard_normal())


class Running(Field):
    """A running mean in a buffer, as of batch norm: changed in place by every call."""

    def forward(self, t, y):
        with torch.no_grad():
            self.s.mul_(0.999).add_(0.001 * y.mean())
        return super().forward(t, y)


SCHEDULES = {
    "revolve": lambda: pfde.Revolve(2, leaf=7),
    "revolve, every step": lambda: pfde.Revolve(3, leaf=1),
    "on disk": lambda: pfde.Revolve(1, on_disk=2, leaf=5),
    "online": lambda: pfde.Online(2, leaf=6),
    "multistage": lambda: cs.MultistageCheckpointSchedule(N, 3, 1),
}
every_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)


@pytest.mark.smoke
@every_schedule
@pytest.mark.parametrize("model", [Counting, Outside, Running])
def test_a_function_that_gives_other_values_is_found(model, make):
    _, loss, inputs = solve(model(), make())
    with pytest.raises(pfde.ReplayError, match=WORDS):
        torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("method", ["pece", "trapezoid", "l1"])
def test_and_by_every_kind_of_method(method):
    """Some calls of Newton's method give nothing that stays: what changes must matter."""
    f = Field()
    _, loss, inputs = solve(f, pfde.Revolve(2, leaf=7), method)
    with torch.no_grad():
        f.s.mul_(1.001)
    with pytest.raises(pfde.ReplayError, match=WORDS):
        torch.autograd.grad(loss, inputs)


def test_the_step_that_differs_is_named():
    """f is new from step 23 on. The last leaf is not replayed: its last step is the first that f is evaluated at."""
    f = Field()
    f.late = 1.0

    def func(t, y):
        return f(t, y) * (f.late if t > T[22] else 1.0)

    y0 = start()
    gradient = pfde.Discrete(schedule=pfde.Revolve(1, leaf=40))
    y = pfde.fdeint(
        func, y0, T, 0.6, method="euler", history=HISTORIES["exponentials"], gradient=gradient, params=[f.a]
    )
    f.late = 1.0 + 1e-12
    with pytest.raises(pfde.ReplayError, match=f"step {N - 1} of {N}, is not what it was"):
        y.sum().backward()


@pytest.mark.smoke
@every_schedule
def test_a_parameter_or_buffer_changed_between_the_passes(make):
    for change in (lambda f: f.a.data.mul_(1 + 1e-12), lambda f: f.s.mul_(1 + 1e-12), lambda f: f.s.fill_(2.0)):
        f = Field()
        _, loss, inputs = solve(f, make())
        change(f)
        with pytest.raises(pfde.ReplayError, match=WORDS):
            torch.autograd.grad(loss, inputs)
    f = Field()
    _, loss, inputs = solve(f, make())
    with torch.no_grad():
        f.a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # torch sees this one itself
        torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("model", [Counting, Outside, Running])
def test_store_all_compares_too(model, history):
    """No step is taken again, but f is evaluated again at every one."""
    _, loss, inputs = solve(model(), pfde.StoreAll(), history=history)
    for _ in range(2):
        with pytest.raises(pfde.ReplayError, match=WORDS):
            torch.autograd.grad(loss, inputs, retain_graph=True)


@pytest.mark.parametrize("change", ["signs", "exchange"])
def test_a_mirrored_state_is_found(change):
    """y and -y, or y with its components exchanged, have the same bits in all, but not in their places."""
    a = torch.tensor([0.5, 0.7], dtype=torch.float64, requires_grad=True)
    now = [a.detach(), torch.ones(2, dtype=torch.float64)]

    def func(t, y):
        return now[0] * now[1] * (1 + torch.sin(y) ** 2) + 0 * a

    gradient = pfde.Discrete(schedule=pfde.Revolve(1, leaf=40))  # its snapshot is that of y_0 = 0, where nothing shows
    history = HISTORIES["exponentials"]
    y0 = torch.zeros(2, dtype=torch.float64)
    y = pfde.fdeint(func, y0, T, 0.6, method="beuler", history=history, gradient=gradient, params=[a])
    now[change == "signs"] = -now[1] if change == "signs" else now[0].flip(0)
    with pytest.raises(pfde.ReplayError, match=WORDS):
        y.sum().backward()


def test_after_the_error_the_same_graph_works_once_the_function_is_as_it_was():
    f = Field()
    expected = gradients(f, None)
    y, loss, inputs = solve(f, pfde.Revolve(2, leaf=7))
    for _ in range(2):
        f.s.mul_(2)
        with pytest.raises(pfde.ReplayError):
            torch.autograd.grad(loss, inputs, retain_graph=True)
        f.s.div_(2)
    assert_same([y.detach(), *torch.autograd.grad(loss, inputs)], expected)


# -- random numbers ----------------------------------------------------------------------------------------------------


class Layer(Field):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, t, y):
        return self.drop(super().forward(t, y))


class Functional(Field):
    def forward(self, t, y):
        return F.dropout(super().forward(t, y), 0.3)


class Drawn(Field):
    """Two draws a call, of two kinds."""

    def forward(self, t, y):
        noise = torch.rand(3, dtype=torch.float64) + 0.1 * torch.randn((), dtype=torch.float64)
        return super().forward(t, y) * (0.5 + noise)


MODELS = [Layer, Functional, Drawn]
DROPOUT = {
    "exact": ["store all", "revolve", "online", "multistage", "mixed", "disk"],
    "exponentials": ["store all", "revolve", "revolve, every step", "on disk", "online", "multistage", "two level"],
    "short": ["store all", "revolve", "online"],
}
MAKE = SCHEDULES | {
    "store all": pfde.StoreAll,
    "two level": lambda: cs.TwoLevelCheckpointSchedule(7, 2),
    "mixed": lambda: cs.MixedCheckpointSchedule(N, 4),
    "disk": lambda: cs.SingleDiskStorageSchedule(),
}


def drawn(seed, *arguments, **keywords):
    torch.manual_seed(seed)
    return gradients(*arguments, **keywords)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("model", MODELS)
def test_dropout_under_every_schedule(model, history):
    """Each model meets a third of the schedules, all three together all of them."""
    f = model()
    expected = drawn(3, f, "backprop", history=history)
    reference = drawn(3, f, None, history=history)
    assert_close(reference, expected)
    for name in DROPOUT[history] if EXHAUSTIVE else DROPOUT[history][MODELS.index(model) :: 3]:
        assert_same(drawn(3, f, MAKE[name](), history=history), reference, name)
    assert not torch.equal(drawn(4, f, None, history=history)[0], reference[0])


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("method", ["pece", "beuler", "bdf2"])
def test_dropout_by_every_kind_of_method(method, history):
    """All evaluations of a step draw the same numbers: both stages, Newton's iterations, products."""
    f = Functional()
    reference = drawn(3, f, None, method, history)
    assert_close(reference, drawn(3, f, "backprop", method, history))
    some = (
        DROPOUT[history][len(history) % 2 :: 2] if method == "pece" else ["revolve", "online"][len(history) % 2 :][:1]
    )
    for name in DROPOUT[history] if EXHAUSTIVE else some:
        assert_same(drawn(3, f, MAKE[name](), method, history), reference, name)


@pytest.mark.parametrize("store", ["stages", "graph"])
@pytest.mark.parametrize("method", ["euler", "pece"])
def test_dropout_with_every_store(method, store):
    f = Functional()
    for history in HISTORIES:
        reference = drawn(3, f, None, method, history)
        for name in ("store all", "revolve", "online"):
            assert_close(drawn(3, f, MAKE[name](), method, history, store=store), reference)


@pytest.mark.parametrize("name", ["mixed", "disk"])
def test_dropout_where_leaves_are_stored(name):
    f = Functional()
    assert_same(drawn(3, f, MAKE[name]()), drawn(3, f, None), name)


@pytest.mark.parametrize("name", ["store all", "revolve", "on disk", "online"])
def test_a_second_backward_pass_draws_the_same_numbers(name):
    f = Functional()
    torch.manual_seed(3)
    y, loss, inputs = solve(f, MAKE[name]())
    reference = drawn(3, f, None)
    torch.manual_seed(99)  # what happens to the generator meanwhile is of no account
    for _ in range(2):
        assert_same([y.detach(), *torch.autograd.grad(loss, inputs, retain_graph=True)], reference)


@pytest.mark.parametrize("name", ["store all", "revolve", "on disk", "online", "multistage"])
@pytest.mark.parametrize("method", ["euler", "pece", "beuler"])
def test_the_generator_goes_on_behind_the_forward_pass(method, name):
    """As if every step had drawn once; and a backward pass, even one that fails, leaves it alone."""
    f = Functional()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    _, loss, inputs = solve(f, MAKE[name](), method)
    after = torch.get_rng_state()
    assert not torch.equal(before, after)
    torch.autograd.grad(loss, inputs, retain_graph=True)
    assert torch.equal(torch.get_rng_state(), after)
    f.a.data.mul_(1.001)
    with pytest.raises(pfde.ReplayError):
        torch.autograd.grad(loss, inputs)
    assert torch.equal(torch.get_rng_state(), after)
    f = Functional()
    torch.manual_seed(3)
    count = N + (method == "pece")  # F_0 and the steps but the last of `euler`; of `beuler` the steps
    for _ in range(count):
        f(T[0], start())
    assert torch.equal(torch.get_rng_state(), after), "the forward pass drew more or less than once a step"


@pytest.mark.parametrize("model", MODELS)
def test_two_pending_solves_with_random_numbers(model):
    f = model()
    torch.manual_seed(3)
    first, second = solve(f, pfde.Revolve(2, leaf=7)), solve(f, pfde.Online(2, leaf=6))
    torch.manual_seed(3)
    expected = [gradients(f, None), gradients(f, None)]
    for (y, loss, inputs), reference in zip((second, first), expected[::-1], strict=True):
        assert_same([y.detach(), *torch.autograd.grad(loss, inputs)], reference)


@pytest.mark.smoke
@pytest.mark.parametrize("schedule", [None, pfde.Revolve(2, leaf=7), pfde.Online(2)], ids=["all", "revolve", "online"])
def test_random_numbers_at_later_steps_only(schedule):
    """The first look at f, at t0, is what tells that it draws."""

    class Late(Field):
        def forward(self, t, y):
            y = super().forward(t, y)
            return F.dropout(y, 0.3) if t > 0.8 else y

    message = (
        r"func drew random numbers at some step, but none when it was first evaluated, at t\[0\].*draw at every step, "
        r"use gradient=pfde.Discrete\(store='graph'\) or pfde.Backprop\(\)"
    )
    with pytest.raises(pfde.PfdeError, match=message):
        solve(Late(), schedule)
    torch.manual_seed(3)
    found = gradients(Late(), None, store="graph")
    torch.manual_seed(3)
    assert_close(found, gradients(Late(), "backprop"))


@pytest.mark.parametrize("kind", ["memory", "snapshots"])
def test_random_states_count_in_the_budget(kind):
    """5 kB for each snapshot and each step of a leaf, here more than all the rest."""

    class Watched(pfde.Revolve):
        def stream(self, sizes):
            plans.append((self.plan(sizes), sizes))
            return super().stream(sizes)

    plans = []
    budget = 60_000
    schedule = Watched(memory=budget) if kind == "memory" else Watched(2, leaf=7)
    gradient = pfde.Discrete(schedule=schedule)
    y = pfde.solve(Functional(), start(), T, 0.6, method="euler", history=HISTORIES["short"], gradient=gradient)
    y.y.sum().backward()
    ((plan, sizes),) = plans
    assert sizes.row_bytes >= 5000 and y.stats.snapshots_peak == plan.snapshots > 0
    assert 5000 * plan.snapshots < y.stats.snapshot_bytes_peak <= plan.snapshots * sizes.snapshot_bytes(plan.leaf)
    if kind == "memory":
        assert y.stats.snapshot_bytes_peak + plan.leaf * sizes.row_bytes <= budget


def test_dropout_that_is_off_draws_nothing():
    f = Layer().eval()
    state = torch.get_rng_state()
    assert_same(gradients(f, pfde.Revolve(2, leaf=7)), gradients(f, None))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["euler", "pece", "beuler", "bdf2"])
def test_without_gradients_the_numbers_are_the_same(method):
    f = Functional()
    torch.manual_seed(3)
    expected = solve(f, None, method)[0].detach()
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(solve(f, None, method)[0], expected)
