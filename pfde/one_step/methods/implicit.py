"""What diagonally implicit and additive methods share: the stages of an implicit tableau."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...system.base import Linearisation, OneStepping, OneStepSystem
from ..tableaux import Tableau
from .base import Interval, OneStep, Sources, Step
from .sums_of_slopes import nonzero, polynomial


class ImplicitMethod(OneStep):
    """What both families share: the stages of the implicit tableau, one after the other."""

    implicit = True

    def __init__(self, name: str, tableau: Tableau, slopes: int) -> None:
        self.name, self.tableau = name, tableau
        self.order, self.embedded_order = tableau.order, tableau.embedded_order
        self.dense_order, self.stability, self.source = tableau.dense_order, tableau.stability, tableau.source
        s = tableau.stages
        self._slopes = slopes  # of a step: s, for an additive method 2 s
        self.nodes = (*tableau.nodes, 1.0) if tableau.extra_slope else tableau.nodes
        self._a = [nonzero(row[:i]) for i, row in enumerate(tableau.a)]
        self._diagonal = [row[i] for i, row in enumerate(tableau.a)]
        self._columns = [[(j, tableau.a[j][i]) for j in range(i + 1, s) if tableau.a[j][i]] for i in range(s)]
        self._dense = tableau.dense

    @property
    def evaluations(self) -> int:
        return self.tableau.stages

    @property
    def kept_stages(self) -> int:
        return self.tableau.stages - (self._diagonal[0] == 0.0)

    def complete(
        self, system: OneStepping, at: Interval, step: Step, *, dense: bool, keep: OneStepSystem | None = None
    ) -> Step:
        if dense and self.tableau.extra_slope and len(step.slopes) == self.tableau.stages:
            f = None if keep is None else keep.linearise(at.n, at.t1, step.y)
            add_stage(step, step.y, system.evaluate(at.n, at.t1, step.y) if f is None else f.value, f)
        return step  # else a stage serves the step, the error estimate and the dense output alike

    def stages(
        self,
        system: OneStepSystem,
        at: Interval,
        y: Tensor,
        y1: Tensor,
        *,
        dense: bool,
        graphs: bool,
        rows: Tensor | None,
        remember: bool = False,
    ) -> Sources:
        kept: list[Linearisation] = []
        if rows is not None:
            states = [y, *rows.unbind(0)][-self.tableau.stages :]
        elif (between := self._between(y, y1)) is not None:
            states = between
        else:
            step = self._again(system, at, y, y1, keep=system if graphs else None)
            states, kept = step.states, step.kept
        return Sources(system.parts, at, self.nodes, [*states[: self.tableau.stages], y1], kept, remember=remember)

    def marked(self, step: Step) -> Sequence[Tensor]:
        return step.slopes[: self._slopes]

    def marked_again(self, at: Interval, sources: Sources) -> Sequence[Tensor]:
        found = [sources.values.get(i) for i in range(self._slopes)]
        return [k for k in found if k is not None] if None not in found else []

    def _between(self, y: Tensor, y1: Tensor) -> list[Tensor] | None:
        """The stages of a determined method; None of another."""
        return None

    def _again(self, system: OneStepSystem, at: Interval, y: Tensor, y1: Tensor, *, keep: OneStepSystem | None) -> Step:
        """The stages of another, computed again."""
        return self.step(system, at, y, keep=keep)

    def dense_weights(self, theta: float, derivative: int = 0) -> list[tuple[int, float]]:
        weights = nonzero([polynomial(p, theta, derivative) for p in self._dense])
        return [(i + part, w) for part in range(0, self._slopes, self.tableau.stages) for i, w in weights]


def add_stage(step: Step, state: Tensor, slope: Tensor, f: Linearisation | None) -> None:
    """Add a stage, its slope and, where it is kept, the linearisation to a step."""
    step.states.append(state)
    step.slopes.append(slope)
    if f is not None:
        step.kept.append(f)
