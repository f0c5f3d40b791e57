"""What defines a solve by one of PETSc's own integrators: the method, the arguments, and the options that it may have.

NOTE. PETSc reads -ts_trajectory_type without the TS's prefix, and its default type writes files of one fixed name.
So the option is there, for `memory`, while a TS is set up; petsc4py has no other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..solving.stats import Stats
from ..system.autocast import NO_AUTOCAST, Autocast
from ..system.layout import StateLayout
from ..system.peers import Peers
from ..system.petsc_options import Entries, database_in_use, permits_adapt_type
from ..system.prefixes import shown
from ..system.start import PETSc


class PetscMethod(NamedTuple):
    """One of PETSc's integrators.

    Attributes
    ----------
    name : as it was given, 'petsc:rk:5dp'
    family : rk, theta, beuler, cn or arkimex
    subtype : of rk and arkimex, else ''
    theta : of theta, else None
    """

    name: str
    family: str
    subtype: str = ""
    theta: float | None = None

    @property
    def implicit(self) -> bool:
        """Whether steps solve equations, so that snes_ and ksp_ options apply."""
        return self.family != "rk"

    @property
    def embedded(self) -> bool:
        """Whether there is an embedded pair, so that a controller can choose the step sizes."""
        return self.family in _TYPES and self.subtype not in _NOT_EMBEDDED[self.family]

    @property
    def on_grid(self) -> bool:
        """Whether, without a step_size, one step goes from each time to the next."""
        return self.family not in _TYPES


def _types(names: type) -> tuple[str, ...]:
    return tuple(v for k, v in vars(names).items() if isinstance(v, str) and not k.startswith("_"))


_TYPES = {"rk": _types(PETSc.TS.RKType), "arkimex": _types(PETSc.TS.ARKIMEXType)}
_NOT_EMBEDDED = {"rk": ("1fe", "2b", "3", "4"), "arkimex": ("prssp2", "ars443", "bpr3")}
_FORMS = "petsc:rk:TYPE, petsc:theta:VALUE, petsc:beuler, petsc:cn, petsc:arkimex:TYPE"


def parse_method(method: str) -> PetscMethod:
    """The integrator that a method string names.

    The strings are 'petsc:rk:5dp' and the other types of TSRK; 'petsc:theta:0.5', the one-stage theta method with theta
    in (0, 1] (0.5: the implicit midpoint rule); 'petsc:beuler'; 'petsc:cn', the two-stage trapezoidal rule;
    'petsc:arkimex:3' and the other types of TSARKIMEX. Raises ValueError: PETSc itself would run its default for some
    unknown names.
    """
    prefix, _, rest = method.partition(":")
    family, colon, subtype = rest.partition(":")
    if prefix != "petsc" or family not in ("rk", "theta", "beuler", "cn", "arkimex"):
        raise ValueError(f"method must be one of {_FORMS}: got {method!r}; no other type of PETSc's has its adjoint")
    if family in _TYPES:
        if subtype not in _TYPES[family]:
            raise ValueError(
                f"method petsc:{family}:TYPE must have one of the types {', '.join(_TYPES[family])}: got {method!r}; "
                f"say for example 'petsc:{family}:{'5dp' if family == 'rk' else '3'}'"
            )
        return PetscMethod(method, family, subtype)
    if family == "theta":
        return PetscMethod(method, family, theta=_parse_theta(subtype, method))
    if colon:
        raise ValueError(f"method petsc:{family} has no types: got {method!r}; say 'petsc:{family}'")
    return PetscMethod(method, family)


def _parse_theta(value: str, method: str) -> float:
    try:
        theta = float(value)
    except ValueError:
        theta = math.nan
    if not 0 < theta <= 1:
        raise ValueError(
            f"method petsc:theta:VALUE must have a number in (0, 1]: got {method!r}; "
            "say 'petsc:theta:0.5', or 'petsc:rk:1fe' for the explicit Euler method"
        )
    return theta


@dataclass(frozen=True, eq=False, kw_only=True)
class Setting:
    """A solve but for the values of y_0 and the parameters; immutable, so that it can be done again.

    Parameters
    ----------
    method : of `parse_method`
    func : f(t, y); for arkimex it may have the attributes `stiff` and `nonstiff`, callables of which it is the sum:
        the first is treated implicitly, the second explicitly. Without them all of f is implicit.
    layout : of the state
    times : increasing or decreasing, from t_0
    parameters : tensors that func uses and that require a gradient
    step_size : positive; each interval is divided into steps of this size. None: with rk and arkimex an adaptive
        controller chooses the steps and hits each time; with theta, beuler and cn the times are the grid
    rtol, atol : of the adaptive controller
    options_prefix : of the TS, its SNES and KSP
    peers : the ranks that share the state
    stats : is added to
    dtype, device : of the state
    autocast : torch.autocast as func is to see it

    Raises ValueError for arguments and options that do not go together.
    """

    method: PetscMethod
    func: Callable[[Tensor, Any], Any]
    layout: StateLayout
    times: tuple[float, ...]
    parameters: tuple[Tensor, ...]
    step_size: float | None
    rtol: float
    atol: float
    options_prefix: str
    peers: Peers
    stats: Stats
    dtype: torch.dtype
    device: torch.device
    autocast: Autocast = NO_AUTOCAST

    def __post_init__(self) -> None:
        """Raise ValueError unless the arguments and the options go together."""
        if self.step_size is None and not (self.method.embedded or self.method.on_grid):
            family = self.method.family
            raise ValueError(
                f"method {self.method.name!r} has no embedded pair to adapt its steps with: pass step_size, or use "
                f"'petsc:{family}:{'5dp' if family == 'rk' else '3'}'"
            )
        with database_in_use:
            _refuse_options(self.options_prefix, fixed=self.fixed)

    @property
    def fixed(self) -> bool:
        """Whether the step sizes are given."""
        return self.step_size is not None or self.method.on_grid

    @property
    def sign(self) -> float:
        """1 for increasing times, -1 for decreasing ones."""
        return 1.0 if self.times[-1] > self.times[0] else -1.0

    @cached_property
    def s(self) -> tuple[float, ...]:
        """The times that increase, sign * t."""
        return tuple(self.sign * t for t in self.times)


_DECIDED = (  # by the arguments, or by how the adjoint is run
    *("ts_type", "ts_dt", "ts_time_step", "ts_init_time", "ts_max_time", "ts_final_time", "ts_max_steps"),
    *("ts_run_steps", "ts_exact_final_time", "ts_fd_color", "ts_convergence_estimate"),
    *("ts_time_span", "ts_eval_times", "ts_adjoint_solve", "ts_rk_type", "ts_rk_multirate"),
    *("ts_theta_theta", "ts_theta_endpoint", "ts_arkimex_type", "ts_arkimex_fully_implicit"),
)
_TRAJECTORY = ("ts_trajectory_type", "ts_trajectory_monitor", "ts_trajectory_view")


def _refuse_options(prefix: str, *, fixed: bool) -> None:
    """Raise ValueError for options that the arguments decide, or that the adjoint is not made for."""
    options = PETSc.Options(prefix)
    permitted = permits_adapt_type(prefix, adaptive=not fixed)
    for name in (*_DECIDED, "ts_adapt_type") if fixed and not permitted else _DECIDED:
        if options.hasName(name):
            raise ValueError(
                f"PETSc option -{shown(prefix)}{name} does not apply here: t, step_size and method say it; if it "
                "belongs to another TS of the program, give this solve an options_prefix"
            )
    for name, value in PETSc.Options().getAll().items():
        known = name in _TRAJECTORY and (name != "ts_trajectory_type" or value == "memory")
        if name.startswith("ts_trajectory_") and not known:
            raise ValueError(
                f"PETSc option -{name} {value} does not apply here: the trajectory of a petsc: method is in memory, "
                "whole; PETSc reads this option without a prefix, so clear it for this solve"
            )


def snapshot_options(prefix: str) -> dict[str, str]:
    """The options of this prefix, without it, for a solve that is done again when the database may have changed."""
    kinds = tuple(prefix + kind for kind in ("ts_", "snes_", "ksp_", "pc_", "adjoint_"))
    with database_in_use:
        everything = PETSc.Options().getAll()
    return {name[len(prefix) :]: value for name, value in everything.items() if name.startswith(kinds)}


@contextmanager
def own_options(setting: Setting, prefix: str, again: Mapping[str, str] | None) -> Iterator[None]:
    """The options that a TS of this prefix is to be set up with, in the database; then what was there (NOTE).

    again : those of the solve that is repeated, without what it showed; None if none is
    """
    wanted = {"ts_trajectory_type": "memory"}
    if setting.fixed:
        wanted[f"{prefix}ts_adapt_type"] = "none"
    if again is not None:
        shows = ("monitor", "view", "converged_reason")
        wanted |= {prefix + n: v for n, v in again.items() if not any(word in n for word in shows)}
        wanted["ts_trajectory_type"] = "memory"
    with database_in_use:
        everything = PETSc.Options().getAll()
        entries = Entries({n: v for n, v in wanted.items() if everything.get(n) != v})  # the user's own is used
        try:
            yield
        finally:
            entries.remove()
