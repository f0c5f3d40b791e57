"""What the graph of f ends in: its inputs, the parameters, and tensors made before f was called (NOTE 1).

A leaf that is neither input nor parameter would silently get no gradient: it is refused.

NOTE 1. k = p.exp() made once, outside f, and used in it: every evaluation's graph ends in one and the same graph of k.
A product stops at that border, the cotangents there are summed, and `finish` takes the sum through it once, when the
sweep is over. Border and inside are told apart by autograd's count of nodes, which is one of the thread that made them;
those that the forward pass has seen are remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

count_nodes = torch._C._autograd._get_sequence_nr  # how many nodes this thread has made so far


class Border(NamedTuple):
    """Where a product stops.

    edges : of graphs that were made outside f
    direct : the indices of the parameters to ask for beside them; None for all
    retain : whether the product goes through graphs from outside, which others will need too
    """

    edges: tuple[GradientEdge, ...] = ()
    direct: frozenset[int] | None = None
    retain: bool = False


_PLAIN = Border()
_WHOLE = Border(retain=True)


class _Outside(NamedTuple):
    """A node that f did not make: the parameters and the nodes that its graph leads to."""

    parameters: frozenset[int]
    nodes: frozenset[Any]


class Reached:
    """What a gradient reaches.

    Asked for every product with the parameters (for one stage in turn where a step is one product), because func may
    take another branch at another time: a walk over the graph, 10 to 20 us for a small network.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._leaves = {id(p): i for i, p in enumerate(parameters) if p.grad_fn is None}
        self._nodes = {(p.grad_fn, p.output_nr): i for i, p in enumerate(parameters) if p.grad_fn is not None}
        self._outside: dict[Any, _Outside] = {}

    @property
    def has_outside(self) -> bool:
        """Whether f is known to use what was made outside it."""
        return bool(self._outside)

    def require(self, outs: Iterable[Tensor], begin: int, *inputs: Tensor | None) -> Border:
        """Where a product of `outs` is to stop, so that no graph from outside is gone through twice (NOTE 1).

        begin : `count_nodes()` before f was called

        Where that cannot be (f uses a parameter both directly and through such a graph, or one such graph inside
        another), the product goes through them whole. Raises ValueError when the graph ends in a leaf that is no
        parameter, nor one of the inputs.
        """
        stops = set(self._nodes)
        stops.update((x.grad_fn, x.output_nr) for x in inputs if x is not None and x.grad_fn is not None)
        walk = _Walk(self._nodes, self._outside, stops)
        for out in outs:
            if out.grad_fn is not None:
                walk.go(out.grad_fn, out.output_nr, begin)
            elif out.requires_grad:
                walk.leaves.append(out)
        direct = walk.parameters | {i for leaf in walk.leaves if (i := self._check_leaf(leaf, inputs)) is not None}
        for node in walk.found:
            self._outside[node] = self._look_outside(node, stops)
        if not walk.edges:
            return _PLAIN
        beyond = [self._outside[edge.node] for edge in walk.edges]
        nested = any(edge.node in other.nodes for edge in walk.edges for other in beyond)
        if nested or any(direct & other.parameters for other in beyond):
            return _WHOLE
        return Border(tuple(walk.edges), frozenset(direct))

    def _look_outside(self, node: Any, stops: set[tuple[Any, int]]) -> _Outside:
        walk = _Walk(self._nodes, {}, stops)
        walk.go_through(node, 0)
        direct = walk.parameters | {i for leaf in walk.leaves if (i := self._check_leaf(leaf, ())) is not None}
        return _Outside(frozenset(direct), frozenset(walk.seen - {node}))

    def _check_leaf(self, leaf: Tensor, inputs: Sequence[Tensor | None]) -> int | None:
        """The index of a parameter; None for an input. Raises ValueError for another leaf."""
        if any(leaf is x for x in inputs):
            return None
        index = self._leaves.get(id(leaf))
        if index is None:
            raise ValueError(
                f"func uses a tensor of shape {tuple(leaf.shape)} that requires grad but is none of its "
                "parameters, so it would get no gradient: pass params=(...), make func an nn.Module with it, or "
                "detach it"
            )
        return index


class _Walk:
    """A walk over a graph, from a root down to leaves, stops and nodes from outside.

    Attributes
    ----------
    seen, leaves, parameters, edges : nodes gone through; leaves; indices of parameters; edges from outside
    found : of these the nodes that were not known
    """

    def __init__(
        self, parameters: dict[tuple[Any, int], int], outside: dict[Any, _Outside], stops: set[tuple[Any, int]]
    ) -> None:
        self._parameters, self._outside, self._stops = parameters, outside, stops
        self.seen: set[Any] = set()
        self.leaves: list[Tensor] = []
        self.parameters: set[int] = set()
        self.edges: list[GradientEdge] = []
        self.found: list[Any] = []
        self._nodes: list[Any] = []

    def go(self, root: Any, number: int, begin: int) -> None:
        """Walk; nodes made before `begin` are from outside."""
        self._arrive(root, number, begin)
        self._follow(begin)

    def go_through(self, node: Any, begin: int) -> None:
        """Walk from all that a node was made of, also where one of its outputs is a stop."""
        self.seen.add(node)
        self._nodes.append(node)
        self._follow(begin)

    def _follow(self, begin: int) -> None:
        seen = self.seen
        for node in self._nodes:
            parents = node.next_functions
            for parent, nr in parents:
                if parent is not None and parent not in seen:
                    self._arrive(parent, nr, begin)
            if not parents:
                leaf = getattr(node, "variable", None)  # None for a custom Function without differentiable inputs
                if leaf is not None:
                    self.leaves.append(leaf)

    def _arrive(self, node: Any, number: int, begin: int) -> None:
        if (node, number) in self._stops:
            if (node, number) in self._parameters:
                self.parameters.add(self._parameters[node, number])
        elif node in self._outside or (node._sequence_nr() < begin and node.next_functions):
            edge = GradientEdge(node, number)
            if edge not in self.edges:
                self.edges.append(edge)
                if node not in self._outside and node not in self.found:
                    self.found.append(node)
        elif node not in self.seen:
            self.seen.add(node)
            self._nodes.append(node)


def finish(outside: dict[GradientEdge, Tensor], parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The parameters' cotangents through the graphs outside f, from the sums at their borders.

    The graphs stay: they are the caller's, who may use them again.
    """
    edges, bars = tuple(outside), tuple(outside.values())
    return torch.autograd.grad(edges, tuple(parameters), bars, retain_graph=True, allow_unused=True)
