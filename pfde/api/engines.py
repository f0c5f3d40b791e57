"""The engines that there are: importing them makes them known (`solving.engine`)."""

from __future__ import annotations

from ..caputo.engine import CaputoEngine
from ..one_step.engine import OneStepEngine
from ..petsc.engine import PetscEngine

__all__ = ["CaputoEngine", "OneStepEngine", "PetscEngine"]
