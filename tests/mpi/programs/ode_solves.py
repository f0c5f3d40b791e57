"""Worker: adaptive and implicit one-step methods with a state split over the ranks: as one rank alone, and errors.

usage: ode_solves.py agreement|faults
"""

import sys
from collections.abc import Callable

import abort_all  # noqa: F401
import torch
from faults_of_one import Faults
from mpi4py import MPI
from torch import Tensor, nn

import pfde

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()
guilty = rank == size - 1
torch.set_num_threads(1)

D = torch.float64
SIZE, TOLERANCE = 12, 1e-13
T = torch.tensor([0.0, 0.2, 0.6] if sys.argv[1] == "agreement" else [0.0, 0.3, 1.0], dtype=D)
KIND = torch.arange(SIZE) % 3
A = torch.tensor([-1.0, 0.2, 2.6], dtype=D)[KIND]
START = torch.tensor([0.5, 2.0, 1.0], dtype=D)[KIND]
ATOL = torch.tensor([1e-6, 1e-4, 1e-5], dtype=D)[KIND]
# uneven, and the entries that need the small steps on each rank alike
CUTS = [0, *(5 + 2 * r for r in range(size - 1)), SIZE]
MINE, WHOLE = slice(CUTS[rank], CUTS[rank + 1]), slice(0, SIZE)
FORMS = {
    "dopri5": {"method": "dopri5", "rtol": 1e-5, "atol": 1e-6},
    "dopri8 fixed": {"method": "dopri8", "step_size": 0.1},
    "cn": {"method": "cn", "step_size": 0.1},
    "sdirk4": {"method": "sdirk4", "rtol": 1e-2, "atol": 1e-3},
    "ark2": {"method": "ark2", "rtol": 1e-1, "atol": 1e-1},
    "dopri5, atol": {"method": "dopri5", "rtol": 1e-5, "atol": "split"},
}


class Field(nn.Module):
    """f = c tanh(a y) + t, entry by entry: a is split as y is, c is shared."""

    def __init__(self, part: slice) -> None:
        super().__init__()
        self.a = nn.Parameter(A[part].clone())
        self.c = nn.Parameter(torch.tensor(1.3, dtype=D))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.c * torch.tanh(self.a * y) + t


def run(part: slice, form: str, **keywords: object) -> tuple[list[Tensor], pfde.Solution]:
    """y, y0_bar, a_bar (split); c_bar and t_bar (this rank's contributions); and the solution."""
    keywords = FORMS[form] | keywords
    if keywords.get("atol") == "split":
        keywords["atol"] = ATOL[part]
    f, t = Field(part), T.clone().requires_grad_()
    func = pfde.Split(f, lambda t, y: -0.5 * y) if form == "ark2" else f
    y0 = START[part].clone().requires_grad_()
    solution = pfde.solve(func, y0, t, **keywords)
    loss = (solution.y.square().sum(0) * torch.arange(1.0, SIZE + 1, dtype=D)[part]).sum()
    return [solution.y.detach(), *torch.autograd.grad(loss, (y0, f.a, f.c, t))], solution


def check(what: str, got: Tensor, expected: Tensor) -> None:
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE, f"rank {rank}: {what} is off by {error:.1e} (relative, of the largest entry)"


def agreement() -> None:
    for form in FORMS:
        settings = [pfde.Discrete()]
        if form in ("dopri5", "cn"):
            settings += [
                pfde.Discrete(store="graph"),
                pfde.Discrete(schedule=pfde.Online(1, leaf=2)),
                pfde.Symplectic(),
                pfde.Backprop(),
                pfde.Continuous(),
            ]
        for gradient in settings:
            name = f"{form}, {gradient}: "
            whole, alone = run(WHOLE, form, gradient=gradient)
            parts, shared = run(MINE, form, gradient=gradient, comm=comm)
            if gradient == settings[0]:
                again, _ = run(MINE, form, gradient=gradient, comm=comm)
                assert all(map(torch.equal, parts, again)), f"{name}the same solve gives other bits"
            assert shared.stats.steps == alone.stats.steps, f"{name}{shared.stats} against {alone.stats}"
            assert shared.stats.rejected == alone.stats.rejected, f"{name}{shared.stats} against {alone.stats}"
            if isinstance(gradient, pfde.Continuous):
                # the norm of the backward pass has c_bar of each rank in it: to its tolerance only
                y, y0_bar, *_ = whole
                check(name + "y", parts[0], y[:, MINE])
                assert torch.allclose(parts[1], y0_bar[MINE], rtol=1e-2), f"{name}{parts[1]} {y0_bar[MINE]}"
                continue
            check(name + "y", parts[0], whole[0][:, MINE])
            check(name + "y0_bar", parts[1], whole[1][MINE])
            check(name + "a_bar", parts[2], whole[2][MINE])
            check(name + "c_bar", comm.allreduce(parts[3]), whole[3])
            check(name + "t_bar", comm.allreduce(parts[4]), whole[4])
    if rank == 0:
        print("as one")


def solve(f: Callable, form: str, t: Tensor = T, **keywords: object) -> Tensor:
    func = pfde.Split(f, lambda t, y: -0.5 * y) if form == "ark2" else f
    y0 = torch.ones(3, dtype=D).requires_grad_()
    return pfde.odeint(func, y0, t, **({"comm": comm} | FORMS[form] | keywords))


def faults() -> None:
    fault = Faults(comm, lambda: run(MINE, "dopri5", comm=comm)[0])
    boom, ctrl_c = ValueError("boom"), KeyboardInterrupt("ctrl-c")
    nan = float("nan")
    for form in ("dopri5", "cn", "sdirk4", "ark2"):
        count = [0, 0]

        def hooked(t: Tensor, y: Tensor, count: list = count) -> Tensor:
            count[0] += 1
            return torch.sin(y) + t

        y = solve(hooked, form)
        forward = count[0]
        y.sum().backward()
        ends = ((boom, 1), (ctrl_c, count[0])) if form in ("dopri5", "cn") else ()
        for error, k in ((boom, 3), (ctrl_c, forward // 2), (boom, forward + 1), *ends):
            calls = [0]

            def failing(t: Tensor, y: Tensor, calls: list = calls, k: int = k, error: BaseException = error) -> Tensor:
                calls[0] += 1
                if guilty and calls[0] == k:
                    raise error
                return torch.sin(y) + t

            with fault(f"{form}: {error!r} at {k}", error):
                solve(failing, form).sum().backward()

    # NaN on one rank: adaptive steps shrink on all ranks alike, and then all give up, or none
    for form in ("dopri5", "sdirk4"):
        with fault(f"{form}: NaN beyond t = 0.5", pfde.StepLimitError, "NaN or inf", everywhere=True):
            solve(lambda t, y: torch.where(t > 0.5, nan, -y) if guilty else -y, form)

    def exploding(t: Tensor, y: Tensor) -> Tensor:
        rate = 50.0 if guilty else 1.0
        return torch.where(y.abs() < 1.5, -rate * (y - torch.cos(t)), nan)

    y0 = torch.ones(3, dtype=D, requires_grad=True)
    solution = pfde.solve(exploding, y0, T, comm=comm, options={"first_step": 1.0}, rtol=1e-4, atol=1e-5)
    assert solution.stats.rejected > 0
    solution.y.sum().backward()
    assert len(set(comm.allgather((solution.stats.steps, solution.stats.rejected)))) == 1
    with fault("NaN with fixed steps", pfde.NonFiniteError, "step 2"):
        solve(lambda t, y: torch.where(t > 0.15, nan, -y) if guilty else -y, "cn")

    # limits
    with fault("too many steps", pfde.StepLimitError, "3 steps were tried", everywhere=True):
        solve(lambda t, y: -y, "dopri5", options={"max_num_steps": 3})
    with fault("min_step", pfde.StepLimitError, "the step size fell to", everywhere=True):
        solve(lambda t, y: torch.sin((50 if guilty else 1) * y), "dopri5", options={"min_step": 0.5, "first_step": 0.5})
    solution = pfde.solve(
        lambda t, y: -y,
        y0,
        T,
        comm=comm,
        options={"max_num_steps": 3, "on_limit": "return", "max_step": 0.2, "first_step": 0.2},
    )
    assert solution.status == "limit"
    with fault("ended early", pfde.PfdeError, "the forward pass ended early", everywhere=True):
        solution.y.sum().backward()

    # what differs between the ranks
    def differs(what: str, **keywords: object) -> None:
        with fault(what, ValueError, f"{what} must be the same on every rank of comm", everywhere=True):
            solve(lambda t, y: -y, "dopri5", **keywords)

    differs("method", method="tsit5" if guilty else "dopri5")
    differs("t, with step_size", t=T * 2 if guilty else T)
    differs("t, with step_size", step_size=0.1 if guilty else 0.05)
    differs("gradient", gradient=pfde.Symplectic() if guilty else pfde.Discrete())
    differs("rtol and atol", rtol=1e-3 if guilty else 1e-4)
    differs("options", options={"max_step": 0.1 if guilty else 0.2})
    with fault("times", ValueError, "increasing or decreasing"):
        solve(lambda t, y: -y, "dopri5", t=T[[0, 2, 1]] if guilty else T)
    with fault("mass", ValueError, "mass must be"):
        solve(lambda t, y: -y, "cn", mass=torch.eye(2) if guilty else torch.eye(3))
    with fault("closure", ValueError, "requires grad but is none of its parameters"):
        w = torch.ones(3, dtype=D, requires_grad=True)
        solve((lambda t, y: y * w) if guilty else (lambda t, y: -y), "dopri5")

    # events are not split over ranks; the backward pass
    f = Field(MINE)
    y = pfde.odeint(f, START[MINE], T, comm=comm)
    if guilty:
        with torch.no_grad():
            f.a.mul_(0.5)
    with fault("theta changed in place", RuntimeError, "modified by an inplace operation"):
        y.sum().backward()
    y = solve(lambda t, y: -y, "dopri5")
    with fault("double backward", RuntimeError, "double backward", everywhere=True):
        y.sum().backward(create_graph=True)
    survived = fault.counted()
    if rank == 0:
        print(survived)


{"agreement": agreement, "faults": faults}[sys.argv[1]]()
