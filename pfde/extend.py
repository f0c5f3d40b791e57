"""Base classes for methods, histories and schedules of your own; `method=`, `history=` and `schedule=` take instances.

    Tableau, AdditiveTableau    a Runge-Kutta method by its coefficients, which are checked (`method=` of odeint)
    OneStep                     another one-step method, by its step and its transpose (`method=` of odeint)
    ExplicitScheme, ImplicitScheme, Scheme, Weights
                                a Caputo scheme by its convolution weights, or with its own step (`method=` of fdeint)
    Bounded, Compression, IntervalCompression
                                a history by how it compresses a kernel (`history=` of fdeint)
    Schedule, Sizes, Stream     a checkpoint schedule by its actions (`schedule=` of pfde.Discrete)
    PetscMethod, petsc_method   one of PETSc's integrators as an object, for names that type checkers cannot know

Gradients, histories, stores and schedules of pfde's work with all of them: nobody derives an adjoint anew. The examples
examples/own_method.py and docs/extending.md define one of each outside pfde.
"""

from .caputo.history.base import Bounded, Compression, IntervalCompression
from .caputo.schemes.base import ExplicitScheme, ImplicitScheme, Scheme, Weights
from .one_step.methods.base import OneStep
from .one_step.tableaux import AdditiveTableau, Tableau
from .petsc.setting import PetscMethod
from .petsc.setting import parse_method as petsc_method
from .schedules import Schedule, Sizes, Stream

__all__ = [
    "AdditiveTableau",
    "Bounded",
    "Compression",
    "ExplicitScheme",
    "ImplicitScheme",
    "IntervalCompression",
    "OneStep",
    "PetscMethod",
    "Schedule",
    "Scheme",
    "Sizes",
    "Stream",
    "Tableau",
    "Weights",
    "petsc_method",
]
