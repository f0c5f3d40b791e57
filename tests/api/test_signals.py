"""The program's signals stay its own: PETSc started by pfde installs no handler, and Ctrl-C is a KeyboardInterrupt."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import nn

import pfde
from support.covering import EXHAUSTIVE

SOLVE = """
import os, signal, sys
import torch
import pfde

torch.set_num_threads(1)
T = torch.linspace(0, 1, 5)


def solve(seed=0, **keywords):
    y0 = torch.ones(3, requires_grad=True)
    y = pfde.fdeint(lambda t, y: -y, y0, T, 0.7, method="trapezoid", **keywords)
    y.sum().backward()
    return float(y0.grad.sum())
"""
CLEAN = {name: value for name, value in os.environ.items() if name != "PETSC_OPTIONS"}


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program that solves; its output and errors."""
    return subprocess.run(
        [sys.executable, "-c", SOLVE + code, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env=CLEAN | environment,
    )


def test_handlers_of_the_program_stay() -> None:
    """Those set before the first solve, and those after it; SIGHUP, of which UCX makes a switch for its log."""
    done = run("""
caught = []
before = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
after = (signal.SIGUSR2, signal.SIGALRM)
for s in before:
    signal.signal(s, lambda number, frame: caught.append(number))
solve()
for s in after:
    signal.signal(s, lambda number, frame: caught.append(number))
solve()
for s in before + after:
    os.kill(os.getpid(), s)
assert caught == list(before + after), caught
""")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_that_has_solved_is_as_any_other() -> None:
    """PETSc's options are those of the environment, a closed pipe is an error, signals without a handler do what they
    do without pfde, and a pool of forked workers, which it ends by SIGTERM, is silent.
    """
    done = run(
        """
import multiprocessing

numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
ignored = [number for number in numbers if signal.getsignal(number) == signal.SIG_IGN]  # by Python, by nohup
expected = solve()
from petsc4py import PETSc

options = PETSc.Options().getAll()
assert options["snes_rtol"] == "1e-9" and "from_the_command_line" not in options, options

r, w = os.pipe()
os.close(r)
try:
    os.write(w, b"x")
except BrokenPipeError:
    print("broken pipe", flush=True)

for number in numbers:
    child = os.fork()
    if not child:
        os.kill(os.getpid(), number)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if number in ignored else -number), (number, status)

with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(solve, range(4)) == [expected] * 4
""",
        "-from_the_command_line",
        PETSC_OPTIONS="-snes_rtol 1e-9",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "broken pipe\n", "")


def test_a_program_that_has_started_petsc_keeps_what_it_has_chosen() -> None:
    """Its command line is read and PETSc's handlers are there: they are what prints at SIGTERM."""
    done = run("""
import petsc4py
petsc4py.init(["program", "-pfde_test", "3"])
solve()
from petsc4py import PETSc
assert PETSc.Options().getInt("pfde_test") == 3
assert not PETSc.Options().hasName("no_signal_handler")
""")
    assert done.returncode == 0, done.stderr


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------

T = torch.linspace(0, 1, 5, dtype=torch.float64)
DISK = pfde.Discrete(schedule=pfde.Revolve(1, on_disk=3))
SOLVES = {
    "trapezoid": {"alpha": 0.7, "method": "trapezoid", "options": {"fde_jacobian": "matrix_free"}},
    "pece, disk": {"alpha": 0.7, "method": "pece", "history": pfde.ShortMemory(0.5), "gradient": DISK},
    "cn, disk": {"method": "cn", "gradient": DISK},
    "dopri5": {"method": "dopri5", "rtol": 1e-3},
    "sdirk4": {"method": "sdirk4", "rtol": 1e-2, "atol": 1e-2, "options": {"snes_rtol": 1e-9}},
    "backprop": {"method": "beuler", "rtol": 1e-3, "gradient": pfde.Backprop()},
    "petsc": {"method": "petsc:cn"},
}
HOME = Path(pfde.__file__).parent
# Where Python runs inside of PETSc, where something is to be put back, and where files are kept.
NEAR = (
    *("driver.py", "execution.py", "autograd.py", "checkpoints.py", "storage.py", "petsc_options.py"),
    *("stage_solver.py", "operators.py", "base.py", "vectors.py", "problem.py", "setting.py", "callbacks.py"),
)


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[-0.3, 0.4], [0.2, 0.5]], dtype=torch.float64))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(y @ self.w) - y


class Interrupt:
    """Sends this process SIGINT when one line of pfde's is reached for the first time; `lines` are those it has met."""

    def __init__(self, at: tuple[str, int] | None = None) -> None:
        self.at, self.lines = at, {}

    def __enter__(self) -> "Interrupt":
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, _event: str, _argument: object) -> Callable | None:
        code = frame.f_code
        ours = code.co_filename.startswith(str(HOME)) and code.co_name != "__del__"  # out of which nothing comes
        return self._line if ours else None

    def _line(self, frame: FrameType, event: str, _argument: object) -> Callable:
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            if line == self.at and line not in self.lines:
                os.kill(os.getpid(), signal.SIGINT)
            self.lines[line] = True
        return self._line


@pytest.mark.parametrize("name", SOLVES)
def test_an_interrupt_comes_out_as_such_and_leaves_nothing_behind(name: str, folder: Path) -> None:
    """At some lines of pfde's code, forward and backward; the next backward pass, and the next solve, are right."""
    f = Field()

    def solve(interrupt: Interrupt | None, pending: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        y0 = torch.tensor([[1.0, 0.5], [2.0, -1.0]], dtype=torch.float64, requires_grad=True)
        with interrupt or nullcontext():
            loss = pfde.solve(f, y0, T, **SOLVES[name]).y.square().sum()
            pending += [loss, y0]
            return torch.autograd.grad(loss, (y0, f.w), retain_graph=True)

    solve(None, [])  # what is done once in a process, such as registering events
    meet = Interrupt()
    expected = solve(meet, [])
    lines = sorted(line for line in meet.lines if Path(line[0]).name in NEAR)
    assert len(lines) > 100
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for line in lines if EXHAUSTIVE else random.Random(name).sample(lines, 8):
            pending: list[torch.Tensor] = []
            with pytest.raises(KeyboardInterrupt):
                solve(Interrupt(line), pending)
            if pending:
                loss, y0 = pending
                assert all(map(torch.equal, torch.autograd.grad(loss, (y0, f.w)), expected)), line
                del loss, y0
            pending.clear()
            assert all(map(torch.equal, solve(None, []), expected)), line
            assert not list(folder.iterdir()), line
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_a_caller_is_handling_is_not_taken_for_the_cause() -> None:
    """A solve in an except clause of Ctrl-C's that fails for a reason of its own."""
    y0 = torch.ones(2, dtype=torch.float64)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(ValueError, match="PETSc does not take"):
            pfde.fdeint(lambda t, y: -y, y0, T, 0.7, options={"snes_type": "nonsense"})
        with pytest.raises(pfde.ConvergenceError):
            pfde.fdeint(lambda t, y: y * y + 1e3, y0, T, 0.7, options={"snes_max_it": 1})
