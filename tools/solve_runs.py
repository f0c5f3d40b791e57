"""The small models and the kinds of solves that `record_solves` records: what one case gives, as hashes of its bits."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from petsc4py import PETSc
from torch import Tensor, nn

import pfde
import pfde.testing
import pfde.ts

Record = dict[str, Any]
Problem = tuple[Callable[[Tensor, Any], Any], Any, list[Tensor]]  # func, y0, what func uses

F64 = torch.float64
FEW = (0.0, 0.25, 0.75, 1.0)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Numbers of a generator of their own, the same in every dtype but for rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Network(nn.Module):
    """f(t, y) = W2 tanh(W1 y + b1 + sin 3t) + b2, with dropout where wanted."""

    def __init__(self, dtype: torch.dtype, dropout: float = 0.0, width: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, width, dtype=dtype), nn.Linear(width, 3, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """f of a batch."""
        return self.second(self.dropout(torch.tanh(self.first(y) + torch.sin(3 * t))))


def network(dtype: torch.dtype, dropout: float = 0.0) -> Problem:
    """A module, (2, 3)."""
    func = Network(dtype, dropout)
    return func, draw(2, 3, dtype=dtype), list(func.parameters())


def hand(dtype: torch.dtype, rates: Iterable[float] = (1.0, 2.0, 0.5)) -> Problem:
    """A nonautonomous function whose parameters have to be named, (2, 3)."""
    rate, force = (torch.tensor(tuple(x)).to(dtype).requires_grad_() for x in (rates, (0.3, 0.7, -0.2)))

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -rate * y + force * torch.cos(2 * t) * torch.sin(y.roll(1, -1))

    return func, draw(2, 3, dtype=dtype), [rate, force]


def split(dtype: torch.dtype) -> Problem:
    """The same in two parts."""
    rate, force = (torch.tensor(x).to(dtype).requires_grad_() for x in ((1.0, 5.0, 20.0), (0.3, 0.7, -0.2)))
    func = pfde.Split(lambda t, y: -rate * y, lambda t, y: force * torch.cos(2 * t) * torch.sin(y.roll(1, -1)))
    return func, draw(2, 3, dtype=dtype), [rate, force]


def split_networks(dtype: torch.dtype) -> Problem:
    """Two modules."""
    func = pfde.Split(Network(dtype), Network(dtype))
    return func, draw(2, 3, dtype=dtype), list(func.parameters())


def complex_hand(dtype: torch.dtype) -> Problem:
    """Complex numbers, (3,)."""
    rate = torch.tensor((1.0 + 2.0j, 0.5 - 1.0j, 0.25 + 0.0j)).to(dtype.to_complex()).requires_grad_()
    y0 = torch.complex(draw(3, dtype=dtype), draw(3, dtype=dtype, seed=1))
    return lambda t, y: -rate * y + 0.2 * torch.cos(t) * y.roll(1) * y.abs(), y0, [rate]


def pair(dtype: torch.dtype) -> Problem:
    """A tuple of (2, 3) and (2,)."""
    rate = torch.tensor(0.8).to(dtype).requires_grad_()

    def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return -rate * y[0] + torch.sin(y[1])[:, None], t * y[0].sum(-1) - rate * y[1] ** 2

    return func, (draw(2, 3, dtype=dtype), draw(2, dtype=dtype, seed=1)), [rate]


def kinetics(dtype: torch.dtype) -> Problem:
    """Two rate equations and one algebraic one, y0 consistent, (2, 3)."""
    rate = torch.tensor((0.5, 3.0)).to(dtype).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        a, b, c = y.unbind(-1)
        return torch.stack((-rate[0] * a + b * c, rate[0] * a - b * c - rate[1] * b**2, a + b + c - 1), -1)

    return func, torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]], dtype=dtype), [rate]


def oscillator(dtype: torch.dtype) -> Problem:
    """A pendulum with friction, (2,)."""
    rate = torch.tensor((1.5, 0.1)).to(dtype).requires_grad_()
    func = lambda t, y: torch.stack((y[1], -rate[0] * torch.sin(y[0]) - rate[1] * y[1]))  # noqa: E731
    return func, torch.tensor((1.0, 0.2), dtype=dtype), [rate]


def explosion(dtype: torch.dtype) -> Problem:
    """y' = rate y^2, infinite at t = 1."""
    rate = torch.ones((), dtype=dtype, requires_grad=True)
    return lambda t, y: rate * y**2, torch.ones(1, dtype=dtype), [rate]


def stiff(dtype: torch.dtype) -> Problem:
    """Rates far apart."""
    return hand(dtype, rates=(1.0, 50.0, 400.0))


def dropout(dtype: torch.dtype) -> Problem:
    """A module that draws random numbers."""
    return network(dtype, dropout=0.3)


# -- the kinds of cases --------------------------------------------------------------------------------------------


def digest(x: Any) -> Any:
    """Of a tensor's dtype, shape and bytes; of each in a tuple."""
    if isinstance(x, tuple | list):
        return [digest(part) for part in x]
    if not isinstance(x, Tensor):
        return repr(x)
    data = x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{x.dtype} {tuple(x.shape)} ".encode() + data).hexdigest()[:16]


def flat(*values: Any) -> list[Tensor]:
    """The tensors of nested tuples."""
    return [x for v in values for x in (flat(*v) if isinstance(v, tuple | list) else [v]) if isinstance(x, Tensor)]


def gradients(outputs: Any, inputs: dict[str, Any], backwards: int = 1, second: bool = False) -> Record:
    """Hashes of the gradients of <v, outputs>, v random; of a second derivative too."""
    ys = [y for y in flat(outputs) if y.requires_grad]
    xs = {f"{name}.{i}": x for name, group in inputs.items() for i, x in enumerate(flat(group)) if x.requires_grad}
    if not ys or not xs:
        return {"gradient": "none"}
    found: Record = {}
    vs = [torch.randn(y.shape, generator=torch.Generator().manual_seed(i), dtype=y.dtype) for i, y in enumerate(ys)]
    for k in range(backwards):
        keep = second or k + 1 < backwards
        bars = torch.autograd.grad(ys, list(xs.values()), vs, keep, create_graph=second, allow_unused=True)
        found |= {f"gradient {name}" + f" again {k}" * bool(k): digest(b) for name, b in zip(xs, bars, strict=True)}
    if second:
        total = sum(b.square().sum() for b in bars if b is not None and b.requires_grad)
        found |= {"second derivative": digest(torch.autograd.grad(total, list(xs.values()), allow_unused=True))}
    return found


def solved(
    model: Callable[[torch.dtype], Problem] = hand,
    *,
    door: Callable[..., Any] = pfde.solve,
    dtype: torch.dtype = torch.float64,
    t: Any = FEW,
    moving: bool = False,
    alpha: Any = None,
    learn: bool = False,
    under: Callable[[], AbstractContextManager[Any]] = nullcontext,
    backwards: int = 1,
    second: bool = False,
    **keywords: Any,
) -> Record:
    """Values, gradients and statistics of a solve; `t` moving and alpha learned where they are to get a gradient."""
    func, y0, parameters = model(dtype)
    func, y0 = keywords.pop("func", func), keywords.pop("y0", y0)
    if not isinstance(func, nn.Module) or isinstance(func, pfde.Split):
        keywords.setdefault("params", parameters)
    for part in flat(y0):
        if part.is_floating_point() or part.is_complex():
            part.requires_grad_()
    if isinstance(t, tuple):
        t = torch.tensor(t, dtype=torch.float64)
    t = t.clone().requires_grad_() if moving else t
    if learn:
        alpha = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    with under():
        result = door(func, y0, t, *(() if alpha is None else (alpha,)), **keywords)
    y = result.y if isinstance(result, pfde.Solution) else result
    found = {"y": digest(y), **gradients(y, {"y0": y0, "t": t, "alpha": alpha, "p": parameters}, backwards, second)}
    if isinstance(result, pfde.Solution):
        found |= {"stats": dataclasses.asdict(result.stats), "status": result.status, "t": digest(result.t)}
    return found


def event(model: Callable[[torch.dtype], Problem] = oscillator, *, t0: Any = 0.0, **keywords: Any) -> Record:
    """Where the first entry, less a level that gets a gradient, changes its sign."""
    func, y0, parameters = model(torch.float64)
    level = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    parameters.append(level)
    if t0 == "moving":
        t0 = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    y0.requires_grad_()
    keywords = {"event_fn": lambda t, y: y[0] - level, "params": parameters} | keywords
    found = pfde.odeint_event(func, y0, t0, **keywords)
    return {"event": digest(found), **gradients(found, {"y0": y0, "t0": t0, "p": parameters})}


def block(kind: type[nn.Module], model: Callable[[torch.dtype], Problem] = network, **keywords: Any) -> Record:
    """A layer: its values, the gradients of its parameters, what print shows."""
    func, y0, parameters = model(torch.float64)
    if not isinstance(func, nn.Module):
        rate, force = keywords["params"] = [nn.Parameter(p.detach()) for p in parameters]
        func = lambda t, y: -rate * y + force * torch.cos(t)  # noqa: E731
    layer = kind(func, **keywords)
    y0.requires_grad_()
    names = dict(layer.named_parameters())
    y = layer(y0)
    return {"y": digest(y), "shown": repr(layer), **gradients(y, {"y0": y0, **names})}


def verified(model: Callable[[torch.dtype], Problem] = network, **keywords: Any) -> Record:
    """The numbers of the gradient battery."""
    func, y0, parameters = model(keywords.pop("dtype", torch.float64))
    arguments = {"alpha": 0.6, "t": torch.linspace(0, 1, 25, dtype=torch.float64), "params": parameters} | keywords
    report = pfde.testing.verify(func, y0, **arguments)
    return {"report": json.loads(json.dumps(dataclasses.asdict(report), default=str)), "shown": str(report)}


def petsc(*, costs: int = 1, jacobian: bool = True, with_p: bool = True, **context: Any) -> Record:
    """D^alpha u_i = -p_i u_i - u_i^3 by PETSc's callbacks, and its adjoint."""
    p, u = PETSc.Vec().createSeq(2), PETSc.Vec().createSeq(2)
    p.setArray([1.0, 4.0])
    u.setArray([1.0, 0.7])

    def diagonal(entries: Callable[[Any], Any], matrix: Any, u: Any) -> None:
        for i, value in enumerate(entries(u.array_r)):
            matrix[i, i] = value
        matrix.assemble()

    def matrix() -> Any:
        made = PETSc.Mat().createAIJ((2, 2), nnz=1, comm=PETSc.COMM_SELF)
        made.setUp()
        return made

    ts, J, A = PETSc.TS().create(PETSc.COMM_SELF), matrix(), matrix()
    ts.createPython(pfde.ts.FractionalTS(**context), comm=PETSc.COMM_SELF)
    ts.setRHSFunction(lambda ts, t, u, f: f.setArray(-p.array_r * u.array_r - u.array_r**3), u.duplicate())
    if jacobian:
        ts.setRHSJacobian(lambda ts, t, u, J, P: diagonal(lambda u: -p.array_r - 3 * u**2, P, u), J, J)
    if with_p:
        ts.setRHSJacobianP(lambda ts, t, u, A: diagonal(lambda u: -u, A, u), A)
    ts.setTime(0.0)
    ts.setTimeStep(1 / 32)
    ts.setMaxTime(1.0)
    ts.setFromOptions()
    ts.solve(u)
    lambdas, mus = [u * (k + 1.0) for k in range(costs)], [p * 0.0 for _ in range(costs)]
    ts.setCostGradients(lambdas, mus)
    alphas = pfde.ts.adjoint_solve(ts, alpha=True)
    arrays = [torch.tensor(v.array_r) for v in (u, *lambdas, *mus)]
    return {"u, lambda, mu": digest(arrays), "alpha": repr(alphas), "steps": ts.getStepNumber()}


def interface(owner: Any, names: Iterable[str]) -> Record:
    """The parameters of what is public, with their defaults; annotations may name what is inside."""
    found: Record = {"names": sorted(names)}
    for name in found["names"]:
        value = getattr(owner, name)
        if callable(value) and not (isinstance(value, type) and issubclass(value, Exception)):
            parameters = inspect.signature(value).parameters.values()
            found[name] = [f"{x.kind.description} {x.name}" + f" = {x.default!r}" * (x.default is not x.empty)
                           for x in parameters]  # fmt: skip
    return found
