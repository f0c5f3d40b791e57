"""Dual numbers on tensors: d weights / d alpha in one pass, by the rules of forward mode.

A function of tensors is run on a `Dual`, whose `tangent` is carried along by the chain rule (Griewank, Walther 2008,
doi:10.1137/1.9780898717761, chapter 3). torch has forward mode itself, and `differentiate` takes it for every operation
that has no rule here, in a user's scheme say. It is not the first choice, because it fills in for an operand without a
tangent, a lag or the number 1, in Python: 0.2 ms for each of the sixty operations of a scheme's weights, in every solve
that learns alpha, and torch's compiler imported for it (a second, 43 MB). The rules are torch's own, so that
derivatives are the same to the bit.

NOTE. A comparison is one of values, and its result has no tangent; `cumprod` must not meet a zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Rule = Callable[..., Any]


class NoRuleError(Exception):
    """An operation that `Dual` has no rule for."""


class Dual(Tensor):
    """A tensor and its tangent, of its shape."""

    tangent: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # a property's getter is called __get__, and belongs to the property
        name = func.__name__ if func.__name__ != "__get__" else func.__self__.__name__  # type: ignore[attr-defined]
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if name in _WITHOUT_TANGENT:
                return func(*args, **kwargs)
            if name in _LINEAR and not any(isinstance(x, Dual) for x in (*args[1:], *kwargs.values())):
                return _linear(func, *args, **kwargs)
            rule = _RULES.get(name)
            if rule is None or kwargs.keys() - {"dim"}:
                raise NoRuleError(name)
            try:
                return rule(*args, **kwargs)
            except TypeError as error:  # an operation of this name with other arguments
                raise NoRuleError(name) from error


def differentiate(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """What a function returns, a tensor or a named tuple of them, differentiated along (1, ..., 1).

    x : (G,), without a graph; each column of the results depends on its own entry only, so that this is its derivative
    """
    with torch.no_grad():
        try:
            return _each(_tangent, function(_dual(x.clone(), torch.ones_like(x))))
        except NoRuleError:
            pass
        # Not inside the forward of an autograd.Function, where torch ignores tangents.
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone(), torch.ones_like(x))  # type: ignore[no-untyped-call]
            return _each(_tangent_of_torch, function(dual))


def _each(of: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return of(value)
    return type(value)(*(None if part is None else of(part) for part in value))


def _tangent_of_torch(dual: Tensor) -> Tensor:
    value, tangent = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
    return torch.zeros_like(value) if tangent is None else tangent


def _dual(value: Tensor, tangent: Tensor) -> Dual:
    dual = value.as_subclass(Dual)
    dual.tangent = tangent
    return dual


def _value(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Dual) else x


def _tangent(x: Tensor) -> Tensor:
    return x.tangent if isinstance(x, Dual) else torch.zeros_like(x)


def _sum(*terms: Tensor | None) -> Tensor:
    """Of those that are there."""
    first, *others = [term for term in terms if term is not None]
    for other in others:
        first = first + other
    return first


def _linear(func: Callable[..., Any], x: Dual, *args: Any, **kwargs: Any) -> Any:
    """An operation that is linear in its first argument and has no other tensors: a view, a sum, a sign."""
    value, tangent = func(_value(x), *args, **kwargs), func(x.tangent, *args, **kwargs)
    return _dual(value, tangent) if isinstance(value, Tensor) else tuple(map(_dual, value, tangent))


def _joined(func: Callable[..., Tensor]) -> Rule:
    def rule(parts: Sequence[Tensor], dim: int = 0) -> Dual:
        return _dual(func([_value(x) for x in parts], dim), func([_tangent(x) for x in parts], dim))

    return rule


def _where(condition: Tensor, a: Any, b: Any) -> Dual:
    a_dot, b_dot = (x.tangent if isinstance(x, Dual) else condition.new_zeros((), dtype=torch.float64) for x in (a, b))
    return _dual(torch.where(condition, _value(a), _value(b)), torch.where(condition, a_dot, b_dot))


def _elementwise(func: Callable[[Tensor], Tensor], slope: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """f(x), whose tangent is made by `slope` of x and f(x)."""

    def rule(x: Dual) -> Dual:
        value = _value(x)
        result = func(value)
        return _dual(result, x.tangent * slope(value, result))

    return rule


def _reversed(rule: Rule) -> Rule:
    return lambda a, b: rule(b, a)


def _add(a: Any, b: Any) -> Dual:
    result = _value(a) + _value(b)
    tangents = [x.tangent for x in (a, b) if isinstance(x, Dual)]
    return _dual(result, _sum(*tangents).expand_as(result))


def _sub(a: Any, b: Any) -> Dual:
    result = _value(a) - _value(b)
    tangent = -b.tangent if not isinstance(a, Dual) else a.tangent - b.tangent if isinstance(b, Dual) else a.tangent
    return _dual(result, tangent.expand_as(result))


def _mul(a: Any, b: Any) -> Dual:
    x, y = _value(a), _value(b)
    if not isinstance(b, Dual):
        return _dual(x * y, a.tangent * y)
    tangent = b.tangent * x
    if isinstance(a, Dual):
        tangent += a.tangent * y
    return _dual(x * y, tangent)


def _matmul(a: Tensor, b: Tensor) -> Dual:
    """One of them has a tangent."""
    if isinstance(a, Dual):
        if isinstance(b, Dual):
            raise NoRuleError("matmul of two")
        return _dual(_value(a) @ b, a.tangent @ b)
    return _dual(a @ _value(b), a @ b.tangent)  # type: ignore[attr-defined]


def _div(a: Any, b: Any) -> Dual:
    y = _value(b)
    result = _value(a) / y
    if not isinstance(b, Dual):
        return _dual(result, a.tangent / y)
    if not isinstance(a, Dual):
        return _dual(result, -b.tangent * result / y)
    return _dual(result, (a.tangent - b.tangent * result) / y)


def _reciprocal(x: Dual) -> Dual:
    result = 1 / _value(x)
    return _dual(result, -x.tangent * (result * result))


def _rdiv(b: Dual, a: Any) -> Dual:
    """a / b, as torch takes it."""
    return _mul(_reciprocal(b), a)


def _addcmul(a: Any, b: Any, c: Any) -> Dual:
    x, y, z = map(_value, (a, b, c))
    return _dual(
        torch.addcmul(x, y, z),
        _sum(
            a.tangent if isinstance(a, Dual) else None,
            b.tangent * z if isinstance(b, Dual) else None,
            c.tangent * y if isinstance(c, Dual) else None,
        ),
    )


def _pow(a: Any, b: Any) -> Dual:
    x, y = _value(a), _value(b)
    result = x**y
    parts = []
    if isinstance(a, Dual):
        slope = y * x ** (y - 1)
        parts.append(a.tangent * (torch.where(y == 0, 0.0, slope) if isinstance(y, Tensor) else slope))
    if isinstance(b, Dual):
        if isinstance(x, Tensor):  # 0^y is 0 for every y above 0
            parts.append(torch.where((x == 0) & (y >= 0), 0.0, b.tangent * (result * torch.log(x))))
        elif x > 0:
            parts.append(b.tangent * (result * math.log(x)))
        else:
            raise NoRuleError("pow of a number that is not above 0")
    return _dual(result, _sum(*parts))


def _cumprod(x: Dual, dim: int) -> Dual:
    value = _value(x)
    if not value.all():
        raise NoRuleError("cumprod of a zero")
    result = value.cumprod(dim)
    return _dual(result, (x.tangent / value).cumsum(dim) * result)


# fmt: off
_WITHOUT_TANGENT = frozenset({
    "shape", "dtype", "device", "ndim", "dim", "size", "numel", "__len__", "gt", "lt", "ge", "le", "eq", "ne",
    "ones_like", "zeros_like", "new_zeros", "new_ones",
})
_LINEAR = frozenset({
    "__getitem__", "T", "mT", "contiguous", "view", "reshape", "permute", "transpose", "movedim", "unsqueeze",
    "squeeze", "expand", "flip", "unbind", "split", "sum", "cumsum", "diff", "neg",
})
# fmt: on
_RULES: dict[str, Rule] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "true_divide": _div,
    "matmul": _matmul,
    "pow": _pow,
    "__radd__": _reversed(_add),
    "__rsub__": _reversed(_sub),
    "rsub": _reversed(_sub),
    "__rmul__": _reversed(_mul),
    "__rtruediv__": _rdiv,
    "__rdiv__": _rdiv,
    "__pow__": _pow,
    "__rpow__": _reversed(_pow),
    "__rmatmul__": _reversed(_matmul),
    "reciprocal": _reciprocal,
    "addcmul": _addcmul,
    "where": _where,
    "cat": _joined(torch.cat),
    "stack": _joined(torch.stack),
    "cumprod": _cumprod,
    "exp": _elementwise(torch.exp, lambda x, y: y),
    "expm1": _elementwise(torch.expm1, lambda x, y: y + 1),
    "log": _elementwise(torch.log, lambda x, y: 1 / x),
    "log1p": _elementwise(torch.log1p, lambda x, y: 1 / (x + 1)),
    "lgamma": _elementwise(torch.lgamma, lambda x, y: torch.digamma(x)),
}
