"""PETSc's own integrators as methods of the torch door, differentiated by PETSc's own adjoint (TSAdjoint).

    y' = f(t, y, theta),  y(t_0) = y_0        TSSolve:    y_{n+1} = Phi_n(y_n, theta)
    lambda_n = (dPhi_n/dy)^T lambda_{n+1},    TSAdjoint:  mu_n = mu_{n+1} + (dPhi_n/dtheta)^T lambda_{n+1}

Phi_n is a step of TSRK, TSTHETA, TSBEULER, TSCN or TSARKIMEX; lambda_N = dL/dy_N, and at every output y_bar is added to
lambda. The step sizes are data of the adjoint, also where a controller chose them. H. Zhang, E. M. Constantinescu,
B. F. Smith, PETSc TSAdjoint, SIAM J. Sci. Comput. 44 (2022), doi:10.1137/21M140078X. The explicit types are given f
and J = df/dy as RHSFunction and RHSJacobian, the implicit ones F = y' - f as IFunction, with sigma I - J; TSARKIMEX may
have both, for f = stiff + nonstiff. P = df/dtheta enters as RHSJacobianP and, with its sign, as IJacobianP.
For decreasing times s = -t is integrated, with -f(-s, y).

NOTE 1. No callback knows of another. Each makes the linearisation at the (t, u) that it is given and leaves it in the
Mat that it is given; a product uses what is in that Mat and the vector that it is given, nothing else. A vector kept
from one product for the next, to save a reverse pass, is another step's as soon as PETSc calls in another order.

NOTE 2. A TSTrajectory in memory does not store the step with which a TSSolve ends: the adjoint expects to start there.
Continuing a TS by a second TSSolve therefore loses a step. So one TSSolve does all segments: PreStep sets each step
size, PostStep takes the outputs. A segment's share of the steps is given to TSAdjointSetSteps.

NOTE 3. PETSc reads -ts_trajectory_type without the TS's prefix, and its default type writes files of one fixed name.
So the option is there, for `memory`, while a TS is set up; petsc4py has no other way.

NOTE 4. TSARKIMEX without a RHSFunction wants the diagonal of F's Jacobian and, of a method with explicit first stage,
the slope of the step before. With a RHSFunction of zero it evaluates f there, which is the same and needs neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from petsc4py import PETSc
from torch import Tensor

from .errors import ConvergenceError, NonFiniteError, PfdeError
from .system.base import Failure
from .system.peers import Peers
from .system.torch_function import Reached, StateLayout
from .system.vectors import load, read, state_vec, write


class NativeMethod(NamedTuple):
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


def parse_native(method: str) -> NativeMethod:
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
        return NativeMethod(method, family, subtype)
    if family == "theta":
        return NativeMethod(method, family, theta=_parse_theta(subtype, method))
    if colon:
        raise ValueError(f"method petsc:{family} has no types: got {method!r}; say 'petsc:{family}'")
    return NativeMethod(method, family)


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


class Stats(Protocol):
    """What a solve counts."""

    steps: int
    rejected: int
    nfe_forward: int
    nfe_recompute: int
    nfe_backward: int
    newton_iterations: int
    linear_iterations: int


class _Problem(NamedTuple):
    """All that defines a solve but y_0; immutable, so that it can be done again."""

    method: NativeMethod
    func: Any
    layout: StateLayout
    s: tuple[float, ...]  # the times that increase, sign * t
    sign: float
    parameters: tuple[Tensor, ...]
    step_size: float | None
    rtol: float
    atol: float
    prefix: str
    options: Mapping[str, str]
    peers: Peers
    stats: Stats
    dtype: torch.dtype
    device: torch.device


def native_solve(
    method: NativeMethod,
    func: Callable[[Tensor, Any], Any],
    layout: StateLayout,
    y0: Tensor,
    times: Sequence[float],
    parameters: tuple[Tensor, ...],
    *,
    step_size: float | None,
    rtol: float,
    atol: float,
    options_prefix: str,
    peers: Peers,
    stats: Stats,
) -> Tensor:
    """y at the times, (T, d), on the graph of y0 and the parameters. Collective.

    Parameters
    ----------
    method : of `parse_native`
    func : f(t, y); for arkimex it may have the attributes `stiff` and `nonstiff`, callables of which it is the sum:
        the first is treated implicitly, the second explicitly. Without them all of f is implicit.
    layout : of the state
    y0 : (d,)
    times : increasing or decreasing, from t_0
    parameters : tensors that func uses
    step_size : positive; each interval is divided into steps of this size. None: with rk and arkimex an adaptive
        controller chooses the steps and hits each time; with theta, beuler and cn the times are the grid
    rtol, atol : of the adaptive controller
    options_prefix : of the TS, its SNES and KSP
    peers : the ranks that share the state
    stats : is added to

    The gradient is that of the discrete scheme at the steps it took, to rounding and to the tolerances of the stages.
    The state is stored at all stages, s (N + 1) d doubles for s stages and N steps. After a backward pass a second one
    (retain_graph=True) computes the trajectory again. Double backward raises RuntimeError.

    Raises ValueError for arguments and options that do not go together, `pfde.NonFiniteError`,
    `pfde.ConvergenceError`, `pfde.PfdeError` for other failures of PETSc's, and what func raises.
    """
    sign = 1.0 if times[-1] > times[0] else -1.0
    if step_size is None and not (method.embedded or method.on_grid):
        raise ValueError(
            f"method {method.name!r} has no embedded pair to adapt its steps with: pass step_size, or use "
            f"'petsc:{method.family}:{'5dp' if method.family == 'rk' else '3'}'"
        )
    _refuse_options(options_prefix, fixed=step_size is not None or method.on_grid)
    problem = _Problem(
        method,
        func,
        layout,
        tuple(sign * t for t in times),
        sign,
        tuple(p for p in parameters if p.requires_grad),
        step_size,
        rtol,
        atol,
        options_prefix,
        _snapshot_options(options_prefix),
        peers,
        stats,
        y0.dtype,
        y0.device,
    )
    if torch.is_grad_enabled() and peers.largest(int(y0.requires_grad or bool(problem.parameters))):
        return _NativeSolve.apply(problem, y0, *problem.parameters)
    with torch.no_grad():
        run = _Run(problem, adjoint=False)
        try:
            return run.forward(y0)
        finally:
            run.close()


class _NativeSolve(torch.autograd.Function):
    """y at the times, (T, d), as a differentiable function of (y0, *parameters)."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, y0: Tensor, *parameters: Tensor) -> Tensor:
        """Solve, and keep the TS for the backward pass."""
        kind = y0.device.type
        ctx.autocast = torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        )
        ctx.problem, ctx.run = problem, _Run(problem, adjoint=True)
        ctx.save_for_backward(y0, *parameters)  # torch refuses if one is changed in place
        try:
            return ctx.run.forward(y0)
        except BaseException:
            ctx.run.close()
            raise

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        """The adjoint solve; after another one, the forward solve anew."""
        problem: _Problem = ctx.problem
        y0 = problem.peers.call(_saved_y0, ctx)
        run, ctx.run = ctx.run, None  # spent, whatever happens
        with ctx.autocast:
            again = run is None
            run = run or _Run(problem, adjoint=True, again=True)
            try:
                if again:
                    run.forward(y0)
                return None, *run.reverse(y_bar)
            finally:
                run.close()


def _saved_y0(ctx: Any) -> Tensor:
    """y0, once it is sure that the backward pass may run. Raises RuntimeError."""
    if torch.is_grad_enabled():
        raise RuntimeError("double backward (create_graph=True) through PETSc's own integrators is not implemented")
    return ctx.saved_tensors[0]


class _Run:
    """One TS: its forward solve and, once, its adjoint. It owns all PETSc objects; nothing that they hold knows it.

    Parameters
    ----------
    problem : what to solve
    adjoint : whether to store the trajectory
    again : whether this is a repetition, which is counted as such and does not call the monitors
    """

    def __init__(self, problem: _Problem, *, adjoint: bool, again: bool = False) -> None:
        self._problem, peers = problem, problem.peers
        self._size = sum(_real(p).numel() for p in problem.parameters)
        self._counter = _Counter(problem.stats, "recompute" if again else "forward")
        self._failure = Failure()
        self._f = _Functions(problem, self._counter, self._failure)
        self._clock = _Clock(problem, self._failure)
        comm = PETSc.COMM_SELF
        if peers.comm is not None:
            comm = PETSc.Comm(peers.comm)
            PETSc.garbage_cleanup(comm)  # what earlier solves have dropped: destroying it is collective
        self._ts = PETSc.TS().create(comm)
        self._u = state_vec(problem.layout.size, problem.device, comm)
        self._mu = state_vec(self._size, problem.device, comm) if peers.largest(self._size) else None
        self._owned: list[Any] = [self._ts, self._u]
        if self._mu is not None:
            self._owned.append(self._mu)
        self._configure(adjoint=adjoint, again=again)

    def close(self) -> None:
        """Destroy the PETSc objects. Collective."""
        for owned in self._owned:
            owned.destroy()
        self._owned = []

    def forward(self, y0: Tensor) -> Tensor:
        """Solve; y at the times, (T, d)."""
        problem, ts, clock = self._problem, self._ts, self._clock
        write(self._u, y0.detach())
        clock.outputs.append(y0.detach().clone())
        self._start(y0)
        self._solve(ts.solve, self._u)
        stats = problem.stats
        if self._counter.phase == "forward":
            stats.steps += ts.getStepNumber()
            stats.rejected += ts.getStepRejections()
        stats.newton_iterations += ts.getSNESIterations()
        stats.linear_iterations += ts.getKSPIterations()
        if len(clock.outputs) < len(problem.s):
            raise PfdeError(
                f"the TS stopped at t={self._time():.6g}, before {problem.sign * problem.s[-1]:.6g}: a hook of its "
                "options ended it"
            )
        outputs, clock.outputs = clock.outputs, []
        return torch.stack(outputs)

    def reverse(self, y_bar: Tensor) -> list[Tensor | None]:
        """The cotangents of y0 and the parameters. y_bar : (T, d)."""
        problem, ts, counts = self._problem, self._ts, self._clock.counts
        self._counter.phase = "backward"
        if problem.method.implicit:
            ts.getSNES().getKSP().setPostSolve(self._counter.add_linear)  # TSAdjoint does not count them
        lam = self._u.duplicate()
        self._owned.append(lam)
        lam.set(0.0)
        if self._mu is not None:
            self._mu.set(0.0)
        ts.setCostGradients([lam], None if self._mu is None else [self._mu])
        for k in range(len(counts), 0, -1):
            write(lam, read(lam) + y_bar[k])
            ts.adjointSetSteps(counts[k - 1])
            self._solve(ts.adjointSolve)
        y0_bar = (read(lam) + y_bar[0]).to(problem.dtype)
        return [y0_bar, *self._split(self._mu)]

    def _split(self, mu: PETSc.Vec | None) -> list[Tensor]:
        parameters = self._problem.parameters
        if mu is None or not parameters:
            return []
        parts = torch.split(read(mu), [_real(p).numel() for p in parameters])
        return [_unreal(part, p).clone() for part, p in zip(parts, parameters, strict=True)]

    def _configure(self, *, adjoint: bool, again: bool) -> None:
        problem, ts, method = self._problem, self._ts, self._problem.method
        ts.setOptionsPrefix(problem.prefix)
        ts.setType(method.family)
        if method.family == "rk":
            ts.setRKType(method.subtype)
        elif method.family == "arkimex":
            ts.setARKIMEXType(method.subtype)
        elif method.family == "theta":
            ts.setTheta(method.theta)
        self._set_callbacks()
        if method.implicit:
            self._set_solver_defaults()
        ts.setTolerances(rtol=problem.rtol, atol=problem.atol)
        ts.setErrorIfStepFails(False)  # the reason is read, and raised with t
        if adjoint:
            ts.setSaveTrajectory()
        with _own_options(problem, fixed=self._clock.fixed, again=again):
            ts.setFromOptions()
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
        ts.setPreStep(self._clock.pre_step)
        ts.setPostStep(self._clock.post_step)

    def _set_callbacks(self) -> None:
        ts, f, u = self._ts, self._f, self._u
        if f.explicit is not None or self._problem.method.family == "arkimex":  # NOTE 4
            ts.setRHSFunction(f.rhs_function, self._vec(u))
            jacobian = self._mat(u, u, _StateProducts(self._problem.dtype, self._failure))
            ts.setRHSJacobian(f.rhs_jacobian, jacobian, jacobian)
        if f.implicit is not None:
            ts.setIFunction(f.i_function, self._vec(u))
            jacobian = self._mat(u, u, _StateProducts(self._problem.dtype, self._failure))
            ts.setIJacobian(f.i_jacobian, jacobian, jacobian)
        if self._mu is None:
            return
        for part, put in ((f.explicit, ts.setRHSJacobianP), (f.implicit, ts.setIJacobianP)):
            if part is not None:
                products = _ParameterProducts(self._problem.dtype, self._failure)
                put(f.rhs_jacobian_p if part is f.explicit else f.i_jacobian_p, self._mat(u, self._mu, products))

    def _vec(self, like: PETSc.Vec) -> PETSc.Vec:
        vec = like.duplicate()
        self._owned.append(vec)
        return vec

    def _mat(self, rows: PETSc.Vec, columns: PETSc.Vec, context: _Products) -> PETSc.Mat:
        mat = PETSc.Mat().createPython((rows.getSizes(), columns.getSizes()), context=context, comm=rows.comm)
        mat.setVecType(rows.getType())
        mat.setUp()
        self._owned.append(mat)
        return mat

    def _set_solver_defaults(self) -> None:
        """Near rounding, because an unconverged stage is an error of the gradient; the options can say otherwise."""
        eps, snes = torch.finfo(self._problem.dtype).eps, self._ts.getSNES()
        snes.setType(PETSc.SNES.Type.NEWTONLS)
        # Newton's error is the square of its last step, so a step of eps^(3/4) is the last that can be of use.
        snes.setTolerances(rtol=10 * eps, atol=1e-50, stol=eps**0.75, max_it=50)
        snes.getLineSearch().setType("basic")  # at the rounding floor no decrease can be asked for
        ksp = snes.getKSP()
        ksp.setType(PETSc.KSP.Type.GMRES)
        ksp.setGMRESRestart(100)
        ksp.setTolerances(rtol=max(1e-13, 10 * eps), max_it=10000)
        ksp.getPC().setType(PETSc.PC.Type.NONE)

    def _start(self, y0: Tensor) -> None:
        ts, clock, s = self._ts, self._clock, self._problem.s
        ts.setTime(s[0])
        if clock.fixed:
            ts.setTimeStep(clock.sizes[0])
            ts.setMaxSteps(sum(clock.counts))
            ts.setMaxTime(2 * s[-1] - s[0])  # out of the way, but not so far that PETSc's step estimate overflows
        else:
            ts.setTimeStep(self._first_step(y0))
            ts.setMaxTime(s[-1] - clock.slack)

    def _first_step(self, y0: Tensor) -> float:
        """h with |h f| a hundredth of |y_0|, in units of the tolerance; the controller corrects it in a few steps.

        (Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, II.4, its first guess.)
        """
        problem, peers = self._problem, self._problem.peers
        y = y0.detach()
        parts = [part for part in (self._f.explicit, self._f.implicit) if part is not None]
        slope = torch.stack([peers.call(part.value, problem.s[0], y) for part in parts]).sum(0)
        scale = problem.atol + problem.rtol * y.abs()
        d0, d1 = (peers.sum(float((x / scale).square().sum())) ** 0.5 for x in (y, slope))
        span = problem.s[1] - problem.s[0]
        return min(span, 0.01 * d0 / d1 if d0 > 1e-5 and d1 > 1e-5 else 1e-6 * span)

    def _solve(self, solve: Callable[..., None], *arguments: Any) -> None:
        """A solve of PETSc's; what its callbacks failed with comes out as it was raised."""
        error: BaseException | None = None
        try:
            solve(*arguments)
        except PETSc.Error as caught:
            error = caught
        try:
            self._failure.release()
            if error is not None:
                raise PfdeError(f"PETSc's {self._where()} failed at t={self._time():.6g}: {error}") from error
        finally:
            del error  # else it and its traceback would keep each other, and all the solve holds, alive
        reason = self._ts.getConvergedReason()
        if reason < 0:
            raise ConvergenceError(
                f"PETSc's {self._where()} did not converge at t={self._time():.6g}, step {self._ts.getStepNumber()}: "
                f"{_REASONS.get(reason, f'reason {reason}')}; reduce step_size, loosen rtol and atol, or see options "
                "'snes_monitor', 'snes_linesearch_type': 'bt', 'ksp_monitor', 'ksp_rtol', 'ts_adapt_monitor'"
            )

    def _where(self) -> str:
        return ("adjoint of " if self._counter.phase == "backward" else "") + self._problem.method.name

    def _time(self) -> float:
        return self._problem.sign * self._ts.getTime()


_REASONS = {v: k for k, v in vars(PETSc.TS.ConvergedReason).items() if isinstance(v, int) and v < 0}
_REASONS[-3] = "DIVERGED_LINEAR_SOLVE"  # TSADJOINT_, which petsc4py does not name


class _Counter:
    """The counts of one run; `phase` says where an evaluation belongs."""

    def __init__(self, stats: Stats, phase: str) -> None:
        self._stats, self.phase = stats, phase

    def add_evaluation(self) -> None:
        """Count one call of func."""
        name = f"nfe_{self.phase}"
        setattr(self._stats, name, getattr(self._stats, name) + 1)

    def add_linear(self, ksp: PETSc.KSP, _b: PETSc.Vec, _x: PETSc.Vec) -> None:
        """Count the iterations of a linear solve that has ended."""
        self._stats.linear_iterations += ksp.getIterationNumber()


class _Clock:
    """The steps: PreStep sets the size of each, PostStep takes the outputs (NOTE 2).

    Fixed steps start at s_k + i h exactly. Adaptive ones are the controller's, cut to hit each output: to what is
    left, or, if two would go beyond it, to half of that; what the controller wanted before is tried again afterwards.
    """

    def __init__(self, problem: _Problem, failure: Failure) -> None:
        self._s, self._sign, self._dtype, self._failure = problem.s, problem.sign, problem.dtype, failure
        self.fixed = problem.step_size is not None or problem.method.on_grid
        self.outputs: list[Tensor] = []
        self.counts: list[int] = []  # steps in each interval
        self.sizes: list[float] = []
        self.slack = 8 * math.ulp(max(abs(s) for s in problem.s))
        self._k = self._i = 0  # the interval, and the steps that are done in it
        self._start = self._size = self._wanted = 0.0
        if self.fixed:
            spans = [b - a for a, b in zip(problem.s, problem.s[1:], strict=False)]
            self.counts = [1 if problem.step_size is None else max(1, round(w / problem.step_size)) for w in spans]
            self.sizes = [w / count for w, count in zip(spans, self.counts, strict=True)]

    def pre_step(self, ts: PETSc.TS) -> None:
        """PETSc's PreStep."""
        if self._failure.guard(self._prepare, ts) is None:
            ts.setConvergedReason(_FAILED)

    def post_step(self, ts: PETSc.TS) -> None:
        """PETSc's PostStep; called after a failed step too."""
        if ts.getConvergedReason() >= 0 and self._failure.guard(self._take, ts) is None:
            ts.setConvergedReason(_FAILED)

    def _prepare(self, ts: PETSc.TS) -> bool:
        k, i = self._k, self._i
        if k == len(self._s) - 1:
            return True
        if self.fixed:
            self._start, self._size = self._s[k] + i * self.sizes[k], self.sizes[k]
        else:
            self._start = self._s[k] if i == 0 else ts.getTime()
            wanted, left = max(ts.getTimeStep(), self._wanted), self._s[k + 1] - self._start
            if wanted < self.slack:
                raise ConvergenceError(
                    f"the step size fell to {wanted:.3g} at t={self._sign * self._start:.6g}: loosen rtol and atol, "
                    "use an implicit method for stiff problems, or check func for a singularity"
                )
            self._size = left if 1.01 * wanted >= left else min(wanted, left / 2)
            self._wanted = wanted if self._size < wanted else 0.0
        ts.setTime(self._start)
        ts.setTimeStep(self._size)
        return True

    def _take(self, ts: PETSc.TS) -> bool:
        t = ts.getTime()
        cut = t - self._start < 0.999 * self._size
        self._i += 1
        if self.fixed:
            if cut:
                raise ConvergenceError(
                    f"PETSc cut the step at t={self._sign * self._start:.6g} from {self._size:.6g} to "
                    f"{t - self._start:.6g}: with fixed steps reduce step_size, and leave ts_max_snes_failures alone"
                )
            ended = self._i == self.counts[self._k]
        else:
            if cut:  # the controller has rejected it: what it wanted before is too large
                self._wanted = 0.0
            ended = t >= self._s[self._k + 1] - self.slack
        if ended:
            self.outputs.append(load(ts.getSolution(), self._dtype))
            if not self.fixed:
                self.counts.append(self._i)
            self._k, self._i = self._k + 1, 0
        return True


_FAILED = PETSc.TS.ConvergedReason.DIVERGED_NONLINEAR_SOLVE  # ends a solve; the failure itself is raised instead


class _Functions:
    """PETSc's callbacks (NOTE 1): f = explicit + implicit, either of which may be absent."""

    def __init__(self, problem: _Problem, counter: _Counter, failure: Failure) -> None:
        func, self._failure, self._peers = problem.func, failure, problem.peers
        self.explicit: _Part | None = None
        self.implicit: _Part | None = None
        if problem.method.family == "arkimex" and hasattr(func, "stiff") and hasattr(func, "nonstiff"):
            self.explicit = _Part(problem, func.nonstiff, counter, "func.nonstiff")
            self.implicit = _Part(problem, func.stiff, counter, "func.stiff")
        elif problem.method.implicit:
            self.implicit = _Part(problem, func, counter, "func")
        else:
            self.explicit = _Part(problem, func, counter, "func")

    def rhs_function(self, ts: PETSc.TS, s: float, u: PETSc.Vec, g: PETSc.Vec) -> None:
        """g = explicit(s, u)."""
        if self.explicit is None:
            g.set(0.0)
            return
        value = self._guard(ts, self.explicit.value, s, u)
        if value is None:
            g.set(math.nan)
        else:
            write(g, value)

    def i_function(self, ts: PETSc.TS, s: float, u: PETSc.Vec, udot: PETSc.Vec, g: PETSc.Vec) -> None:
        """g = udot - implicit(s, u)."""
        assert self.implicit is not None
        value = self._guard(ts, self.implicit.value, s, u)
        if value is None:
            g.set(math.nan)  # ends Newton's method
        else:
            write(g, read(udot) - value)

    def rhs_jacobian(self, ts: PETSc.TS, s: float, u: PETSc.Vec, mat: PETSc.Mat, pmat: PETSc.Mat) -> None:
        """J of the explicit part."""
        self._fill(ts, self.explicit, s, u, pmat, 0.0, 1.0)
        mat.assemble()

    def i_jacobian(
        self, ts: PETSc.TS, s: float, u: PETSc.Vec, _udot: PETSc.Vec, shift: float, mat: PETSc.Mat, pmat: PETSc.Mat
    ) -> None:
        """shift I - J of the implicit part."""
        self._fill(ts, self.implicit, s, u, pmat, shift, -1.0)
        mat.assemble()  # another one with -snes_mf_operator

    def rhs_jacobian_p(self, ts: PETSc.TS, s: float, u: PETSc.Vec, mat: PETSc.Mat) -> None:
        """P of the explicit part."""
        self._fill(ts, self.explicit, s, u, mat, 0.0, 1.0)

    def i_jacobian_p(
        self, ts: PETSc.TS, s: float, u: PETSc.Vec, _udot: PETSc.Vec, _shift: float, mat: PETSc.Mat
    ) -> None:
        """-P of the implicit part."""
        self._fill(ts, self.implicit, s, u, mat, 0.0, -1.0)

    def _fill(
        self, ts: PETSc.TS, part: _Part | None, s: float, u: PETSc.Vec, mat: PETSc.Mat, shift: float, factor: float
    ) -> None:
        products: _Products = mat.getPythonContext()
        products.at = None  # so that a failure leaves no other state's
        if part is not None:
            products.at = self._guard(ts, part.linearise, s, u)
        products.shift, products.factor = shift, factor
        mat.assemble()

    def _guard(self, ts: PETSc.TS, function: Callable[[float, Tensor], Any], s: float, u: PETSc.Vec) -> Any:
        result = self._failure.guard(self._call, function, s, u)
        if result is None:
            ts.setConvergedReason(_FAILED)
        return result

    def _call(self, function: Callable[[float, Tensor], Any], s: float, u: PETSc.Vec) -> Any:
        return self._peers.call(function, s, load(u, torch.float64))


class _Part:
    """func(t, y), or a part of it, on flat states in s = sign t: sign func(sign s, y), counted and checked."""

    def __init__(self, problem: _Problem, func: Callable[[Tensor, Any], Any], counter: _Counter, name: str) -> None:
        self._func, self._layout, self._counter, self._name = func, problem.layout, counter, name
        self._sign, self._dtype, self._device = problem.sign, problem.dtype, problem.device
        self._parameters = problem.parameters

    def value(self, s: float, u: Tensor) -> Tensor:
        """f without a graph. Raises NonFiniteError."""
        with torch.no_grad():
            return self._sign * self._evaluate(s, u.to(self._dtype))

    def linearise(self, s: float, u: Tensor) -> _Linear:
        """f's graph at (s, u)."""
        with torch.enable_grad():
            y = u.to(self._dtype).requires_grad_()
            return _Linear(y, self._sign * self._evaluate(s, y), self._parameters)

    def _evaluate(self, s: float, y: Tensor) -> Tensor:
        self._counter.add_evaluation()
        t, version = self._sign * s, y._version
        time = torch.tensor(t, dtype=self._dtype, device=self._device)
        value = self._layout.flatten(self._func(time, self._layout.unflatten(y)), self._dtype, self._name)
        if y._version != version:
            raise RuntimeError(
                f"{self._name} changed y in place at t={t:.6g}: write y = y + ... instead of y += ... in it"
            )
        # A finite sum has finite terms, an infinite one may merely have overflowed.
        if not math.isfinite(value.detach().sum().item()) and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"{self._name} returned NaN or inf at t={t:.6g}: reduce step_size, use an implicit method for stiff "
                "problems, or check func and its parameters"
            )
        return value


class _Linear:
    """f at one (s, y) with the graph of its evaluation: the products of J = df/dy and P = df/dtheta."""

    def __init__(self, y: Tensor, out: Tensor, parameters: tuple[Tensor, ...]) -> None:
        self._y, self._out, self._parameters = y, out, parameters
        self._dual: tuple[Tensor, Tensor | None] | None = None  # w and J^T w as a function of it
        self._reached = not out.requires_grad  # whether all leaves of the graph are known to be inputs

    def state_vjp(self, v: Tensor) -> Tensor:
        """J^T v."""
        (bar,) = self._vjp((self._y,), v)
        return torch.zeros_like(v) if bar is None else bar

    def parameter_vjp(self, v: Tensor) -> Tensor:
        """P^T v, all parameters in one vector of doubles."""
        bars = self._vjp(self._parameters, v)
        pairs = zip(bars, self._parameters, strict=True)
        return _pack([torch.zeros_like(p) if bar is None else bar for bar, p in pairs], v)

    def state_jvp(self, v: Tensor) -> Tensor:
        """J v: the derivative of w -> J^T w along v, which does not depend on w."""
        if self._dual is None:
            w, (bar,) = self._transpose((self._y,))
            self._dual = w, bar
        w, bar = self._dual
        return _along(w, [bar], [v])

    def parameter_jvp(self, theta_dot: Tensor) -> Tensor:
        """P theta_dot, for all parameters in one vector."""
        parts = torch.split(theta_dot, [_real(p).numel() for p in self._parameters])
        w, bars = self._transpose(self._parameters)
        return _along(w, bars, [_unreal(part, p) for part, p in zip(parts, self._parameters, strict=True)])

    def _vjp(self, inputs: tuple[Tensor, ...], v: Tensor) -> Sequence[Tensor | None]:
        if not self._reached:
            Reached(self._parameters).require(self._out, self._y)
            self._reached = True
        if not inputs or not self._out.requires_grad:
            return [None] * len(inputs)
        return torch.autograd.grad(self._out, inputs, v, retain_graph=True, allow_unused=True)

    def _transpose(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Sequence[Tensor | None]]:
        with torch.enable_grad():
            w = torch.zeros_like(self._out, requires_grad=True)
            if not inputs or not self._out.requires_grad:
                return w, [None] * len(inputs)
            return w, torch.autograd.grad(self._out, inputs, w, create_graph=True, allow_unused=True)


def _along(w: Tensor, bars: Sequence[Tensor | None], tangents: Sequence[Tensor]) -> Tensor:
    """The derivative of w -> sum_i <bar_i(w), tangent_i>."""
    pairs = [(b, dot) for b, dot in zip(bars, tangents, strict=True) if b is not None and b.requires_grad]
    if not pairs:
        return torch.zeros_like(w, requires_grad=False)
    outputs, dots = zip(*pairs, strict=True)
    (out,) = torch.autograd.grad(outputs, w, dots, retain_graph=True, allow_unused=True)
    return torch.zeros_like(w, requires_grad=False) if out is None else out


def _real(p: Tensor) -> Tensor:
    """The real numbers of a tensor."""
    return torch.view_as_real(p.detach().resolve_conj()) if p.is_complex() else p


def _unreal(flat: Tensor, like: Tensor) -> Tensor:
    """The tensor like `like` of these real numbers."""
    if like.is_complex():
        part = flat.to(like.device, like.real.dtype).reshape(*like.shape, 2)
        return torch.view_as_complex(part.contiguous())
    return flat.to(like.device, like.dtype).reshape(like.shape)


def _pack(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """All real numbers of the tensors in one vector of doubles, on the device of `like`."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device=like.device)
    return torch.cat([_real(x).reshape(-1).to(like.device, torch.float64) for x in tensors])


class _Products:
    """A = shift I + factor D, D a derivative of f at `at`, zero for None: the context of a Mat of type python.

    It holds nothing but what the callback of its Mat has put here last. It does not know its Mat: the Mat's hold on it
    is in C, where no garbage collector would see the cycle.
    """

    def __init__(self, dtype: torch.dtype, failure: Failure) -> None:
        self._dtype, self._failure = dtype, failure
        self.at: _Linear | None = None
        self.shift, self.factor = 0.0, 1.0

    def mult(self, _mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """PETSc's MatMult."""
        self._multiply(self._product, x, y)

    def multTranspose(self, _mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """PETSc's MatMultTranspose."""
        self._multiply(self._product_transpose, x, y)

    def _product(self, v: Tensor) -> Tensor:
        raise NotImplementedError

    def _product_transpose(self, v: Tensor) -> Tensor:
        raise NotImplementedError

    def _multiply(self, product: Callable[[Tensor], Tensor], x: PETSc.Vec, y: PETSc.Vec) -> None:
        value = self._failure.guard(product, read(x))
        if value is None:
            y.set(math.nan)  # ends a Krylov method
        else:
            write(y, value)


class _StateProducts(_Products):
    """shift I + factor J."""

    def _product(self, v: Tensor) -> Tensor:
        if self.at is None:
            return self.shift * v
        return self.shift * v + self.factor * self.at.state_jvp(v.to(self._dtype, copy=True))

    def _product_transpose(self, v: Tensor) -> Tensor:
        if self.at is None:
            return self.shift * v
        return self.shift * v + self.factor * self.at.state_vjp(v.to(self._dtype, copy=True))


class _ParameterProducts(_Products):
    """factor P."""

    def _product(self, v: Tensor) -> Tensor:
        assert self.at is not None
        return self.factor * self.at.parameter_jvp(v)

    def _product_transpose(self, v: Tensor) -> Tensor:
        assert self.at is not None
        return self.factor * self.at.parameter_vjp(v.to(self._dtype, copy=True))


_DECIDED = (  # by the arguments, or by how the adjoint is run
    *("ts_type", "ts_dt", "ts_init_time", "ts_max_time", "ts_max_steps", "ts_run_steps", "ts_exact_final_time"),
    *("ts_time_span", "ts_eval_times", "ts_save_trajectory", "ts_adjoint_solve", "ts_rk_type", "ts_rk_multirate"),
    *("ts_theta_theta", "ts_theta_endpoint", "ts_arkimex_type", "ts_arkimex_fully_implicit"),
)
_TRAJECTORY = ("ts_trajectory_type", "ts_trajectory_monitor", "ts_trajectory_view")


def _refuse_options(prefix: str, *, fixed: bool) -> None:
    """Raise ValueError for options that the arguments decide, or that the adjoint is not made for."""
    options = PETSc.Options(prefix)
    for name in (*_DECIDED, "ts_adapt_type") if fixed else _DECIDED:
        if options.hasName(name):
            raise ValueError(
                f"PETSc option -{prefix}{name} does not apply here: t, step_size and method say it; if it belongs to "
                "another TS of the program, give this solve an options_prefix"
            )
    for name, value in PETSc.Options().getAll().items():
        known = name in _TRAJECTORY and (name != "ts_trajectory_type" or value == "memory")
        if name.startswith("ts_trajectory_") and not known:
            raise ValueError(
                f"PETSc option -{name} {value} does not apply here: the trajectory of a petsc: method is in memory, "
                "whole; PETSc reads this option without a prefix, so clear it for this solve"
            )


def _snapshot_options(prefix: str) -> dict[str, str]:
    """The options of this prefix, for a forward solve that is done again when the database may have changed."""
    kinds = tuple(prefix + kind for kind in ("ts_", "snes_", "ksp_", "pc_"))
    return {name: value for name, value in PETSc.Options().getAll().items() if name.startswith(kinds)}


@contextmanager
def _own_options(problem: _Problem, *, fixed: bool, again: bool) -> Iterator[None]:
    """The options that a TS is to be set up with, in the database; then what was there (NOTE 3)."""
    wanted = {"ts_trajectory_type": "memory"}
    if fixed:
        wanted[f"{problem.prefix}ts_adapt_type"] = "none"
    if again:
        shows = ("monitor", "view", "converged_reason")
        wanted |= {n: v for n, v in problem.options.items() if not any(word in n for word in shows)}
        wanted["ts_trajectory_type"] = "memory"
    database = PETSc.Options()
    before = {name: database.getString(name) for name in wanted if database.hasName(name)}
    try:
        for name, value in wanted.items():
            database.setValue(name, value)
        yield
    finally:
        for name in wanted:
            database.delValue(name)
        for name, value in before.items():
            database.setValue(name, value)
