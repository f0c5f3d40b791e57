"""Which leaves the graph of f ends in: a tensor that no gradient reaches would silently get none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Reached:
    """What a gradient reaches: the parameters; a leaf that it does not reach would silently get none.

    Asked for every product with the parameters (for one stage in turn where a step is one product), because func may
    take another branch at another time: a walk over the graph, 10 to 20 us for a small network.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._ids = frozenset(map(id, parameters))
        self._nodes = frozenset(p.grad_fn for p in parameters if p.grad_fn is not None)

    def require(self, out: Tensor, *inputs: Tensor | None) -> None:
        """Raise ValueError when the graph of `out` ends in a leaf that is no parameter, nor one of the inputs."""
        leaves = self.unreached(out, *inputs)
        if leaves:
            raise ValueError(
                f"func uses a tensor of shape {tuple(leaves[0].shape)} that requires grad but is none of its "
                "parameters, so it would get no gradient: pass params=(...), make func an nn.Module with it, or "
                "detach it"
            )

    def unreached(self, out: Tensor, *inputs: Tensor | None) -> list[Tensor]:
        """These leaves; the walk stops at the nodes of inputs and parameters that are no leaves."""
        seen, leaves = set(self._nodes), []
        seen.update(x.grad_fn for x in inputs if x is not None and x.grad_fn is not None)
        nodes = [] if out.grad_fn is None or out.grad_fn in seen else [out.grad_fn]
        for node in nodes:
            parents = node.next_functions
            for parent, _ in parents:
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    nodes.append(parent)
            if not parents:
                leaf = getattr(node, "variable", None)  # None for a custom Function without differentiable inputs
                if leaf is not None and id(leaf) not in self._ids and all(leaf is not x for x in inputs):
                    leaves.append(leaf)
        return leaves
