"""`odeint_event`: what is wrong with an event or its arguments is an error that says what to do."""

import math

import pytest
import torch
from torch import Tensor

import pfde
from support.events import FORMS, D, number


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_no_event_before_t_max(form: str, reverse: bool, grad: bool) -> None:
    y0, t0 = torch.ones(1, dtype=D, requires_grad=grad), number(0.1, grad=grad)
    with pytest.raises(pfde.PfdeError, match=r"no event up to t=\S+: move t_max, or check the sign of event_fn"):
        pfde.odeint_event(
            lambda t, y: torch.ones_like(y),
            y0,
            t0,
            event_fn=lambda t, y: y - 5 if not reverse else y + 5,
            reverse_time=reverse,
            t_max=-1.0 if reverse else 1.0,
            **FORMS[form],
        )


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_no_event_at_all(dtype: torch.dtype) -> None:
    """Without t_max the steps end somewhere."""
    with pytest.raises(pfde.PfdeError, match=r"no event up to|steps were tried"):
        pfde.odeint_event(
            lambda t, y: -y,
            torch.ones(1, dtype=dtype),
            0.0,
            event_fn=lambda t, y: y + 1,
            rtol=1e-3,
            atol=1e-3,
            options={"max_num_steps": 300},
        )
    with pytest.raises(pfde.PfdeError, match=r"no event up to|steps were tried"):
        pfde.odeint_event(lambda t, y: 0 * y, torch.ones(1, dtype=dtype), 0.0, event_fn=lambda t, y: y + 1)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"event_fn": 3}, TypeError, r"event_fn must be callable as event_fn\(t, y\): got int"),
        ({"event_fn": lambda t, y: 1.0}, TypeError, "event_fn must return a real floating-point tensor: got float"),
        (
            {"event_fn": lambda t, y: y + 0j},
            TypeError,
            "event_fn must return a real floating-point tensor: got a tensor",
        ),
        (
            {"event_fn": lambda t, y: y > 0},
            TypeError,
            "event_fn must return a real floating-point tensor: got a tensor",
        ),
        (
            {"event_fn": lambda t, y: y[:0]},
            TypeError,
            "event_fn must return a real floating-point tensor: got a tensor",
        ),
        ({"event_fn": lambda t, y: y * math.nan}, pfde.PfdeError, "event_fn returned NaN or inf at t=0"),
        (
            {"t0": torch.zeros(2)},
            ValueError,
            "t0 must be a number or a 0-d floating-point tensor: got a tensor of shape",
        ),
        (
            {"t0": torch.tensor(0)},
            ValueError,
            "t0 must be a number or a 0-d floating-point tensor: got a tensor of shape",
        ),
        ({"t0": "now"}, TypeError, "t0 must be a number: got str"),
        ({"t0": math.nan}, ValueError, "finite"),
        ({"t_max": 0.0}, ValueError, "t_max must be above t0=0: got 0"),
        ({"t_max": -1.0}, ValueError, "t_max must be above t0=0: got -1"),
        ({"t_max": 1.0, "reverse_time": True}, ValueError, "t_max must be below t0=0: got 1"),
        ({"t_max": math.nan}, ValueError, "t_max must be above t0=0: got nan"),
        ({"t_max": "late"}, TypeError, "t_max must be a number: got str"),
        (
            {"method": "rk4"},
            ValueError,
            "step_size must be given for a method without adaptive steps, to look for an event",
        ),
        (
            {"method": "cn"},
            ValueError,
            "step_size must be given for a method without adaptive steps, to look for an event",
        ),
        ({"step_size": -0.1}, ValueError, "step_size must be positive"),
        ({"step_size": math.nan}, ValueError, "step_size must be positive"),
        ({"method": "gl"}, ValueError, "method must be one of .*; 'gl' is a method of pfde.fdeint"),
        ({"method": "petsc:rk:5dp"}, ValueError, "method 'petsc:rk:5dp' has no events"),
        ({"gradient": pfde.Continuous()}, ValueError, r"gradient=pfde.Continuous\(\) has no events: use pfde.Discrete"),
        ({"gradient": "adjoint"}, TypeError, "gradient must be"),
        ({"rtol": -1.0}, ValueError, "rtol must be finite and not negative"),
        ({"options": {"jump_t": None}}, ValueError, "'jump_t' is not implemented"),
    ],
)
def test_arguments(keywords: dict, error: type[Exception], message: str) -> None:
    keywords = {"t0": 0.0, "event_fn": lambda t, y: y - 0.5} | keywords
    t0 = keywords.pop("t0")
    with pytest.raises(error, match=message):
        pfde.odeint_event(lambda t, y: -y, torch.ones(1, dtype=D), t0, **keywords)


def test_an_event_that_only_touches_zero_has_no_derivative() -> None:
    """g = y^3 crosses with slope zero: its time is found, its gradient is not."""
    y0 = torch.full((1,), -1.0, dtype=D, requires_grad=True)
    f = lambda t, y: torch.ones_like(y)  # noqa: E731
    # midpoint has one weight, 1, so that y is 0 at t = 1 to the bit
    with pytest.raises(pfde.PfdeError, match=r"the event at t=1 has no derivative: g_t \+ g_y . y' is 0 there"):
        pfde.odeint_event(f, y0, 0.0, event_fn=lambda t, y: y**3, method="midpoint", step_size=0.25)
    with torch.no_grad():
        t, _ = pfde.odeint_event(f, y0, 0.0, event_fn=lambda t, y: y**3, method="midpoint", step_size=0.25)
    assert float(t) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt("ctrl-c")], ids=["ValueError", "Ctrl-C"])
@pytest.mark.parametrize("form", ["dopri5", "rk4", "esdirk4"])
def test_an_exception_in_event_fn_comes_out_as_it_was_raised(form: str, error: BaseException) -> None:
    for k in (1, 2, 5):
        calls = [0]

        def event_fn(t: Tensor, y: Tensor, calls: list = calls, k: int = k) -> Tensor:
            calls[0] += 1
            if calls[0] == k:
                raise error
            return y - 0.5

        y0 = torch.ones(1, dtype=D, requires_grad=True)
        with pytest.raises(type(error)) as caught:
            pfde.odeint_event(lambda t, y: -y, y0, 0.0, event_fn=event_fn, **FORMS[form])
        assert caught.value is error
