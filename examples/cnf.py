"""Continuous normalising flows: densities learned by an ODE, and what four ways to its gradient cost.

    python examples/cnf.py            # two minutes on one core
    python examples/cnf.py --quick    # half a minute, rougher densities
    python examples/cnf.py --data checkerboard pinwheel

The flow carries a sample x of the data from t = 0 to a sample of the standard normal at t = 1, and the logarithm of its
density with it (R. T. Q. Chen et al., NeurIPS 2018, arXiv:1806.07366; W. Grathwohl et al., FFJORD, arXiv:1810.01367):

    x' = f(t, x),   l' = tr(df/dx),   x(0) = x,  l(0) = 0:        log p(x) = log N(x(1); 0, 1) + l(1).

The trace is exact in two dimensions, and for test data; training in ten dimensions estimates it by e^T (df/dx) e with
random signs e, drawn anew for each step of the optimizer (Hutchinson).  f starts at zero and the data are whitened, so
that a flow starts as the Gaussian with their mean and covariance, and what it gains over that is what it has learned.

Densities: two-dimensional ones, generated here, and MAGIC where the environment variable PFDE_DATA names a folder with
magic.npz (array x, 19020 x 10: images of gamma-ray showers in ten numbers; UCI repository).  Likelihoods are those of
samples that training has not seen, in nats, integrated adaptively: the flow's own, whatever steps it was trained with.

Then one gradient of the first flow, over the same steps of rk4, by `Discrete`, `Symplectic`, `Continuous` and
`Backprop`, each in a process of its own: CPU time, growth of the peak resident set, and the distance from Backprop's
gradient.  The script fails unless every flow beats its Gaussian by the stated margin, Discrete and Symplectic agree
with Backprop to 1e-10, Continuous does not (it discretises another equation) but is close, and the first two take at
most a third of Backprop's memory.
"""

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import pfde

GRADIENTS: dict[str, Callable[[], Any]] = {
    "Discrete": pfde.Discrete,
    "Symplectic": pfde.Symplectic,
    "Continuous": pfde.Continuous,
    "Backprop": pfde.Backprop,
}
# What a flow must gain over the Gaussian, nats a sample: about two thirds of what it does, in full and with --quick.
MARGIN = {"moons": 0.8, "pinwheel": 0.9, "checkerboard": 0.45, "magic": 3.5}
MARGIN_QUICK = {"moons": 0.4, "pinwheel": 0.5, "checkerboard": 0.2, "magic": 1.0}
MB = 1e6
# As in _data.py, which loads scikit-learn: that would take longer than a gradient, in every process that measures one.
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


# Data -----------------------------------------------------------------------------------------------------------------


def moons(size: int, seed: int) -> np.ndarray:
    """Two interlocking half circles, blurred."""
    rng = np.random.default_rng(seed)
    angle, which = np.pi * rng.random(size), rng.integers(2, size=size)
    x, y = np.where(which, 1 - np.cos(angle), np.cos(angle)), np.where(which, 0.5 - np.sin(angle), np.sin(angle))
    return 2 * (np.stack([x, y]).T + 0.08 * rng.standard_normal((size, 2)))


def pinwheel(size: int, seed: int) -> np.ndarray:
    """Five blades, each a Gaussian stretched along its radius and bent by a rotation that grows with the radius."""
    rng = np.random.default_rng(seed)
    radius, across = 1 + 0.3 * rng.standard_normal(size), 0.1 * rng.standard_normal(size)
    angle = 2 * np.pi / 5 * rng.integers(5, size=size) + 0.25 * np.exp(radius)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)]).T.reshape(-1, 2, 2)
    return 2 * (turn @ np.stack([radius, across])[..., None].transpose(1, 0, 2))[..., 0]


def checkerboard(size: int, seed: int) -> np.ndarray:
    """Uniform on the eight squares of one colour of a board of 4 x 4, side 8."""
    rng = np.random.default_rng(seed)
    column, pair = rng.integers(4, size=size), rng.integers(2, size=size)
    corner = np.stack([column, 2 * pair + column % 2])
    return (2 * (corner + rng.random((2, size))) - 4).T


GENERATED = {"moons": moons, "pinwheel": pinwheel, "checkerboard": checkerboard}


def magic() -> np.ndarray | None:
    path = Path(os.environ.get("PFDE_DATA", SHARED)) / "magic.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        x = file["x"].astype(np.float64)
    return x[np.random.default_rng(0).permutation(len(x))]


class Data:
    """Training and test samples, whitened by the Gaussian fitted to the former: x = mean + factor w."""

    def __init__(self, name: str, train: np.ndarray, test: np.ndarray) -> None:
        self.name, self.mean = name, train.mean(0)
        self.factor = np.linalg.cholesky(np.cov(train.T))
        self.raw, self.train, self.test = train, self.whiten(train), self.whiten(test)
        # MAGIC's numbers have units; to drop them, its densities are those of the numbers divided by their deviations.
        scale = train.std(0) if name == "magic" else np.ones(train.shape[1])
        self.log_det = float(np.log(np.diag(self.factor) / scale).sum())  # log p(x) = log p(w) - log_det
        self.gaussian = float(log_normal(self.test).mean()) - self.log_det

    def whiten(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.linalg.solve(self.factor, (x - self.mean).T).T).float()


def load(args: argparse.Namespace) -> list[Data]:
    data = [Data(name, GENERATED[name](20_000, args.seed), GENERATED[name](5_000, args.seed + 1)) for name in args.data]
    if (x := magic()) is None:
        print("no magic.npz in PFDE_DATA: the part in ten dimensions is left out")
    else:
        data.append(Data("magic", x[len(x) // 5 :], x[: len(x) // 5]))
    return data


def log_normal(z: Tensor) -> Tensor:
    return -(z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi)) / 2


# The flow -------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """(W x + b) g(t) + c t, g a gate in (0, 1), together with its derivative along tangents dx."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.gate = nn.Linear(1, outputs)
        self.shift = nn.Linear(1, outputs, bias=False)

    def forward(self, t: Tensor, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(self.gate(t))
        return torch.addcmul(self.shift(t), self.linear(x), gate), (dx @ self.linear.weight.T) * gate


class Flow(nn.Module):
    """(x, l) to (f(t, x), tr df/dx).  The derivative is carried along with f, so that the trace needs no autograd."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(dim, hidden), Layer(hidden, hidden), Layer(hidden, dim)])
        for parameter in (*self.layers[-1].linear.parameters(), *self.layers[-1].shift.parameters()):
            nn.init.zeros_(parameter)
        self.register_buffer("identity", torch.eye(dim).unsqueeze(1))
        # The e of the trace, (count, batch or 1, dim): the sum of e e^T over them is the identity, or is so on average.
        self.tangents = self.identity

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, _ = state
        dx, t = self.tangents, t.to(x.dtype).reshape(1)
        for layer in self.layers[:-1]:
            x, dx = layer(t, x, dx)
            x = torch.tanh(x)
            dx = dx * (1 - x * x)
        x, dx = self.layers[-1](t, x, dx)
        return x, (dx * self.tangents).sum((0, 2))

    def log_density(self, x: Tensor, tangents: Tensor | None = None, **options: Any) -> Tensor:
        """log p of each row of x; options are odeint's.  tangents: for the estimate of the trace, else exact."""
        self.tangents = self.identity if tangents is None else tangents
        t = torch.tensor([0.0, 1.0], dtype=x.dtype)
        z, log_det = pfde.odeint(self, (x, x.new_zeros(len(x))), t, **options)
        return log_normal(z[-1]) + log_det[-1]


@torch.no_grad()
def evaluate(flow: Flow, x: Tensor) -> Tensor:
    """log p of each row, by dopri5 to five digits and with the exact trace."""
    parts = [flow.log_density(part, method="dopri5", rtol=1e-5, atol=1e-5) for part in x.split(2500)]
    return torch.cat(parts)


@dataclass
class Trained:
    """A flow, and how it came to be."""

    data: Data
    flow: Flow
    likelihoods: list[float] = field(default_factory=list)  # of the batches
    test: float = math.nan


def train(data: Data, steps: int, args: argparse.Namespace) -> Trained:
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    trained = Trained(data, Flow(data.train.shape[1], args.hidden))
    flow = trained.flow
    optimizer = torch.optim.Adam(flow.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.1)
    with progress_bar(data.name, steps) as bar:
        for _ in range(steps):
            x = data.train[torch.randint(len(data.train), (args.batch_size,), generator=generator)]
            signs = None
            if data.name == "magic":
                signs = 2.0 * torch.randint(2, (1, *x.shape), generator=generator) - 1
            optimizer.zero_grad()
            log_p = flow.log_density(x, signs, method="rk4", step_size=0.2, gradient=pfde.Discrete()).mean()
            (-log_p).backward()
            optimizer.step()
            schedule.step()
            trained.likelihoods.append(log_p.item() - data.log_det)
            bar.set_postfix(nats=f"{trained.likelihoods[-1]:.3f}", refresh=False)
            bar.update()
    trained.test = float(evaluate(flow, data.test).mean()) - data.log_det
    print(f"{data.name:<13} log-likelihood {trained.test:>8.3f}, Gaussian {data.gaussian:>8.3f}", flush=True)
    return trained


# One gradient, and what it takes --------------------------------------------------------------------------------------


@dataclass
class Cost:
    """Of one gradient: CPU seconds, growth of the peak memory in bytes, the gradient itself."""

    cpu: float
    bytes: int
    gradient: Tensor


def measure(name: str, folder: Path) -> None:
    """Write to the folder, where the flow and the samples are, what the gradient `name` costs: all a process does."""
    torch.set_num_threads(1)
    given = torch.load(folder / "given.pt", weights_only=True)
    x, step_size = given["x"].double(), given["step_size"]
    flow = Flow(x.shape[1], given["hidden"]).double()
    flow.load_state_dict({key: value.double() for key, value in given["flow"].items()})

    def gradient(x: Tensor, step_size: float) -> Tensor:
        flow.zero_grad(set_to_none=True)
        log_p = flow.log_density(x, method="rk4", step_size=step_size, gradient=GRADIENTS[name]()).mean()
        log_p.backward()
        return torch.cat([parameter.grad.flatten() for parameter in flow.parameters()])

    gradient(x[:8], 0.5)  # loads what is loaded at the first use
    before, start = peak_memory(), time.process_time()
    found = gradient(x, step_size)
    cpu, grown = time.process_time() - start, peak_memory() - before
    torch.save({"cpu": cpu, "bytes": grown, "gradient": found}, folder / f"{name}.pt")


def costs(trained: Trained, args: argparse.Namespace, folder: Path) -> dict[str, Cost]:
    given = {
        "flow": trained.flow.state_dict(),
        "hidden": args.hidden,
        "x": trained.data.test[: args.samples],
        "step_size": 1 / args.intervals,
    }
    torch.save(given, folder / "given.pt")
    for name in tqdm(GRADIENTS, desc="gradients", ncols=90, leave=False):
        command = [sys.executable, __file__, "--work", json.dumps([name, str(folder)])]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return {name: Cost(**torch.load(folder / f"{name}.pt", weights_only=True)) for name in GRADIENTS}


def peak_memory() -> int:
    """The peak of this process's resident set, bytes."""
    try:  # Linux; ru_maxrss there includes the parent's
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def errors(costs: dict[str, Cost]) -> dict[str, float]:
    """The distances of the gradients from Backprop's, relative to its size."""
    exact = costs["Backprop"].gradient
    return {name: float((cost.gradient - exact).norm() / exact.norm()) for name, cost in costs.items()}


# Picture, terminal ----------------------------------------------------------------------------------------------------


def draw(flows: list[Trained], costs: dict[str, Cost], path: Path) -> None:
    """Data and densities; below them the training and the costs of a gradient."""
    figure = Figure(figsize=(15, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    plane = [trained for trained in flows if trained.data.raw.shape[1] == 2]
    for i, axes in enumerate(top.subplots(1, 2 * len(plane)).reshape(-1, 2)):
        draw_density(plane[i], *axes)
    curves, *bars = bottom.subplots(1, 4)
    for trained, colour in zip(flows, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=False):
        gains = np.array(trained.likelihoods) - trained.data.gaussian
        smooth = np.convolve(gains, np.ones(20) / 20, mode="valid")
        curves.plot(np.arange(len(smooth)) + 20, smooth, color=colour, label=trained.data.name)
        curves.plot(len(gains), trained.test - trained.data.gaussian, "o", color=colour)
    curves.axhline(0, color="tab:gray", linestyle="--", label="Gaussian")
    curves.set(title="gain over the Gaussian, nats (dot: test data)", xlabel="step")
    curves.set_ylim(bottom=-1)
    curves.legend(loc="center right")
    colours = ["tab:blue", "tab:green", "tab:orange", "tab:red"]
    found = errors(costs)
    columns = {
        "peak memory of one gradient, MB": [cost.bytes / MB for cost in costs.values()],
        "CPU time of one gradient, s": [cost.cpu for cost in costs.values()],
        "relative distance from Backprop": [max(found[name], 1e-17) for name in costs],
    }
    for ax, (title, values) in zip(bars, columns.items(), strict=True):
        ax.bar(list(costs), values, color=colours)
        ax.set_title(title)
    bars[-1].set_yscale("log")
    bars[-1].set_ylim(1e-17, 1)
    figure.savefig(path, dpi=130)


def draw_density(trained: Trained, left: Any, right: Any) -> None:
    """The samples' histogram, and the learned density on the same scale."""
    data, points = trained.data, 120
    low, high = data.raw.min(0) - 0.5, data.raw.max(0) + 0.5
    x, y = (np.linspace(low[i], high[i], points) for i in range(2))
    mesh = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    density = (evaluate(trained.flow, data.whiten(mesh)) - data.log_det).exp().view(points, points)
    counts, *edges = np.histogram2d(*data.raw.T, bins=80, range=np.stack([low, high]).T, density=True)
    scale = {"vmin": 0, "vmax": float(np.quantile(counts[counts > 0], 0.98)), "cmap": "viridis"}
    left.pcolormesh(*edges, counts.T, **scale)
    right.pcolormesh(x, y, density, **scale)
    left.set_title(f"{data.name}: samples")
    right.set_title(f"learned density, {trained.test:.2f} nats")
    for ax in (left, right):
        ax.set_aspect("equal")
        ax.set_axis_off()


def progress_bar(title: str, total: int) -> tqdm:
    return tqdm(desc=title, total=total, unit="step", mininterval=0.5, ncols=90, leave=False)


# The program ----------------------------------------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", nargs="+", choices=GENERATED, default=["pinwheel", "moons"], help="generated ones [pinwheel moons]")
    add("--steps", type=int, default=600, help="of Adam, for each of them [600]")
    add("--magic-steps", type=int, default=400, help="of Adam, for MAGIC [400]")
    add("--batch-size", type=int, default=256, help="samples a step [256]")
    add("--hidden", type=int, default=64, help="the width of f's two hidden layers [64]")
    add("--lr", type=float, default=1e-2, help="Adam's largest learning rate [0.01]")
    add("--samples", type=int, default=256, help="in the gradient that is measured [256]")
    add("--intervals", type=int, default=40, help="steps of rk4 in it [40]")
    add("--seed", type=int, default=0, help="of samples, first parameters and batches [0]")
    add("--quick", action="store_true", help="one generated density, fewer steps, smaller margins")
    add("--out", type=Path, default=Path("results"), help="the folder of cnf.png [results]")
    add("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.data, args.steps, args.magic_steps = args.data[:1], 150, 50
    for name in ("steps", "magic_steps", "batch_size", "hidden", "samples", "intervals"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more: got {getattr(args, name)}")
    return args


def main() -> int:
    args = parse_options()
    if args.work:
        name, folder = json.loads(args.work)
        measure(name, Path(folder))
        return 0
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    flows = [train(data, args.magic_steps if data.name == "magic" else args.steps, args) for data in load(args)]
    with tempfile.TemporaryDirectory() as folder:
        found = costs(flows[0], args, Path(folder))
    print_table(found)
    draw(flows, found, args.out / "cnf.png")
    verdict = report(flows, found, args)
    print(f"written: {args.out / 'cnf.png'}")
    return 0 if verdict else 1


def print_table(costs: dict[str, Cost]) -> None:
    print(f"\n{'gradient':<11} {'peak MB':>8} {'CPU s':>7} {'distance from Backprop':>23}")
    for name, error in errors(costs).items():
        print(f"{name:<11} {costs[name].bytes / MB:>8.1f} {costs[name].cpu:>7.2f} {error:>23.1e}")
    print()


def report(flows: list[Trained], costs: dict[str, Cost], args: argparse.Namespace) -> bool:
    """Check what the example claims, line by line."""
    margins = MARGIN_QUICK if args.quick else MARGIN
    checks = {}
    for trained in flows:
        name, gain = trained.data.name, trained.test - trained.data.gaussian
        checks[f"{name}: {gain:.3f} nats above the Gaussian, at least {margins[name]:g}"] = gain > margins[name]
    distance, most = errors(costs), costs["Backprop"].bytes
    for name in ("Discrete", "Symplectic"):
        checks[f"{name}: Backprop's gradient to {distance[name]:.1e}, at most 1e-10"] = distance[name] < 1e-10
        text = f"{name}: {costs[name].bytes / MB:.1f} MB, at most a third of Backprop's {most / MB:.1f}"
        checks[text] = 3 * costs[name].bytes < most
    text = f"Continuous: Backprop's gradient to {distance['Continuous']:.1e}, between 1e-10 and 1e-2"
    checks[text] = 1e-10 < distance["Continuous"] < 1e-2
    for text, passed in checks.items():
        print(f"{'ok' if passed else 'FAILED'}: {text}")
    return all(checks.values())


if __name__ == "__main__":
    sys.exit(main())
