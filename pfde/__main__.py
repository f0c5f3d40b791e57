"""The command line: `python -m pfde verify` runs the gradient battery on a small built-in model and prints a table.

The model has what a model can have: a batch, an nn.Module, a right-hand side that depends on t, one learnable order a
component (none for the methods of ordinary equations), and a loss on every output. The exit code is 0 when every
gradient is right, 1 when one is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from .caputo.schemes import METHODS as CAPUTO
from .caputo.schemes import Scheme
from .one_step.methods import METHODS as ONE_STEP
from .one_step.methods import OneStep
from .one_step.split import Split
from .solving.gradients import Discrete, Store
from .testing import Report, verify

_NAMES = [*CAPUTO, *(name for name in ONE_STEP if name not in CAPUTO)]

_DTYPES = {"float64": torch.float64, "float32": torch.float32}


class _Model(nn.Module):
    """f(t, y) = W2 tanh(W1 y + b1 + c sin 3t) + b2 on states of 3 components."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.6 * torch.randn(shape, generator=generator, dtype=torch.float64))

        self.W1, self.b1, self.c = parameter(4, 3), parameter(4), parameter(4)
        self.W2, self.b2 = parameter(3, 4), parameter(3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(y @ self.W1.T + self.b1 + self.c * torch.sin(3 * t))
        return hidden @ self.W2.T + self.b2


def run(methods: Sequence[str], *, store: Store, steps: int, seed: int, dtype: torch.dtype = torch.float64) -> bool:
    """Print one line for each method as it is verified; return whether all passed."""
    print(f"{'':<17}  {'relative error against autograd':^31}  {'dot':^9}  {'Taylor slopes':^15}")
    print(f"{'method':<17}  {'y0':^9}  {'theta':^9}  {'alpha':^9}  {'product':^9}  {'zeroth':^7} {'first':^7}  result")
    started, passed = time.perf_counter(), []
    for method in methods:
        scheme: Scheme | OneStep = CAPUTO[method] if method in CAPUTO else ONE_STEP[method]
        split = isinstance(scheme, OneStep) and scheme.split
        model = Split(_Model(seed), _Model(seed + 1)) if split else _Model(seed)
        generator = torch.Generator().manual_seed(seed)
        report = verify(
            model.to(dtype),
            torch.randn(2, 3, generator=generator, dtype=torch.float64).to(dtype),
            torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64),
            torch.tensor([0.45, 0.7, 0.95], dtype=torch.float64) if method in CAPUTO else 1.0,
            method=scheme,
            step_size=1.0 / steps,
            gradient=Discrete(store=store),
            seed=seed,
        )
        passed.append(report.passed)
        print(_line(report), flush=True)
    count = f"{sum(passed)} of {len(passed)} methods passed"
    print(f"\n{count}: {steps} steps, {_name(dtype)}, store={store!r}, {time.perf_counter() - started:.1f} s")
    print(f"allowed: {report.tolerance:.0e} against autograd, {report.dot_tolerance:.0e} in the dot product, slopes")
    room = f"{report.slope_tolerance:g}{'' if dtype == torch.float64 else ' and rounding'}"
    print(f"1 and 2 within {room}; your own model: pfde.testing.verify(func, y0, t, alpha, ...)")
    return all(passed)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(report: Report) -> str:
    *errors, zeroth, first = (measured for _, measured, _, _ in report.checks())
    if report.gradient.alpha is None:
        errors.insert(2, "")
    result = "pass" if report.passed else "FAIL"
    columns = "  ".join(f"{error:>9}" for error in errors)
    return f"{report.method:<17}  {columns}  {zeroth:>7} {first:>7}  {result}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pfde", description="Differentiate through fractional and ordinary equations."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    command = commands.add_parser(
        "verify",
        help="verify the gradients of every method; exit code 1 when one is wrong",
        description="Verify the discrete adjoint of every method on a small model: against autograd through the same "
        "steps, by the tangent-adjoint dot product, and by Taylor remainders. Exit code 1 when a gradient is wrong.",
    )
    command.add_argument(
        "--method", action="append", choices=_NAMES, metavar="NAME", help=f"one of {', '.join(_NAMES)}; "
        "may be repeated (default: all)"
    )  # fmt: skip
    command.add_argument(
        "--store", choices=get_args(Store), default="state", help="what is kept (default: %(default)s)"
    )
    command.add_argument("--dtype", choices=_DTYPES, default="float64", help="of the model (default: %(default)s)")
    command.add_argument("--steps", type=int, default=32, help="number of steps (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of model and functional (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        command.error(f"--steps must be at least 1: got {given.steps}")
    dtype = _DTYPES[given.dtype]
    passed = run(given.method or _NAMES, store=given.store, steps=given.steps, seed=given.seed, dtype=dtype)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
