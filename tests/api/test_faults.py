"""Bad input and faults: every mistake is an error that says what to do, and no fault spoils the solve after it.

What a fault must leave behind is checked the same way everywhere: the original exception object comes out, and a solve
after it gives, bit for bit, the gradient of a solve in a fresh state.
"""

import contextlib
import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pfde
from pfde.caputo.schemes import METHODS

IMPLICIT = [name for name, scheme in METHODS.items() if scheme.implicit]
STORES = ["state", "stages", "graph"]
T = torch.linspace(0, 1, 6, dtype=torch.float64)


class Field(nn.Module):
    """f = sin(a y) + t, which calls `hook(k)` at its k-th evaluation, k = 1, 2, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64))
        self.calls = 0
        self.hook: Callable[[int], object] = lambda _: None

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.hook(self.calls)
        return torch.sin(self.a * y) + t


class Frozen(Field):
    """The same with a frozen factor beside the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64), requires_grad=False)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(t, y) * self.scale


def start(*values: float, grad: bool = True) -> Tensor:
    return torch.tensor(values or (1.0, 2.0, -0.5), dtype=torch.float64, requires_grad=grad)


def decay(_t: Tensor, y: Tensor) -> Tensor:
    return -y / (1 + y * y)


def gradients(method: str, **keywords: object) -> list[Tensor]:
    """d(sum of squares of all outputs)/d(y0, alpha, a) of a fresh solve."""
    f, y0, alpha = Field(), start(), torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    y = pfde.fdeint(f, y0, T, alpha, method=method, **keywords)
    return list(torch.autograd.grad(y.square().sum(), (y0, alpha, f.a)))


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b), f"got {a}, expected bitwise {b}"


# -- the arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("method", ["euler", "trapezoid"])
@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (0.0, ValueError, r"alpha must be in \(0, 1\]: got 0;"),
        (-0.5, ValueError, r"alpha must be in \(0, 1\]: got -0.5"),
        (1.2, ValueError, r"alpha must be in \(0, 1\]: got 1.2; orders above 1"),
        (float("nan"), ValueError, r"alpha must be in \(0, 1\]: got nan"),
        (float("inf"), ValueError, r"alpha must be in \(0, 1\]: got inf"),
        (torch.tensor([0.5, 0.5, 1.5]), ValueError, r"alpha must be in \(0, 1\]: got 1.5"),
        (torch.tensor([0.5, 0.6]), ValueError, r"alpha must broadcast to y0's shape \(3,\): got \(2,\)"),
        (torch.full((2, 3), 0.5), ValueError, r"alpha must broadcast to y0's shape \(3,\): got \(2, 3\)"),
        (torch.ones(0), ValueError, r"alpha must broadcast to y0's shape \(3,\): got \(0,\)"),
        (torch.tensor(1), TypeError, r"alpha must be floating point: got torch.int64; use alpha.double\(\)"),
        (torch.tensor(True), TypeError, r"alpha must be floating point: got torch.bool"),
        (torch.tensor(0.5 + 0j), TypeError, r"alpha must be floating point: got torch.complex64"),
        (True, TypeError, "alpha must be a number or a tensor, .*: got bool"),
        ("0.5", TypeError, "alpha must be a number or a tensor, .*: got str"),
        (None, TypeError, "alpha must be a number or a tensor, .*: got NoneType"),
        ([0.5, 1.5, 0.5], ValueError, r"alpha must be in \(0, 1\]: got 1.5"),
    ],
)
def test_alpha(method: str, alpha: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pfde.fdeint(decay, start(), T, alpha, method=method)


def test_vector_alpha_for_a_tuple_state() -> None:
    with pytest.raises(ValueError, match=r"alpha must be a single number for a tuple y0: got shape \(2,\)"):
        pfde.fdeint(lambda t, y: y, (start(), start()), T, torch.tensor([0.5, 0.6]))


@pytest.mark.parametrize("method", METHODS)
def test_alpha_on_the_boundary_is_differentiable(method: str) -> None:
    """At alpha = 1 the derivative is one-sided but the formulas are smooth there: Richardson from below agrees."""

    def loss(alpha: Tensor) -> Tensor:
        return pfde.fdeint(decay, start(), T, alpha, method=method).sum()

    alpha = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(alpha), alpha)
    with torch.no_grad():
        one, half, full = (loss(alpha - step) for step in (0.0, 1e-4, 2e-4))
    observed = (3 * one - 4 * half + full) / 2e-4  # error O(1e-8)
    assert abs(slope - observed) < 1e-6 * max(1, abs(observed)), f"{slope} against {observed}"


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        (torch.tensor([1.0, 0.0]), ValueError, r"t must be increasing .*: got t\[0\]=1, t\[1\]=0"),
        (torch.tensor([0.0, 0.0]).requires_grad_(), ValueError, r"all its times are t\[0\].*: pass t.detach\(\)"),
        (torch.tensor([0.0, float("nan"), 1.0]), ValueError, r"t must be finite: got \[0.0, nan, 1.0\]"),
        (torch.tensor([0.0, float("inf")]), ValueError, r"t must be finite: got \[0.0, inf\]"),
        (torch.tensor([]), ValueError, r"at least one time, where y is y0: got shape \(0,\)"),
        (torch.tensor(1.0), ValueError, r"t must be one-dimensional with at least one time.*: got shape \(\)"),
        (torch.zeros(2, 2), ValueError, r"t must be one-dimensional with at least one time.*: got shape \(2, 2\)"),
        (torch.tensor([0, 1]), TypeError, r"t must be floating point: got torch.int64; use t.double\(\)"),
        (
            torch.tensor([0.0, 0.3, 1.0]).requires_grad_(),
            ValueError,
            r"t requires a gradient, which a nonuniform grid does not have: pass t.detach\(\), or a uniform grid",
        ),
        (None, TypeError, "t must be a one-dimensional tensor of times: got NoneType"),
        ("0..1", TypeError, "t must be a one-dimensional tensor of times: got str"),
    ],
)
def test_times(t: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pfde.fdeint(decay, start(), t, 0.6)


@pytest.mark.parametrize("method", METHODS)
def test_a_nonuniform_grid_is_for_product_integration(method: str) -> None:
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    if METHODS[method].rules:
        pfde.fdeint(decay, start(), t, 0.6, method=method).sum().backward()
        return
    message = (
        rf"t must be uniformly spaced for method '{method}' when it is the grid: t\[1\]=0.3 is not t\[0\] \+ 1 h with "
        r"h=0.5; give step_size, or use one of the methods euler, pece, beuler, trapezoid"
    )
    with pytest.raises(ValueError, match=message):
        pfde.fdeint(decay, start(), t, 0.6, method=method)
    pfde.fdeint(decay, start(), t, 0.6, method=method, step_size=0.1).sum().backward()


@pytest.mark.parametrize(
    ("step_size", "error", "message"),
    [
        (0.3, ValueError, r"every t\[i\] - t\[0\] must be a whole number of steps.*choose a step_size that divides it"),
        (0.0, ValueError, r"step_size must be in \(0, t\[-1\] - t\[0\] = 1\]: got 0"),
        (-0.1, ValueError, r"step_size must be in \(0, .*: got -0.1"),
        (float("nan"), ValueError, r"step_size must be in \(0, .*: got nan"),
        (float("inf"), ValueError, r"step_size must be in \(0, .*: got inf"),
        (2.0, ValueError, r"step_size must be in \(0, .*: got 2"),
        (0.5, ValueError, r"must be a whole number of steps: got t\[1\] - t\[0\] = 0.2 with step_size=0.5, 0.4 steps"),
        ("0.1", TypeError, "step_size must be a number: got str"),
        (True, TypeError, "step_size must be a number: got bool"),
        (start(0.1), ValueError, r"step_size requires a gradient.*pass float\(step_size\)"),
    ],
)
def test_step_size(step_size: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pfde.fdeint(decay, start(), T, 0.6, step_size=step_size)


def test_a_step_size_in_float32_times_is_whole_to_their_rounding() -> None:
    t = torch.tensor([0.0, 0.1, 0.7], dtype=torch.float32)
    assert pfde.fdeint(decay, start(), t, 0.6, step_size=0.05).shape == (3, 3)


@pytest.mark.parametrize(
    ("y0", "error", "message"),
    [
        (
            torch.tensor([1, 2]),
            TypeError,
            r"y0 must be float32 or float64, or complex: got torch.int64; use y0.double\(\)",
        ),
        (torch.eye(2).to_sparse(), TypeError, r"y0 must be dense: got torch.sparse_coo; use y0.to_dense\(\)"),
        ((), ValueError, "y0 must hold at least one tensor: got an empty tuple"),
        (1.0, TypeError, "y0 must be a tensor or a tuple of tensors: got float"),
        (None, TypeError, "y0 must be a tensor or a tuple of tensors: got NoneType"),
        ((torch.ones(2), 1.0), TypeError, "y0 must be a tensor or a tuple of tensors: got float"),
        (
            (torch.ones(2), torch.ones(2).double()),
            TypeError,
            "the tensors of y0 must share precision and device: got torch.fl",
        ),
        ((torch.ones(2), (torch.ones(2),)), TypeError, "y0 must be a tensor or a tuple of tensors: got tuple of 1"),
    ],
)
def test_initial_state(y0: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pfde.fdeint(lambda t, y: y, y0, T, 0.6)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_is_not_contiguous_works(method: str) -> None:
    base = torch.arange(12, dtype=torch.float64).view(3, 4) / 10
    results = []
    for y0 in (base.t(), base.t().contiguous(), base.t().expand(4, 3)):
        y0 = y0.detach().requires_grad_()
        y = pfde.fdeint(decay, y0, T, 0.6, method=method)
        (y_bar,) = torch.autograd.grad(y.square().sum(), y0)
        results.append((y.detach(), y_bar))
    for y, y_bar in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(y_bar, results[0][1])
    strided = torch.ones(1, dtype=torch.float64).expand(3).requires_grad_()  # stride 0: one number three times
    y = pfde.fdeint(decay, strided, T, 0.6, method=method)
    plain = torch.ones(3, dtype=torch.float64, requires_grad=True)
    expected = pfde.fdeint(decay, plain, T, 0.6, method=method)
    assert torch.equal(torch.autograd.grad(y.sum(), strided)[0], torch.autograd.grad(expected.sum(), plain)[0])


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"method": "rk4"}, ValueError, "method must be one of euler, pece, .*bdf2: got 'rk4'"),
        ({"method": ["euler"]}, ValueError, r"method must be one of .*: got \['euler'\]"),
        ({"method": None}, ValueError, "method must be one of .*: got None"),
        ({"gradient": "adjoint"}, TypeError, r"gradient must be pfde.Discrete\(\) or pfde.Backprop\(\): got 'adjoint'"),
        ({"gradient": pfde.Discrete}, TypeError, r"gradient must be pfde.Discrete\(\) or pfde.Backprop\(\)"),
        ({"history": "fft"}, TypeError, r"history must be pfde.Exact\(\) or pfde.SumOf.* or pfde.Short.*: got 'fft'"),
        ({"history": pfde.Exact}, TypeError, r"history must be pfde.Exact\(\) or pfde.SumOf.* or pfde.Short.*: got <c"),
        ({"params": start()}, TypeError, r"params must be a sequence of tensors, such as \(a, b\): got a tensor of"),
        ({"params": nn.Linear(1, 1)}, TypeError, r"params must be a sequence of tensors.*: got Linear"),
        ({"params": 3}, TypeError, r"params must be a sequence of tensors.*: got int"),
        ({"params": [None]}, TypeError, "params must be a sequence of tensors: got NoneType in it"),
        ({"options": "-snes_monitor"}, TypeError, "options must be a mapping of PETSc option names to values: got str"),
        ({"options": {"-snes_rtol": 1}}, ValueError, "names are PETSc's without the dash.*: got '-snes_rtol'"),
        ({"options": {3: 1}}, ValueError, "names are PETSc's without the dash.*: got 3"),
        (
            {"options": {"snes_rtol": None}},
            TypeError,
            "a value must be a number, a string or a bool: got 'snes_rtol': N",
        ),
        ({"options": {"snes_rtoll": 1}}, ValueError, "options: 'snes_rtoll' does not apply to this solve"),
        ({"options": {"snes_rtol": "tight"}}, ValueError, r"options: PETSc does not take .*'tight'.*: .*tight"),
        ({"options": {"ksp_type": "magic"}}, ValueError, r"options: PETSc does not take .*'magic'.*: .*magic"),
        ({"options": {"fde_jacobian": "sparse"}}, ValueError, "fde_jacobian must be auto, dense, .*: got 'sparse'"),
        ({"options": {"ts_dt": 0.1}}, ValueError, "PETSc option -ts_dt does not apply here: t, step_size and method"),
        ({"options_prefix": 3}, TypeError, "options_prefix must be a string: got int"),
        ({"options_prefix": "-a_"}, ValueError, "options_prefix must be without dash and spaces.*: got '-a_'"),
        ({"comm": 1}, TypeError, "comm must be an mpi4py communicator or None: got int"),
        ({"stepsize": 0.1}, TypeError, "unexpected keyword argument 'stepsize'"),
    ],
)
def test_keywords(keywords: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pfde.fdeint(decay, start(), T, 0.6, **keywords)
    assert_same(gradients("trapezoid"), gradients("trapezoid"))


@pytest.mark.parametrize("name", ["snes_rtol", "ksp_type", "pc_type", "fde_jacobian"])
def test_options_of_implicit_methods_do_not_apply_to_explicit_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"options: '{name}' does not apply to method 'euler', which is explicit"):
        pfde.fdeint(decay, start(), T, 0.6, method="euler", options={name: "none"})


def test_gradient_settings() -> None:
    with pytest.raises(ValueError, match="store must be one of state, stages, graph: got 'disk'"):
        pfde.Discrete(store="disk")
    with pytest.raises(
        TypeError, match=r"schedule must be StoreAll\(\), Revolve\(.*Online\(.*: got 'revolve'; make one"
    ):
        pfde.Discrete(schedule="revolve")
    with pytest.raises(TypeError, match="positional"):
        pfde.Discrete(None)
    with pytest.raises(ValueError, match=r"algorithm must be None or one of .*: got 'fast'"):
        pfde.Exact("fast")


def test_none_is_the_default() -> None:
    nothing = dict.fromkeys(("step_size", "gradient", "history", "params", "options", "comm"))
    assert_same(gradients("trapezoid", **nothing), gradients("trapezoid"))


@pytest.mark.parametrize("func", [None, 3, torch.ones(3)])
def test_func_must_be_callable(func: object) -> None:
    with pytest.raises(TypeError, match=r"func must be callable as func\(t, y\): got"):
        pfde.fdeint(func, start(), T, 0.6)
    with torch.no_grad(), pytest.raises(TypeError, match=r"func must be callable as func\(t, y\): got"):
        pfde.fdeint(func, start(), T, 0.6)


# -- what func returns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("method", ["euler", "pece", "trapezoid", "l1"])
@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda y: y[:2], ValueError, r"func must return the shape of y, \(3,\): got \(2,\)"),
        (lambda y: y.unsqueeze(0), ValueError, r"func must return the shape of y, \(3,\): got \(1, 3\)"),
        (lambda y: y.sum(), ValueError, r"func must return the shape of y, \(3,\): got \(\)"),
        (lambda y: y.float(), TypeError, "func must return the dtype of y, torch.float64: got torch.float32; convert"),
        (lambda y: y.long(), TypeError, "func must return the dtype of y, torch.float64: got torch.int64"),
        (lambda y: y + 0j, TypeError, "func must return the dtype of y, torch.float64: got torch.complex128"),
        (lambda y: None, TypeError, "func must return a tensor like y: got NoneType"),
        (lambda y: (y,), TypeError, "func must return a tensor like y: got tuple"),
        (lambda y: 1.0, TypeError, "func must return a tensor like y: got float"),
        (lambda y: y.detach().numpy(), TypeError, "func must return a tensor like y: got ndarray"),
        (lambda y: y.to("meta"), ValueError, "func must return a tensor on y's device, cpu: got meta"),
    ],
)
def test_what_func_returns(result: Callable, error: type[Exception], message: str, method: str, grad: bool) -> None:
    late = [lambda t, y: result(y), lambda t, y: result(y) if t > 0.5 else -y]
    for func in late:
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            pfde.fdeint(func, start(grad=grad), T, 0.6, method=method)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda y: y[0], TypeError, "func must return a tuple of 2 tensors like y: got a tensor of shape"),
        (lambda y: (y[0],), TypeError, "func must return a tuple of 2 tensors like y: got tuple of 1"),
        (lambda y: (y[1], y[0]), ValueError, r"func must return the shape of y, \(3,\): got \(2,\)"),
        (lambda y: (y[0], y[1].float()), TypeError, "func must return the dtype of y, torch.float64"),
        (lambda y: (y[0], None), TypeError, "func must return tensors like y: got NoneType in its tuple"),
    ],
)
def test_what_func_returns_for_a_tuple(result: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pfde.fdeint(lambda t, y: result(y), (start(), start(1.0, 2.0)), T, 0.6)


@pytest.mark.smoke
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_value_that_is_not_finite_names_t_and_step(method: str, bad: float) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(torch.tensor([False, True, False]) & (t > 0.5), bad, -y)

    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(pfde.NonFiniteError, match=r"t=0.6, step 3 of 5: reduce step"):
            pfde.fdeint(func, start(), T, 0.6, method=method)
    with pytest.raises(pfde.NonFiniteError, match=r"NaN or inf at t=0, step 0 of 5"):
        pfde.fdeint(lambda t, y: y * bad, start(), T, 0.6, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_turn_nan_in_the_backward_pass(method: str) -> None:
    """Not by an in-place change, which torch refuses, but in f itself: here a number it reads."""
    f, table = Field(), {"factor": 1.0}
    y = pfde.fdeint(lambda t, y: f(t, y) * table["factor"], start(), T, 0.6, method=method, params=[f.a])
    table["factor"] = float("nan")
    with pytest.raises(pfde.ReplayError, match="not what it was in the forward pass"):
        y.sum().backward()
    assert f.a.grad is None


def test_large_finite_values_are_no_error() -> None:
    """Their sum overflows; none of them has."""
    y0 = torch.full((4,), 3e38, dtype=torch.float32)
    y = pfde.fdeint(
        lambda t, y: torch.zeros_like(y) + 3e38 * (y > 0), y0, torch.tensor([0.0, 1e-3]), 1.0, method="euler"
    )
    assert torch.isfinite(y).all()


# -- exceptions ------------------------------------------------------------------------------------------------------


def solver_forms(method: str) -> list[dict]:
    return [{}, {"options": {"fde_jacobian": "matrix_free"}}] if METHODS[method].implicit else [{}]


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt("ctrl-c")], ids=["ValueError", "Ctrl-C"])
@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_func_at_any_evaluation(method: str, error: BaseException) -> None:
    """Forward and backward, at each evaluation: at step 0, midway, inside Newton's method."""
    for keywords in solver_forms(method):
        expected = gradients(method, **keywords)
        f = Field()
        y = pfde.fdeint(f, start(), T, 0.6, method=method, **keywords)
        forward = f.calls
        y.sum().backward()
        for k in range(1, f.calls + 1):
            f = Field()

            def hook(call: int, k: int = k) -> None:
                if call == k:
                    raise error

            f.hook = hook
            stage = "forward"
            with pytest.raises(type(error)) as caught:
                y = pfde.fdeint(f, start(), T, 0.6, method=method, **keywords)
                stage = "backward"
                y.sum().backward()
            assert caught.value is error
            assert stage == ("forward" if k <= forward else "backward")
            assert error.__cause__ is None
        assert_same(gradients(method, **keywords), expected)


class Explosive(torch.autograd.Function):
    """The identity, whose vjp and jvp raise `error` at their `fuse`-th product."""

    error: BaseException
    fuse = 0
    products = 0

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: object, y_bar: Tensor) -> Tensor:
        Explosive.products += 1
        if Explosive.products == Explosive.fuse:
            raise Explosive.error
        return y_bar * 1.0


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt("ctrl-c")], ids=["ValueError", "Ctrl-C"])
@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_any_product(method: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the Jacobian products of KSP (forward), its transposed ones and the vjps (backward), and in the LU's setup."""
    monkeypatch.setattr(Explosive, "error", error, raising=False)
    a = start(0.5, -0.3, 0.8)

    def run(keywords: dict, fuse: int) -> Tensor:
        monkeypatch.setattr(Explosive, "fuse", fuse)
        monkeypatch.setattr(Explosive, "products", 0)
        y0 = start()
        y = pfde.fdeint(
            lambda t, y: torch.sin(a * Explosive.apply(y)), y0, T[:4], 0.6, method=method, params=[a], **keywords
        )
        return torch.autograd.grad(y.sum(), y0)[0]

    for keywords in solver_forms(method):
        expected = run(keywords, 0)
        products = Explosive.products
        assert products >= 2
        for fuse in {*range(1, min(products, 12) + 1), products // 2, products - 1, products}:
            with pytest.raises(type(error)) as caught:
                run(keywords, fuse)
            assert caught.value is error
        assert torch.equal(run(keywords, 0), expected)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("method", METHODS)
def test_a_backward_pass_after_a_failed_one(method: str, store: str) -> None:
    """The failed one has overwritten half of the trajectory: the next computes it anew and gives the same bits."""
    keywords = {"gradient": pfde.Discrete(store=store)}
    expected = gradients(method, **keywords)
    f, y0, alpha = Field(), start(), torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    y = pfde.fdeint(f, y0, T, alpha, method=method, **keywords)
    loss = y.square().sum()
    stop = [0]

    f.hook = lambda k: (_ for _ in ()).throw(KeyboardInterrupt()) if k == stop[0] else None
    stop[0] = f.calls + 2
    with contextlib.suppress(KeyboardInterrupt):
        torch.autograd.grad(loss, (y0, alpha, f.a), retain_graph=True)
    stop[0] = 0
    assert_same(list(torch.autograd.grad(loss, (y0, alpha, f.a))), expected)


def test_the_cause_of_an_exception_in_func_is_kept() -> None:
    cause = KeyError("why")

    def func(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.5:
            raise ValueError("boom") from cause
        return -y

    for method in METHODS:
        with pytest.raises(ValueError, match="boom") as caught:
            pfde.fdeint(func, start(), T, 0.6, method=method)
        assert caught.value.__cause__ is cause


# -- parameters that would get no gradient ----------------------------------------------------------------------------

CLOSURE = r"func uses a tensor of shape \(3,\) that requires grad but is none of its parameters.*pass params="


@pytest.mark.smoke
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["leaf", "inner", "module", "y0", "buffer"])
def test_a_closure_that_would_get_none(method: str, kind: str) -> None:
    leaf, y0, module = start(), start(), Field()
    inner = leaf * 2
    holder = nn.Module()
    holder.register_buffer("w", leaf)
    holder.forward = lambda t, y: y * holder.w  # type: ignore[method-assign]
    func = {
        "leaf": lambda t, y: y * leaf,
        "inner": lambda t, y: y * inner,
        "module": lambda t, y: module(t, y),
        "y0": lambda t, y: y0 - y,
        "buffer": holder,
    }[kind]
    with pytest.raises(ValueError, match=CLOSURE):
        pfde.fdeint(func, y0, T, 0.6, method=method)
    with torch.no_grad():
        pfde.fdeint(func, y0, T, 0.6, method=method)  # no gradient is asked for: nothing is lost


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("method", METHODS)
def test_a_closure_that_appears_late(method: str, store: str) -> None:
    """The forward pass of an explicit method keeps no graph that could tell: the backward pass refuses."""
    w, y0 = start(), start()
    y = pfde.fdeint(
        lambda t, y: y * w if t > 0.7 else -y, y0, T, 0.6, method=method, gradient=pfde.Discrete(store=store)
    )
    with pytest.raises(ValueError, match=CLOSURE):
        y.sum().backward()
    assert y0.grad is None


def test_closures_given_as_params_get_their_gradient() -> None:
    w, y0, unused = start(), start(), start()
    inner = w * 2
    for params, of in (((w,), w), ((inner,), w), ((w, unused), w), (iter([w]), w)):
        factor = inner if isinstance(params, tuple) and params[0] is inner else w
        y = pfde.fdeint(lambda t, y, factor=factor: y * factor, y0, T, 0.6, params=params)
        assert torch.autograd.grad(y.sum(), of, retain_graph=True)[0].abs().min() > 0
    y = pfde.fdeint(lambda t, y: y * w, y0, T, 0.6, params=(w, unused))
    assert torch.autograd.grad(y.sum(), unused, allow_unused=True) == (None,)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_parameters_require_a_gradient(method: str) -> None:
    f, y0 = Field(), start(grad=False)
    pfde.fdeint(f, y0, T, 0.6, method=method).square().sum().backward()
    assert y0.grad is None
    assert torch.equal(f.a.grad, gradients(method)[2])


# -- writing in place ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [*(pfde.Discrete(store=s) for s in STORES), pfde.Backprop()], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_func_changes_y_in_place(method: str, gradient: object) -> None:
    def always(t: Tensor, y: Tensor) -> Tensor:
        y += 1
        return -y

    def late(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.5:
            y.mul_(2)
        return -y

    def through_a_detached_view(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.5:
            y.detach()[0] = 0.0
        return -y

    for func in (always, late, through_a_detached_view):
        for context in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
            y0 = start(grad=context is contextlib.nullcontext)
            with context(), pytest.raises(RuntimeError, match=r"write y = y \+ \.\.\. instead of y \+= \.\.\. in func"):
                pfde.fdeint(func, y0 * 1.0, T, 0.6, method=method, gradient=gradient)


@pytest.mark.parametrize("method", METHODS)
def test_func_changes_y_in_place_in_the_backward_pass(method: str) -> None:
    f, y0, spoil = Field(), start(), [False]

    def func(t: Tensor, y: Tensor) -> Tensor:
        if spoil[0] and t < 0.5:
            y.detach().zero_()
        return f(t, y)

    y = pfde.fdeint(func, y0, T, 0.6, method=method, params=[f.a])
    spoil[0] = True
    with pytest.raises(RuntimeError, match=r"func changed y in place at t=0\.4: write y = y"):
        torch.autograd.grad(y.square().sum(), (y0, f.a), retain_graph=True)
    spoil[0] = False
    expected = gradients(method)
    assert_same(list(torch.autograd.grad(y.square().sum(), (y0, f.a))), [expected[0], expected[2]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("result", ["y", "a view of y", "its own buffer"])
def test_func_may_return_memory_it_uses_again(method: str, result: str) -> None:
    buffer = torch.empty(3, dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        if result != "its own buffer":
            return y if result == "y" else y.view(3)
        if y.requires_grad:
            return y * 1.0
        torch.mul(y, 1.0, out=buffer)
        return buffer

    y0 = start()
    expected = pfde.fdeint(lambda t, y: y * 1.0, y0, T, 0.6, method=method)
    got = pfde.fdeint(func, y0, T, 0.6, method=method)
    assert torch.equal(got, expected)
    assert_same(list(torch.autograd.grad(got.sum(), y0)), list(torch.autograd.grad(expected.sum(), y0)))


CHANGED = "modified by an inplace operation"


@pytest.mark.parametrize("method", ["euler", "pece", "trapezoid", "l1"])
@pytest.mark.parametrize("which", ["theta", "frozen theta", "alpha", "y0"])
def test_an_input_changed_in_place_before_the_backward_pass(method: str, which: str) -> None:
    f, y0, alpha = Frozen(), start(), torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    y = pfde.fdeint(f, y0, T, alpha, method=method)
    with torch.no_grad():
        {"theta": f.a, "frozen theta": f.scale, "alpha": alpha, "y0": y0}[which].mul_(0.9)
    with pytest.raises(RuntimeError, match=CHANGED):
        y.sum().backward()


def test_a_strided_y0_is_copied_and_may_change() -> None:
    y0 = torch.ones(3, 2, dtype=torch.float64).t().requires_grad_()
    y = pfde.fdeint(decay, y0, T, 0.6)
    expected = torch.autograd.grad(y.sum(), y0, retain_graph=True)
    with torch.no_grad():
        y0.zero_()
    assert_same(list(torch.autograd.grad(y.sum(), y0)), list(expected))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("method", METHODS)
def test_the_result_may_be_changed_in_place(method: str, store: str) -> None:
    """It shares no memory with the trajectory."""
    f, y0, alpha = Field(), start(), torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    y = pfde.fdeint(f, y0, T, alpha, method=method, gradient=pfde.Discrete(store=store))
    kept = y.detach().clone()
    y.detach().zero_()
    got = torch.autograd.grad(y, (y0, alpha, f.a), 2 * kept)
    assert_same(list(got), gradients(method))
    y = pfde.fdeint(f, y0, T, alpha, method=method)
    (expected,) = torch.autograd.grad(y[2:], f.a, torch.full_like(y[2:], 3.0), retain_graph=True)
    y[2:].mul_(3.0)  # autograd sees this one
    assert torch.equal(torch.autograd.grad(y[2:].sum(), f.a)[0], expected)


# -- backward, again and again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("method", METHODS)
def test_backward_twice(method: str, store: str) -> None:
    f, y0, alpha = Field(), start(), torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    loss = pfde.fdeint(f, y0, T, alpha, method=method, gradient=pfde.Discrete(store=store)).square().sum()
    first = torch.autograd.grad(loss, (y0, alpha, f.a), retain_graph=True)
    second = torch.autograd.grad(loss, (y0, alpha, f.a))
    assert_same(list(second), list(first))
    assert_same(list(first), gradients(method, gradient=pfde.Discrete(store=store)))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, (y0, alpha, f.a))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("method", METHODS)
def test_two_solves_pending(method: str, store: str) -> None:
    expected = gradients(method, gradient=pfde.Discrete(store=store))
    solves = []
    for _ in range(2):
        f, y0, alpha = Field(), start(), torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
        y = pfde.fdeint(f, y0, T, alpha, method=method, gradient=pfde.Discrete(store=store))
        solves.append((y.square().sum(), (y0, alpha, f.a)))
    for loss, inputs in (solves[0], solves[1]):
        assert_same(list(torch.autograd.grad(loss, inputs)), expected)


def test_a_solve_inside_func_of_another() -> None:
    """f calls fdeint: two integrations and two solvers at once."""
    inner_t = torch.linspace(0, 0.5, 3, dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return pfde.fdeint(decay, y, inner_t, 0.5)[-1] - y

    y0 = start(grad=False)
    with torch.no_grad():
        assert torch.isfinite(pfde.fdeint(func, y0, T, 0.6)).all()
    (y0_bar,) = torch.autograd.grad(pfde.fdeint(func, y0.requires_grad_(), T, 0.6, method="euler")[-1].sum(), y0)
    shifts = torch.eye(3, dtype=torch.float64) * 1e-6
    with torch.no_grad():
        ends = [[pfde.fdeint(func, y0 + s * e, T, 0.6, method="euler")[-1].sum() for s in (1, -1)] for e in shifts]
    assert torch.allclose(y0_bar, torch.tensor([(a - b) / 2e-6 for a, b in ends], dtype=torch.float64), atol=1e-8)


@pytest.mark.smoke
@pytest.mark.parametrize("method", METHODS)
def test_double_backward_is_refused(method: str) -> None:
    y0 = start()
    for whole in (True, False):
        y = pfde.fdeint(decay, y0 * 1.0, T, 0.6, method=method)
        loss = y.square().sum() if whole else (y[-1] * y0).sum() + y0.pow(3).sum()
        with pytest.raises(
            RuntimeError, match=r"double backward \(create_graph=True\) .* not implemented: use .*Backprop"
        ):
            torch.autograd.grad(loss, y0, create_graph=True)
    (slope,) = torch.autograd.grad(y0.pow(3).sum() + y.detach().sum(), y0, create_graph=True)  # no solve on the way
    assert torch.allclose(torch.autograd.grad(slope.sum(), y0)[0], 6 * y0.detach())


@pytest.mark.parametrize("method", METHODS)
def test_double_backward_through_backprop(method: str) -> None:
    """Explicit methods give it; implicit ones, whose stages enter as a solved system, refuse."""
    y0 = start(0.4, 0.3, 0.2)

    def slope(y0: Tensor) -> Tensor:
        y = pfde.fdeint(decay, y0, T, 0.6, method=method, gradient=pfde.Backprop())
        return torch.autograd.grad(y[-1].sum(), y0, create_graph=True)[0]

    if METHODS[method].implicit:
        with pytest.raises(
            RuntimeError, match=r"double backward .* implicit method is not implemented: use an explicit"
        ):
            slope(y0)
        return
    (curvature,) = torch.autograd.grad(slope(y0).sum(), y0)
    observed = (slope(y0 + 1e-5) - slope(y0 - 1e-5)) / 2e-5  # f acts on each entry alone
    assert torch.allclose(curvature, observed, rtol=1e-8)


def test_transforms_of_torch_func_are_refused() -> None:
    message = r"a solve inside torch.func .* not implemented: use torch.autograd.grad or backward\(\), and a batch as a"
    y0, closure = torch.ones(3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)

    def solve(y: Tensor) -> Tensor:
        return pfde.fdeint(decay, y, T, 0.6)

    for misuse in (
        lambda: torch.vmap(solve)(y0.expand(2, 3)),
        lambda: torch.vmap(lambda w: pfde.fdeint(lambda t, y: w * y, y0, T, 0.6))(closure),
        lambda: torch.func.grad(lambda y: solve(y).sum())(y0),
        lambda: torch.func.grad(lambda w: pfde.fdeint(lambda t, y: w * y, y0, T, 0.6).sum())(y0),
        lambda: torch.func.jvp(solve, (y0,), (y0,)),
        lambda: torch.func.jacrev(solve)(y0),
        lambda: torch.autograd.functional.jvp(solve, y0, y0, strict=True) and torch.func.jacfwd(solve)(y0),
    ):
        with pytest.raises(
            RuntimeError, match=message if misuse.__code__.co_names[-1] != "jacfwd" else "double backward"
        ):
            misuse()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        solve(torch.autograd.forward_ad.make_dual(y0, y0))


def test_vmap_over_the_backward_pass_is_refused_or_right() -> None:
    """is_grads_batched runs the backward pass under vmap."""
    y0 = start()
    y = pfde.fdeint(decay, y0, T, 0.6)[-1]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(y, y0, torch.eye(3, dtype=torch.float64), is_grads_batched=True)


# -- modes of torch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_no_grad_and_inference_mode(method: str) -> None:
    f = Field()
    expected = pfde.fdeint(f, start(), T, 0.6, method=method).detach()
    for context in (torch.no_grad, torch.inference_mode):
        for gradient in (None, pfde.Backprop()):
            with context():
                y0, alpha = start(grad=False), torch.tensor(0.6, dtype=torch.float64)
                y = pfde.fdeint(f, y0, T.clone(), alpha, method=method, gradient=gradient)
            assert not y.requires_grad
            assert torch.equal(y, expected)


@pytest.mark.parametrize("method", ["pece", "trapezoid", "l1"])
def test_autocast_holds_in_the_backward_pass_too(method: str) -> None:
    """f in bfloat16: evaluated in float32 the backward pass would differentiate another function."""
    torch.manual_seed(0)
    net = nn.Linear(8, 8)
    y0 = torch.randn(4, 8)
    dtypes = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        out = net(y)
        dtypes.append(out.dtype)
        return 0.1 * torch.tanh(out.float())

    options = {} if method == "pece" else {"snes_rtol": 1e-2, "ksp_rtol": 1e-2}  # bfloat16 rounds to 4e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pfde.fdeint(func, y0, T, 0.6, method=method, params=list(net.parameters()), options=options).sum()
    forward = len(dtypes)
    loss.backward()
    assert len(dtypes) > forward
    assert set(dtypes) == {torch.bfloat16}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.linear(y)))


@pytest.mark.parametrize("store", ["state", "stages"])
@pytest.mark.parametrize("method", ["euler", "pece"])
def test_random_numbers_at_some_steps_only_are_refused(method: str, store: str) -> None:
    """What f draws is kept step by step if it draws at t[0]; else it is seen once the forward pass has ended."""
    drop, gradient = Noisy(), pfde.Discrete(store=store)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return drop(t, y) if t > 0.5 else -y

    keywords = {"method": method, "gradient": gradient, "params": list(drop.parameters())}
    with pytest.raises(pfde.PfdeError, match=r"func drew random numbers at some step, .*store='graph'.*Backprop"):
        pfde.fdeint(f, start(), T, 0.6, **keywords)
    with torch.no_grad():
        pfde.fdeint(f, start(), T, 0.6, **keywords)
    drop.eval()
    pfde.fdeint(f, start(), T, 0.6, **keywords).sum().backward()


@pytest.mark.parametrize("method", ["euler", "pece"])
def test_random_numbers_with_the_graph_kept(method: str) -> None:
    """Equal to autograd through the same steps with the same numbers; a second pass replays them."""
    f, y0, found = Noisy(), start(), []
    for gradient in (pfde.Backprop(), pfde.Discrete(store="graph")):
        torch.manual_seed(3)
        loss = pfde.fdeint(f, y0, T, 0.6, method=method, gradient=gradient).square().sum()
        found.append(torch.autograd.grad(loss, (y0, f.linear.weight), retain_graph=True))
    state = torch.get_rng_state()
    again = torch.autograd.grad(loss, (y0, f.linear.weight))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(list(again), list(found[1]))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


# -- convergence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("method", IMPLICIT)
def test_a_stage_that_does_not_converge(method: str, grad: bool) -> None:
    """y = r + w K (y^2 + 1) has no real solution for large K."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return (y * y + 1) * (1e3 if t > 0.5 else 0.01)

    message = (
        r"stage equation did not converge at t=0.6, step 3: DIVERGED_\w+ after \d+ Newton iterations.*reduce step_size"
    )
    with torch.set_grad_enabled(grad), pytest.raises(pfde.ConvergenceError, match=message):
        pfde.fdeint(func, start(grad=grad), T, 0.6, method=method)
    assert_same(gradients(method), gradients(method))


@pytest.mark.parametrize("method", IMPLICIT)
def test_an_adjoint_system_that_does_not_converge(method: str) -> None:
    """The forward pass stays in an eigenspace of A, where GMRES needs one iteration; its transpose does not."""
    A = torch.tensor([[-1.0, 2.0], [0.0, -3.0]], dtype=torch.float64)
    y0 = start(1.0, 0.0)
    options = {"fde_jacobian": "matrix_free", "adjoint_ksp_max_it": 1}
    y = pfde.fdeint(lambda t, y: A @ y, y0, T, 0.6, method=method, options=options)
    message = r"adjoint system did not converge at t=1, step 5: DIVERGED_\w+ after 1 iterations.*'adjoint_ksp_monitor'"
    for _ in range(2):
        with pytest.raises(pfde.ConvergenceError, match=message):
            y[:, 0].sum().backward(retain_graph=True)
    assert y0.grad is None
    assert_same(gradients(method), gradients(method))


# -- devices ---------------------------------------------------------------------------------------------------------


def test_devices_that_petsc_has_no_vectors_for() -> None:
    from petsc4py import PETSc

    from pfde.system.vectors import require_device

    require_device(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"y0 is on meta: PETSc has vectors for 'cpu' and 'cuda' only; move y0"):
        require_device(torch.device("meta"))
    if not PETSc.Sys.hasExternalPackage("cuda"):
        with pytest.raises(
            RuntimeError, match=r"y0 is on cuda, but this PETSc was built without CUDA vectors: configure"
        ):
            require_device(torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_cuda(method: str) -> None:
    from petsc4py import PETSc

    f, y0 = Field().cuda(), start().detach().cuda().requires_grad_()
    if not PETSc.Sys.hasExternalPackage("cuda"):
        with pytest.raises(RuntimeError, match="this PETSc was built without CUDA vectors"):
            pfde.fdeint(f, y0, T, 0.6, method=method)
        return
    y = pfde.fdeint(f, y0, T, 0.6, method=method)
    got = torch.autograd.grad(y.square().sum(), (y0, f.a))
    expected = gradients(method)
    for a, b in zip(got, (expected[0], expected[2]), strict=True):
        assert a.is_cuda
        assert torch.allclose(a.cpu(), b, rtol=1e-11)


# -- FDEBlock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"alpha": 1.2}, ValueError, r"alpha must be in \(0, 1\]: got 1.2"),
        ({"alpha": float("nan")}, ValueError, r"alpha must be in \(0, 1\]: got nan"),
        ({"alpha": 1.0, "learn_alpha": True}, ValueError, r"alpha must be below 1 to be learned.*: got 1"),
        (
            {"alpha": start(0.5)},
            ValueError,
            r"alpha requires a gradient.*use alpha=alpha.detach\(\) with learn_alpha=True",
        ),
        ({"alpha": True}, TypeError, "alpha must be a number or a tensor, .*: got bool"),
        ({"alpha": "half"}, TypeError, "alpha must be a number or a tensor, .*: got str"),
        ({"alpha": 0.5, "t": (1.0, 0.0)}, ValueError, "t must be increasing"),
        ({"alpha": 0.5, "t": ()}, ValueError, "at least one time"),
        ({"alpha": 0.5, "t": 1.0}, ValueError, r"t must be one-dimensional with at least one time.*: got shape \(\)"),
        ({"alpha": 0.5, "method": "rk4"}, ValueError, "method must be one of .*: got 'rk4'"),
        ({}, TypeError, "missing 1 required keyword-only argument: 'alpha'"),
        ({"alpha": 0.5, "steps": 3}, TypeError, "unexpected keyword argument 'steps'"),
    ],
)
def test_block_arguments(keywords: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pfde.nn.FDEBlock(Field(), **keywords)


@pytest.mark.parametrize("learn_alpha", [True, False])
def test_a_block_survives_copies_pickles_and_state_dicts(learn_alpha: bool) -> None:
    def step(block: nn.Module) -> list[Tensor]:
        block.zero_grad()
        y0 = start()
        y = block(y0)
        y.square().sum().backward()
        return [y.detach(), y0.grad, *(p.grad for p in block.parameters())]

    block = pfde.nn.FDEBlock(Field(), alpha=0.7, learn_alpha=learn_alpha, step_size=0.25, gradient=pfde.Discrete())
    del block.func.hook  # a lambda: not picklable, and not needed
    type(block.func).hook = staticmethod(lambda _: None)
    expected = step(block)
    assert len(expected) == 4 if learn_alpha else 3
    assert_same(step(copy.deepcopy(block)), expected)
    assert_same(step(pickle.loads(pickle.dumps(block))), expected)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other = pfde.nn.FDEBlock(Field(), alpha=0.3, learn_alpha=learn_alpha, step_size=0.25)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.alpha, block.alpha)
    assert_same(step(other), expected)
    assert float(block.alpha.detach()) == pytest.approx(0.7, abs=1e-15)


def test_a_block_keeps_an_iterator_of_params() -> None:
    f = Field()
    block = pfde.nn.FDEBlock(lambda t, y: f(t, y), alpha=0.7, params=f.parameters())
    for _ in range(2):
        block(start()).sum().backward()


# -- memory ----------------------------------------------------------------------------------------------------------


def resident() -> float:
    """This process's memory, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.parametrize("fault", ["none", "forward", "backward"])
@pytest.mark.parametrize("method", ["euler", "pece", "trapezoid", "l1"])
def test_nothing_leaks(method: str, fault: str) -> None:
    """100 solves that hold 0.4 MB or more each; without the garbage collector, which does not see C's references."""
    w = torch.full((50,), 0.5, dtype=torch.float64, requires_grad=True)
    calls = [0, 0]

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == calls[1]:
            raise ValueError("boom")
        return torch.tanh(y * w)

    def solve() -> None:
        y0 = torch.ones(100, 50, dtype=torch.float64, requires_grad=True)
        calls[:] = 0, {"none": 0, "forward": 5, "backward": 0}[fault]
        y = pfde.fdeint(func, y0, T, 0.6, method=method, params=[w])
        if fault == "backward":
            calls[1] = calls[0] + 2
        y.sum().backward()

    def repeat(count: int) -> None:
        for _ in range(count):
            with contextlib.suppress(ValueError):
                solve()

    gc.collect()
    gc.disable()
    try:
        repeat(20)
        before = resident()
        repeat(100)
        growth = resident() - before
    finally:
        gc.enable()
    assert growth < 10, f"100 solves left {growth:.1f} MB behind"


@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_solve_is_freed_with_its_result(method: str, keep_graph: bool) -> None:
    """Without the garbage collector: f (what it holds may be large) goes with the last reference to y."""
    gc.collect()
    gc.disable()
    try:
        f = Field()
        alive = weakref.ref(f)
        y = pfde.fdeint(f, start(), T, 0.6, method=method)
        if not keep_graph:
            y.sum().backward()
        del f
        assert (alive() is not None) is keep_graph  # a backward pass that keeps no graph lets go of f at once
        del y
        assert alive() is None
    finally:
        gc.enable()
