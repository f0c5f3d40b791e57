"""What one forward solve leaves for its backward pass, and the two buffers that both share.

    integral form     X = f:        x_rows (N, d) and y_rows (N, d); `pece` with store="stages" also predictor_rows
    derivative form   X = y - y_0:  x_rows (N, d); y_n = y_0 + X_n

Row n - 1 belongs to step n. The adjoint sweep writes r_bar_n over row n once step n is reversed (for `pece` the
predictor's over X_n), so it needs no buffer of its own, and the trajectory is spent by it. A solve without gradient
keeps x_rows alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..gradients import Store
from ..schemes.base import Stage
from ..system.base import Linearisation
from .discretisation import Discretisation


class Trajectory:
    """The record of one forward solve.

    Parameters
    ----------
    discretisation : the scheme on its grid
    y0 : (d,) the initial state
    store : what to keep beside the states for the backward pass; None for a solve without gradient
    """

    def __init__(self, discretisation: Discretisation, y0: Tensor, store: Store | None) -> None:
        self.discretisation, self.y0, self.store = discretisation, y0, store
        scheme, steps = discretisation.scheme, discretisation.grid.steps
        self.slope: Tensor | None = None  # F_0, where the scheme uses it
        self.x_rows = _rows(steps, y0)
        differentiable_integral = store is not None and scheme.form == "integral"
        self.y_rows = _rows(steps, y0) if differentiable_integral else None
        keeps_predictors = store == "stages" and scheme.channels == 2
        self.predictor_rows = _rows(steps, y0) if keeps_predictors else None
        self._kept: dict[int, tuple[Linearisation | None, ...]] = {}
        self.spent = False

    def record_slope(self, stage: Stage) -> None:
        """Keep F_0, a copy: a function may return y itself."""
        assert stage.x is not None
        self.slope = stage.x.clone()
        if self.store == "graph":
            self._kept[0] = stage.kept

    def initial_stage(self) -> Stage:
        """y_0, with the graph of F_0 where it was kept."""
        return Stage(self.y0, kept=self._kept.pop(0, (None, None)))

    def record(self, n: int, stage: Stage) -> None:
        """Keep step n."""
        if stage.x is not None:
            self.x_rows[n - 1].copy_(stage.x)
        if self.y_rows is not None:
            self.y_rows[n - 1].copy_(stage.y)
        if self.predictor_rows is not None:
            assert stage.predictor is not None
            self.predictor_rows[n - 1].copy_(stage.predictor)
        if self.store == "graph":
            self._kept[n] = stage.kept

    def state(self, n: int) -> Tensor:
        """y_n; of the integral form a view of its row."""
        return self.y0 + self.x_rows[n - 1] if self.y_rows is None else self.y_rows[n - 1]

    def stage(self, n: int, predictor: Tensor | None) -> Stage:
        """Step n for its transpose; what was kept of its graphs is handed over."""
        if self.predictor_rows is not None:
            predictor = self.predictor_rows[n - 1]
        return Stage(self.state(n), None, predictor, self._kept.pop(n, (None, None)))

    def cotangent_rows(self) -> list[Tensor]:
        """The buffers, one for each channel, whose row n the adjoint may overwrite once step n is reversed."""
        if self.y_rows is None:
            return [self.x_rows]
        return [self.y_rows, self.x_rows][: self.discretisation.scheme.channels]

    def release(self) -> None:
        """Give up all buffers."""
        self.spent = True
        self._kept.clear()
        self.x_rows = self.y0.new_empty(0)
        self.y_rows = self.predictor_rows = None


def _rows(steps: int, y0: Tensor) -> Tensor:
    """An uninitialised buffer (steps, d) like y0.

    On the CPU through NumPy, which asks the kernel for huge pages: the first write to a fresh row then costs a quarter.
    """
    if y0.device.type != "cpu":
        return y0.new_empty(steps, y0.numel())
    return torch.from_numpy(np.empty((steps, y0.numel()), np.float32 if y0.dtype == torch.float32 else np.float64))
