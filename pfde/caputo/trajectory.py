"""What a forward solve leaves for its backward pass.

With all rows of the history kept (the exact one), two buffers that both passes share:

    integral form     X = f:        x_rows (N, d) and y_rows (N, d)
    derivative form   X = y - y_0:  x_rows (N, d); y_n = y_0 + X_n

Row n - 1 belongs to step n. The adjoint sweep writes r_bar_n over row n once step n is reversed (for `pece` the
predictor's over X_n), so it needs no buffer of its own, and the trajectory is spent by it. A solve without gradient
keeps x_rows alone.

A bounded history keeps its rows itself, and the trajectory is a *leaf*: the states y_n of a stretch of steps, which is
what the adjoint of these steps needs; `open` names the stretch, all steps or those between two checkpoints.
Predictors (`pece`) and graphs of f are kept for the steps of the leaf, in either case.
"""

from __future__ import annotations

from torch import Tensor

from ..solving.gradients import Keep
from ..system.base import Linearisation
from ..system.rows import empty_rows
from .discretisation import Discretisation
from .schemes.base import Stage


class Trajectory:
    """The record of one forward solve.

    Parameters
    ----------
    discretisation : the scheme on its grid
    y0 : (d,) the initial state
    keep : what to keep beside the states for the backward pass; None for a solve without gradient
    """

    def __init__(self, discretisation: Discretisation, y0: Tensor, keep: Keep | None) -> None:
        self.discretisation, self.y0, self.keep = discretisation, y0, keep
        scheme, steps, operator = discretisation.scheme, discretisation.grid.steps, discretisation.operator
        self.whole = not operator.bounded
        self.slope: Tensor | None = None  # F_0, where the scheme uses it
        self.x_rows = empty_rows((steps, y0.numel()), y0) if self.whole else y0.new_empty(0)
        differentiable_integral = keep is not None and scheme.form == "integral"
        self.y_rows = empty_rows((steps, y0.numel()), y0) if self.whole and differentiable_integral else None
        self._rereads = operator.rereads
        self._keeps_predictors = scheme.channels == 2 and keep is not None and (keep != "state" or not self._rereads)
        self._leaf: tuple[int, int] = (0, 0)
        self._predicted: tuple[int, int] = (0, 0)  # the steps whose predictors are kept
        self._states: Tensor | None = None
        self._predictors: Tensor | None = None
        self._kept: dict[int, tuple[Linearisation | None, ...]] = {}
        self._spent = False

    @property
    def spent(self) -> bool:
        """Whether the rows are overwritten, or given up."""
        return self._spent

    def spend(self) -> None:
        """The adjoint sweep is about to overwrite the rows."""
        self._spent = True

    @property
    def graphs(self) -> bool:
        """Whether a step of the leaf has the graph of f beside its row."""
        return self.keep == "graph"

    @property
    def row_bytes(self) -> int:
        """Bytes that a step of the leaf takes, without graphs."""
        rows = (not self.whole) + self._keeps_predictors
        return rows * self.y0.numel() * self.y0.element_size()

    def open(self, first: int, last: int) -> None:
        """Keep from now on what the adjoint of the steps first+1..last needs, and nothing of others."""
        if self.keep is None:
            return
        self._leaf = first, last
        self._kept = {n: kept for n, kept in self._kept.items() if n == 0 or first < n <= last}
        if not self.whole:
            self._states = self._room(self._states, last - first)
        if self._keeps_predictors:
            if self.whole and not self._rereads:  # nothing could give them again
                first, last = 0, self.discretisation.grid.steps
            self._predicted = first, last
            self._predictors = self._room(self._predictors, last - first)

    def _room(self, rows: Tensor | None, steps: int) -> Tensor:
        return rows if rows is not None and len(rows) >= steps else empty_rows((steps, self.y0.numel()), self.y0)

    def leaf(self) -> dict[str, Tensor]:
        """The rows of the leaf, as `load` takes them."""
        steps = self._leaf[1] - self._leaf[0]
        parts = {"states": self._states, "predictors": None if self.whole else self._predictors}
        return {name: rows[:steps] for name, rows in parts.items() if rows is not None}

    def load(self, first: int, last: int, rows: dict[str, Tensor]) -> None:
        """Open this leaf, with rows kept elsewhere."""
        self.open(first, last)
        for name, target in self.leaf().items():
            target.copy_(rows[name])

    def record_slope(self, stage: Stage) -> None:
        """Keep F_0, a copy: a function may return y itself."""
        assert stage.x is not None
        self.slope = stage.x.clone()
        if self.keep == "graph":
            self._kept[0] = stage.kept

    def initial_stage(self) -> Stage:
        """y_0, with the graph of F_0 where it was kept."""
        return Stage(self.y0, kept=self._kept.pop(0, (None, None)))

    def keeps(self, n: int) -> bool:
        """Whether step n is in the leaf."""
        return self._leaf[0] < n <= self._leaf[1]

    def has_predictor(self, n: int) -> bool:
        """Whether the predictor of step n is kept."""
        return self._predicted[0] < n <= self._predicted[1]

    def record(self, n: int, stage: Stage) -> None:
        """Keep step n (its X is the history's)."""
        if self.y_rows is not None:
            self.y_rows[n - 1].copy_(stage.y)
        if self._predictors is not None and self.has_predictor(n):
            assert stage.predictor is not None
            self._predictors[n - 1 - self._predicted[0]].copy_(stage.predictor)
        if not self.keeps(n):
            return
        if self._states is not None:
            self._states[n - 1 - self._leaf[0]].copy_(stage.y)
        if self.keep == "graph":
            self._kept[n] = stage.kept

    @property
    def exact(self) -> bool:
        """Whether `state` gives y_n to the bit; y_0 + (y_n - y_0) rounds."""
        return self._states is not None or self.y_rows is not None

    def state(self, n: int) -> Tensor:
        """y_n; a view of its row where there is one."""
        if self._states is not None:
            return self._states[n - 1 - self._leaf[0]]
        return self.y0 + self.x_rows[n - 1] if self.y_rows is None else self.y_rows[n - 1]

    def stage(self, n: int, predictor: Tensor | None) -> Stage:
        """Step n for its transpose; what was kept of its graphs is handed over."""
        if self._predictors is not None and self.has_predictor(n):
            predictor = self._predictors[n - 1 - self._predicted[0]]
        return Stage(self.state(n), None, predictor, self._kept.pop(n, (None, None)))

    def cotangent_rows(self) -> list[Tensor]:
        """The buffers, one for each channel, whose row n the adjoint may overwrite once step n is reversed."""
        if not self.whole:
            return []
        if self.y_rows is None:
            return [self.x_rows]
        return [self.y_rows, self.x_rows][: self.discretisation.scheme.channels]

    def release(self) -> None:
        """Give up all buffers."""
        self._spent = True
        self._kept.clear()
        self.x_rows = self.y0.new_empty(0)
        self.y_rows = self._states = self._predictors = None
