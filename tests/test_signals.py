"""The program's signals stay its own: PETSc started by pfde installs no handler, and Ctrl-C is a KeyboardInterrupt."""

import os
import signal
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE], ids=lambda s: s.name)
def test_without_a_handler_a_signal_does_what_it_does_without_pfde(number: signal.Signals) -> None:
    done = run(f"solve()\nos.kill(os.getpid(), {int(number)})\nprint('alive', flush=True)")
    ignored = number == signal.SIGPIPE  # by Python
    assert done.returncode == (0 if ignored else -number), done.stderr
    assert done.stdout == ("alive\n" if ignored else "")
    assert done.stderr == ""


def test_a_closed_pipe_is_a_broken_pipe_error() -> None:
    done = run("""
solve()
r, w = os.pipe()
os.close(r)
try:
    os.write(w, b"x")
except BrokenPipeError:
    print("broken pipe")
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "broken pipe\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_pool_of_forked_workers_ends_in_silence() -> None:
    """The pool ends its workers by SIGTERM."""
    done = run("""
import multiprocessing
expected = solve()
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(solve, range(4)) == [expected] * 4
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


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


def test_options_of_the_environment_are_read_and_those_of_the_command_line_are_not() -> None:
    done = run(
        "solve()\nfrom petsc4py import PETSc\nprint(PETSc.Options().getAll())",
        "-from_the_command_line",
        PETSC_OPTIONS="-snes_rtol 1e-9",
    )
    assert done.returncode == 0, done.stderr
    assert "'snes_rtol': '1e-9'" in done.stdout
    assert "from_the_command_line" not in done.stdout
