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

NOTE 2. Whether func has written to a buffer cannot be asked: torch's batch normalisation does not count its writes.
Where it has not, nothing is written back either, since that would count as a change of what other graphs have kept.
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

_DEPTH = 4  # of functions that call functions
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
        found = _Search(func)
        modules, self._slots = found.modules, found.slots
        self._buffers: list[Tensor] = []
        leaves = {id(p): p for p in parameters if p.is_leaf}
        for module in modules:
            for table in (module._parameters, module._buffers, module._modules):
                self._slots.extend(_Slot(table, name, x) for name, x in table.items())
            leaves.update((id(p), p) for p in module._parameters.values() if p is not None and p.is_leaf)
            self._buffers.extend(x for x in module._buffers.values() if x is not None and x.layout == torch.strided)
        self._leaves = [_Leaf(p, p.detach(), p.requires_grad) for p in leaves.values()]

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
                undo.callback(_restore, x, x.detach().clone())
            yield


def _differs(leaf: _Leaf) -> bool:
    x = leaf.tensor
    return x.requires_grad != leaf.requires_grad or x.data_ptr() != leaf.alias.data_ptr() or x.shape != leaf.alias.shape


def _set_leaf(x: Tensor, data: Tensor, requires_grad: bool) -> None:
    x.data = data
    x.requires_grad_(requires_grad)


def _restore(x: Tensor, before: Tensor) -> None:
    """Undo what func has written, where it has (NOTE 2)."""
    if not torch.equal(x, before):
        x.data.copy_(before)


class _Search:
    """The modules that func is or reaches, and the slots of other values that it reaches.

    A class and no nested functions: these would know each other, a cycle that holds func until the next collection.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        self.modules: list[nn.Module] = []
        self.slots: list[_Slot] = []
        self._seen: set[int] = set()
        self._visit(func, _DEPTH, called=True)

    def _slot(self, owner: dict[str, Any] | CellType, key: str, depth: int) -> None:
        value = _Slot(owner, key, None).now()
        if isinstance(value, Tensor | nn.Module):
            self.slots.append(_Slot(owner, key, value))
        self._visit(value, depth)

    def _visit(self, thing: Any, depth: int, *, called: bool = False) -> None:
        if depth < 0 or id(thing) in self._seen:
            return
        if isinstance(thing, nn.Module):
            for module in thing.modules():
                if id(module) not in self._seen:
                    self._seen.add(id(module))
                    self.modules.append(module)
                    self._attributes(vars(module), depth)
        elif isinstance(thing, FunctionType):
            self._seen.add(id(thing))
            self._function(thing, depth - 1)
        elif isinstance(thing, MethodType):
            self._visit(thing.__self__, depth, called=True)
            self._visit(thing.__func__, depth - 1)
        elif isinstance(thing, partial):
            self._seen.add(id(thing))
            for value in (thing.func, *thing.args, *thing.keywords.values()):
                self._visit(value, depth - 1)
        elif called and hasattr(thing, "__dict__"):
            self._seen.add(id(thing))
            self._attributes(vars(thing), depth)
            self._visit(vars(type(thing)).get("__call__"), depth - 1)

    def _function(self, function: FunctionType, depth: int) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._slot(cell, name, depth)
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            mine = isinstance(value, FunctionType) and value.__globals__ is function.__globals__
            if mine or isinstance(value, Tensor | nn.Module | partial):
                self._slot(function.__globals__, name, depth)
        for value in function.__defaults__ or ():
            self._visit(value, depth)

    def _attributes(self, attributes: dict[str, Any], depth: int) -> None:
        for name, value in attributes.items():
            if isinstance(value, Tensor) or name == "training":
                self.slots.append(_Slot(attributes, name, value))
            elif isinstance(value, nn.Module):
                self._slot(attributes, name, depth)
            elif isinstance(value, FunctionType | MethodType | partial):
                self._visit(value, depth)
