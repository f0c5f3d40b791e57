"""Right-hand sides, states and their derivatives for property-based tests: all from one seed, new at each call.

A *kind* of function is how it is made and what it returns: a module or a closure, its argument, a view, a constant, a
parameter, something derived from parameters before the solve. All are contractive or grow at most like exp(t), so that
gradients are as well conditioned as the solution. None writes to memory, keeps a state or draws random numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Drawn(NamedTuple):
    """func, its `params=`, and the leaves that gradients are asked for."""

    func: Callable[..., Any]
    params: list[Tensor] | None
    leaves: list[Tensor]


class Decay(nn.Module):
    """-a y + b sin(c y), c a buffer; `more` is a parameter that is not used."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.1, dtype=dtype))
        self.b = nn.Parameter(torch.tensor(0.4, dtype=dtype))
        self.more = nn.Parameter(torch.ones(2, dtype=dtype))
        self.register_buffer("c", torch.tensor(0.7, dtype=dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.a * y + self.b * torch.sin(self.c * y)


class Kept(nn.Module):
    """-k_0 y + k_1 sin(y), with k = softmax(p) computed once and kept as an attribute, as attention weights are."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.3, -0.2], dtype=dtype))
        self.k = torch.softmax(self.p, 0)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.k[0] * y + self.k[1] * torch.sin(y)


class Energy(nn.Module):
    """-a grad H(y), H = sum sqrt(1 + |y|^2), by autograd within, as in a Hamiltonian network."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5, dtype=dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            z = y if y.requires_grad else y.detach().requires_grad_()
            energy = self.a * (1 + (z * z.conj()).real).sqrt().sum()
            (slope,) = torch.autograd.grad(energy, z, create_graph=True)
        return -slope


def _module(model: type[nn.Module]) -> Callable[[torch.dtype], Drawn]:
    def make(dtype: torch.dtype) -> Drawn:
        func = model(dtype)
        return Drawn(func, None, list(func.parameters()))

    return make


def _closure(body: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[torch.dtype], Drawn]:
    """body(p, t, y) with one number p that a closure keeps."""

    def make(dtype: torch.dtype) -> Drawn:
        p = torch.tensor(-0.8, dtype=dtype, requires_grad=True)
        return Drawn(lambda t, y: body(p, t, y), [p], [p])

    return make


def _free(body: Callable[[Tensor, Tensor], Tensor]) -> Callable[[torch.dtype], Drawn]:
    return lambda dtype: Drawn(body, None, [])


def _derived(dtype: torch.dtype) -> Drawn:
    p = torch.tensor(-0.3, dtype=dtype, requires_grad=True)
    k = p.exp()
    return Drawn(lambda t, y: -k * y + torch.sin(k * t), [p], [p])


def _derived_twice(dtype: torch.dtype) -> Drawn:
    """Both p and what is derived of it are used."""
    p = torch.tensor(-0.3, dtype=dtype, requires_grad=True)
    k = p.exp()
    return Drawn(lambda t, y: p * y + k * torch.sin(y), [p], [p])


def _expanded(dtype: torch.dtype) -> Drawn:
    """A parameter itself, as a view of the state's shape."""
    p = torch.tensor(0.6, dtype=dtype, requires_grad=True)
    return Drawn(lambda t, y: p.to(y.dtype).expand(y.shape), [p], [p])


def _constant(dtype: torch.dtype) -> Drawn:
    kept = torch.tensor(0.3, dtype=dtype)
    return Drawn(lambda t, y: kept.to(y.dtype).expand(y.shape), None, [])


def _own(p: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Written in place, but to memory of its own."""
    z = y.clone()
    z *= p
    z += t
    return z


def _stopped(p: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Part of it beside the graph."""
    with torch.no_grad():
        scale = 1 / (1 + y.abs())
    return p * scale * y


def _checkpointed(p: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return checkpoint(lambda x: p * torch.sin(x), y, use_reentrant=False)


KINDS: dict[str, Callable[[torch.dtype], Drawn]] = {
    "module": _module(Decay),
    "closure": _closure(lambda p, t, y: p * y + torch.sin(y) / 3),
    "of time": _closure(lambda p, t, y: p * torch.cos(t) * y + t),
    "itself": _free(lambda t, y: y),
    "a view": _free(lambda t, y: y[...]),
    "flipped": _free(lambda t, y: y.flip(0) if y.dim() else y),
    "transposed": _free(lambda t, y: y.mT.contiguous().mT if y.dim() == 2 else y.view_as(y)),
    "conjugate": _free(lambda t, y: y.conj()),
    "detached": _free(lambda t, y: y.detach()),
    "zero": _free(lambda t, y: torch.zeros_like(y)),
    "a constant": _constant,
    "time itself": _free(lambda t, y: t.to(y.dtype).expand(y.shape)),
    "a parameter": _expanded,
    "no y": _closure(lambda p, t, y: p * t * torch.ones_like(y)),
    "no parameter": _closure(lambda p, t, y: -y),
    "nonlinear in y, parameter added": _closure(lambda p, t, y: p - torch.sin(y)),
    "derived outside": _derived,
    "derived outside and itself": _derived_twice,
    "kept attention": _module(Kept),
    "gradient within": _module(Energy),
    "in place on its own": _closure(_own),
    "partly without a graph": _closure(_stopped),
    "checkpointed": _closure(_checkpointed),
}


def function(kind: str, dtype: torch.dtype, *, parts: bool) -> Drawn:
    """A function of this kind; of a tuple, part by part, with the first added to the last."""
    drawn = KINDS[kind](dtype)
    if not parts:
        return drawn
    one = drawn.func

    def func(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first, last = (one(t, part) for part in y)
        return first, last + 0.1 * y[0].sum()

    return Drawn(func, drawn.params or drawn.leaves, drawn.leaves)


def start(shape: tuple[int, ...], dtype: torch.dtype, state: str, seed: int) -> Any:
    """y_0, leaves of moderate size: a tensor, a complex one, or a tuple of two parts."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(shape: tuple[int, ...]) -> Tensor:
        kind = dtype.to_complex() if state == "complex" else dtype
        return torch.randn(shape, generator=generator, dtype=kind).mul_(0.5).requires_grad_()

    return (leaf(shape), leaf((2,))) if state == "tuple" else leaf(shape)


def loss(y: Any) -> Tensor:
    """A sum with weights of both signs over all outputs."""
    total = torch.zeros((), dtype=torch.float64)
    for part in y if isinstance(y, tuple) else (y,):
        real = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
        weights = torch.cos(1.0 + torch.arange(real.numel(), dtype=torch.float64)).reshape(real.shape)
        total = total + (weights * real).sum()
    return total


def derivatives(y: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The solution and the gradient of `loss`, flat and real, zeros where an input does not matter."""
    value = loss(y)
    found: list[Tensor] = [part.detach() for part in (y if isinstance(y, tuple) else (y,))]
    if inputs:
        bars = torch.autograd.grad(value, inputs, allow_unused=True) if value.requires_grad else [None for _ in inputs]
        found += [torch.zeros_like(x) if bar is None else bar for x, bar in zip(inputs, bars, strict=True)]
    return [(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1).double() for x in found]


def furthest(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest of the norms of all."""
    size = max((float(x.norm()) for x in expected), default=0.0)
    assert all(bool(torch.isfinite(x).all()) for x in (*found, *expected)), "not finite"
    return max((float((x - ref).norm()) / max(size, 1e-3) for x, ref in zip(found, expected, strict=True)), default=0.0)
