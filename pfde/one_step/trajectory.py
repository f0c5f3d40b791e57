"""What a forward solve of a one-step method leaves for its backward pass: a leaf of states, and what comes on top.

Of the steps first+1..last the states y_first, ..., y_last are kept; with store="stages" an implicit method's stages
too, with "graph" the linearisations of all slopes. "state" has the stages computed again with their graphs, all of one
step alive at a time; `Symplectic` computes them without, and then one graph at a time.

NOTE 1. All rows of a buffer share one version counter, by which autograd knows that a saved tensor was overwritten: a
graph that is kept must not hang on a row while other rows are being written.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..solving.gradients import Keep
from ..system.base import OneStepSystem
from ..system.rows import empty_rows
from .methods.base import Interval, OneStep, Sources, Step
from .times import StepTimes

_CHUNK = 2**22  # bytes of the buffers in which rows of unknown number are kept


class RowStore:
    """Rows of one shape, in chunks that are made when needed and do not move."""

    def __init__(self, shape: tuple[int, ...], like: Tensor, count: int | None) -> None:
        self._shape, self._like = shape, like
        size = int(np.prod(shape)) * like.element_size()
        self._length = max(1, _CHUNK // size) if count is None else max(1, count)
        self._chunks: list[Tensor] = []

    def row(self, i: int) -> Tensor:
        """Row i, a view."""
        chunk, offset = divmod(i, self._length)
        while len(self._chunks) <= chunk:
            self._chunks.append(empty_rows((self._length, *self._shape), self._like))
        return self._chunks[chunk][offset]

    def all(self, count: int) -> Tensor:
        """The first rows as one tensor; of a known number only, a view."""
        self.row(0)
        return self._chunks[0][:count]

    @property
    def length(self) -> int:
        """Rows of a chunk."""
        return self._length


class Trajectory:
    """The record of one forward solve.

    Parameters
    ----------
    scheme : the method
    times : of its steps; this trajectory's own
    y0 : (d,) the initial state
    keep : what to keep for the backward pass; None for a solve without gradient
    """

    whole = False  # a snapshot is a state, and no index into rows that are there anyway

    def __init__(self, scheme: OneStep, times: StepTimes, y0: Tensor, keep: Keep | None) -> None:
        self.scheme, self.times, self.y0, self.keep = scheme, times, y0, keep
        extra = keep == "stages" and not scheme.determined
        self._stage_count = scheme.kept_stages if extra else 0
        self._leaf = (0, 0)
        self._states: RowStore | None = None
        self._stages: RowStore | None = None
        self._kept: dict[int, Step] = {}
        self._start = y0  # of the leaf, where its steps are kept with their graphs
        self._spent = False

    @property
    def spent(self) -> bool:
        """Whether the rows are given up, or about to be."""
        return self._spent

    def spend(self) -> None:
        """The adjoint sweep begins."""
        self._spent = True

    @property
    def graphs(self) -> bool:
        """Whether a step of the leaf has the graphs of its slopes beside its row."""
        return self.keep == "graph"

    @property
    def row_bytes(self) -> int:
        """Bytes that a step of the leaf takes, without graphs."""
        return (1 + self._stage_count) * self.y0.numel() * self.y0.element_size()

    def open(self, first: int, last: int) -> None:
        """Keep from now on what the adjoint of the steps first+1..last needs, and nothing of others."""
        if self.keep is None:
            return
        self._leaf, self._kept = (first, last), {}
        count = last - first if self.times.ended or last < self.times.steps else None
        self._states = self._room(self._states, (self.y0.numel(),), None if count is None else count + 1)
        if self._stage_count:
            self._stages = self._room(self._stages, (self._stage_count, self.y0.numel()), count)

    def _room(self, rows: RowStore | None, shape: tuple[int, ...], count: int | None) -> RowStore:
        if rows is not None and (count is None or rows.length >= count):
            return rows
        return RowStore(shape, self.y0, count)

    def leaf(self) -> dict[str, Tensor]:
        """The rows of the leaf, as `load` takes them."""
        first, last = self._leaf
        assert self._states is not None
        states = self._states.all(last - first + 1)
        if self._kept:
            torch.stack([self._start, *(self._kept[n].y for n in range(first + 1, last + 1))], out=states)
        parts = {"states": states}
        if self._stages is not None:
            parts["stages"] = self._stages.all(last - first)
        return parts

    def load(self, first: int, last: int, rows: dict[str, Tensor]) -> None:
        """Open this leaf, with rows kept elsewhere."""
        self.open(first, last)
        for name, target in self.leaf().items():
            target.copy_(rows[name])

    def keeps(self, n: int) -> bool:
        """Whether step n is in the leaf."""
        return self._leaf[0] < n <= self._leaf[1]

    def begin(self, n: int, y: Tensor) -> Tensor:
        """y as the state before step n, which is about to be taken: its row where it is kept, else itself."""
        if not self.keeps(n) or self._states is None:
            return y
        if self.keep == "graph":  # NOTE 1
            self._start = y if n == 1 + self._leaf[0] else self._start
            return y
        row = self._states.row(n - 1 - self._leaf[0])
        if row.data_ptr() != y.data_ptr():
            row.copy_(y)
        return row

    def memory(self, n: int) -> tuple[Tensor | None, Tensor | None]:
        """Where step n's stages and its end are to be written; None where they are not kept."""
        if not self.keeps(n) or self._states is None or self.keep == "graph":
            return None, None
        k = n - 1 - self._leaf[0]
        return None if self._stages is None else self._stages.row(k), self._states.row(k + 1)

    def record(self, n: int, step: Step, *, dense: bool) -> None:
        """Keep what is on top of the states of an accepted step; slopes only for outputs on its dense output."""
        if (step.kept or step.graph is not None) and self.keeps(n):
            graph = step.graph if dense or step.graph is None else step.graph._replace(slopes=[])
            self._kept[n] = Step(step.y, [], [], step.kept, graph)

    def sources(self, system: OneStepSystem, at: Interval, *, dense: bool, remember: bool) -> Sources:
        """The linearisations of step n for its transpose; kept ones are handed over.

        remember : whether they keep the slopes that are taken
        """
        assert self._states is not None
        if (step := self._kept.pop(at.n, None)) is not None:
            # what is not kept of a step taken again, without its outputs, is the slope at the end
            nodes = self.scheme.nodes
            states = [step.y] * len(nodes)
            return Sources(system.parts, at, nodes, states, step.kept, step.graph, remember=remember)
        k = at.n - 1 - self._leaf[0]
        y, y1 = self._states.row(k), self._states.row(k + 1)
        rows = None if self._stages is None else self._stages.row(k)
        graphs = self.keep != "symplectic"
        return self.scheme.stages(system, at, y, y1, dense=dense, graphs=graphs, rows=rows, remember=remember)

    def start(self, n: int) -> Tensor:
        """The state before step n, which is kept."""
        assert self._states is not None
        return self._states.row(n - 1 - self._leaf[0])

    def release(self) -> None:
        """Give up all buffers."""
        self._spent = True
        self._kept.clear()
        self._states = self._stages = None
