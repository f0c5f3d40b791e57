"""What func is in a forward pass, so that the backward pass, which evaluates it again, sees the same function.

    held = Held(func, parameters)          at the forward pass
    with held.restored(): ...              around the backward pass

Held by identity: parameters, buffers, tensor attributes and training flags of every module that func is, or reaches as
a method, a partial, a closure or a global name; tensors that func itself reaches in these ways; the memory that each
parameter had (`p.data = ...` gives it another) and whether it required a gradient. Whatever the program has put in
their place is there again afterwards, and what func has written to its buffers (running statistics) is undone. What
cannot be held (numbers, contents changed in place, a state kept elsewhere) is noticed by comparing f (`sweeps.marks`).

While it lasts the tensor hooks of parameters rest: a sweep sums many products, and autograd calls them on the sum.

NOTE 1. Most backward passes find all as it was and change nothing. Where something has to be put back, module and
tensors are seen so by other threads as well: such passes exclude each other, not what else the program does.

NOTE 2. torch's batch norm writes its statistics behind the tensors' versions. So those of its modules, and all small
buffers, are put back whatever their versions say.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_DEPTH = 4  # of functions that call functions
_SMALL = 4096  # entries of a buffer whose copy costs nothing beside a solve
_restoring = threading.RLock()


class _Slot(NamedTuple):
    """A place that holds a value: a key of a dictionary, or the content of a closure's cell."""

    owner: dict[str, Any] | CellType
    key: str
    value: Any

    def now(self) -> Any:
        """What it holds now; None where it holds nothing."""
        if isinstance(self.owner, dict):
            return self.owner.get(self.key)
        try:
            return self.owner.cell_contents
        except ValueError:  # deleted
            return None

    def put(self, value: Any) -> None:
        """Let it hold this."""
        if isinstance(self.owner, dict):
            self.owner[self.key] = value
        else:
            self.owner.cell_contents = value


class _Leaf(NamedTuple):
    """A leaf of func's graph, an alias of the memory that it had, and whether it required a gradient."""

    tensor: Tensor
    alias: Tensor
    requires_grad: bool


class Held:
    """What func holds now.

    Parameters
    ----------
    func : the user's callable
    parameters : tensors that func uses and that are to get a gradient
    """

    def __init__(self, func: Callable[..., Any], parameters: Sequence[Tensor]) -> None:
        self._parameters = tuple(parameters)
        modules, self._slots = _reached(func)
        self._buffers: list[Tensor] = []
        unseen: set[int] = set()  # buffers that may be written to without a new version
        leaves = {id(p): p for p in parameters if p.is_leaf}
        for module in modules:
            for table in (module._parameters, module._buffers, module._modules):
                self._slots.extend(_Slot(table, name, x) for name, x in table.items())
            leaves.update((id(p), p) for p in module._parameters.values() if p is not None and p.is_leaf)
            found = [x for x in module._buffers.values() if x is not None]
            self._buffers.extend(found)
            unseen.update(id(x) for x in found if isinstance(module, _NormBase) or x.numel() <= _SMALL)
        self._leaves = [_Leaf(p, p.detach(), p.requires_grad) for p in leaves.values()]
        self._versions = [-1 if id(x) in unseen else _version(x) for x in self._buffers]  # NOTE 2

    def end_forward(self) -> None:
        """The forward pass is over: from now on known are the buffers that func writes to."""
        pairs = zip(self._buffers, self._versions, strict=True)
        self._buffers = [x for x, version in pairs if _version(x) != version]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Let func be what it was; afterwards all is as the program had it."""
        with ExitStack() as undo:
            moved = [slot for slot in self._slots if slot.now() is not slot.value]
            changed = [leaf for leaf in self._leaves if _differs(leaf)]
            hooked = [p for p in self._parameters if p._backward_hooks]
            if moved or changed or hooked:
                undo.enter_context(_restoring)  # NOTE 1
            for slot in moved:
                undo.callback(slot.put, slot.now())
                slot.put(slot.value)
            for leaf in changed:
                undo.callback(_set_leaf, leaf.tensor, leaf.tensor.data, leaf.tensor.requires_grad)
                _set_leaf(leaf.tensor, leaf.alias, leaf.requires_grad)
            for p in hooked:
                hooks = p._backward_hooks
                assert hooks is not None
                undo.callback(hooks.update, dict(hooks))
                hooks.clear()
            for x in self._buffers:
                undo.callback(_copy, x, x.detach().clone())
            yield


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _differs(leaf: _Leaf) -> bool:
    x = leaf.tensor
    return x.requires_grad != leaf.requires_grad or x.data_ptr() != leaf.alias.data_ptr() or x.shape != leaf.alias.shape


def _set_leaf(x: Tensor, data: Tensor, requires_grad: bool) -> None:
    x.data = data
    x.requires_grad_(requires_grad)


def _copy(target: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)


def _reached(func: Callable[..., Any]) -> tuple[list[nn.Module], list[_Slot]]:
    """The modules that func is or reaches, and the slots of other values that it reaches."""
    modules: dict[int, nn.Module] = {}
    slots: list[_Slot] = []
    seen: set[int] = set()

    def visit_slot(owner: dict[str, Any] | CellType, key: str, depth: int) -> None:
        slot = _Slot(owner, key, None)
        value = slot.now()
        if isinstance(value, Tensor | nn.Module):
            slots.append(slot._replace(value=value))
        visit(value, depth)

    def visit(thing: Any, depth: int, *, called: bool = False) -> None:
        if depth < 0 or id(thing) in seen:
            return
        if isinstance(thing, nn.Module):
            for module in thing.modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    modules[id(module)] = module
                    visit_attributes(vars(module), depth)
        elif isinstance(thing, FunctionType):
            seen.add(id(thing))
            for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
                visit_slot(cell, name, depth - 1)
            for name in thing.__code__.co_names:
                value = thing.__globals__.get(name)
                mine = isinstance(value, FunctionType) and value.__globals__ is thing.__globals__
                if mine or isinstance(value, Tensor | nn.Module | partial):
                    visit_slot(thing.__globals__, name, depth - 1)
            for value in thing.__defaults__ or ():
                visit(value, depth - 1)
        elif isinstance(thing, MethodType):
            visit(thing.__self__, depth, called=True)
            visit(thing.__func__, depth - 1)
        elif isinstance(thing, partial):
            seen.add(id(thing))
            for value in (thing.func, *thing.args, *thing.keywords.values()):
                visit(value, depth - 1)
        elif called and hasattr(thing, "__dict__"):
            seen.add(id(thing))
            visit_attributes(vars(thing), depth)
            visit(vars(type(thing)).get("__call__"), depth - 1)

    def visit_attributes(attributes: dict[str, Any], depth: int) -> None:
        for name, value in attributes.items():
            if isinstance(value, Tensor) or name == "training":
                slots.append(_Slot(attributes, name, value))
            elif isinstance(value, nn.Module):
                visit_slot(attributes, name, depth)
            elif isinstance(value, FunctionType | MethodType | partial):
                visit(value, depth - 1)

    visit(func, _DEPTH, called=True)
    return list(modules.values()), slots
