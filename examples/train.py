"""Image classification with a fractional neural block, trained data-parallel under MPI.

    mpiexec -n 4 python examples/train.py                        # scikit-learn's digits
    mpiexec -n 4 python examples/train.py --resume --epochs 30   # go on from its checkpoint
    python examples/train.py --data mnist --method trapezoid -snes_monitor
    python examples/train.py --alpha 1 --method dopri5 --rtol 1e-3   # a neural ODE, to compare with

The model is  image -> convolutional stem -> y(0),   D^alpha y = f(y, theta) on [0, 1],   y(1) -> linear head -> logits,
where D^alpha is the Caputo derivative, f two small convolutions, and the order alpha is learned together with theta.
With --alpha 1 the equation is y' = f(y, theta), alpha is not learned, and --method is one of ordinary equations.

Every rank holds the whole model and integrates its share of each batch; one sum over the ranks per step makes the
gradient of the batch's mean loss.  The shuffle depends on the seed and the epoch only, and nothing in the model
couples the images of a batch, so the number of ranks changes the result by rounding and by nothing else. Only adaptive
steps do couple them: a rank chooses them for its share, and the number of ranks changes the result a little.

Options with two dashes are this script's; those with one dash are PETSc's (-ts_monitor, -log_view, ...).
"""

import argparse
import os
import resource
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import petsc4py
import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import Tensor, nn
from tqdm import tqdm

import _data
import pfde  # and not pfde.nn, which, imported at its first use, starts PETSc: main() does that with its options
from pfde.one_step.methods import METHODS as ODE_METHODS

FDE_METHODS = ("euler", "pece", "beuler", "trapezoid", "gl", "l1", "bdf2")
ADAPTIVE = tuple(name for name in ODE_METHODS if ODE_METHODS[name].adaptive)
MAY_CHANGE_ON_RESUME = ("epochs", "out", "resume")


# The model ------------------------------------------------------------------------------------------------------------


class VectorField(nn.Module):
    """f(t, y) of the block: convolution, tanh, convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(y)))


class Mixing(nn.Module):
    """What ark2, ark3 and ark4, which take f in two parts, treat as its stiff part: a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.linear(y)


def make_block(channels: int, args: argparse.Namespace, gradient: Any) -> nn.Module:
    """The map y(0) -> y(1): of an ordinary equation where alpha is 1, else of a fractional one with alpha learned."""
    f = VectorField(channels)
    if args.alpha < 1:
        return pfde.nn.FDEBlock(
            f, alpha=args.alpha, learn_alpha=True, method=args.method, step_size=args.step_size, gradient=gradient
        )
    tolerances = {} if args.rtol is None else {"rtol": args.rtol, "atol": args.atol}
    return pfde.nn.ODEBlock(
        pfde.Split(Mixing(channels), f) if ODE_METHODS[args.method].split else f,
        method=args.method,
        step_size=args.step_size,
        gradient=gradient,
        **tolerances,
    )


class Classifier(nn.Module):
    """Images (count, side, side) to logits (count, 10)."""

    def __init__(self, side: int, args: argparse.Namespace, gradient: Any) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        while side > 7:  # halve the sides until the block's states are small: 8 -> 4, 28 -> 14 -> 7
            # GroupNorm, not BatchNorm: statistics of a batch would depend on how the ranks share it.
            layers += [nn.Conv2d(channels, args.channels, 3, stride=2, padding=1), nn.GroupNorm(2, args.channels)]
            layers += [nn.ReLU()]
            channels, side = args.channels, (side + 1) // 2
        self.stem = nn.Sequential(*layers)
        self.block = make_block(channels, args, gradient)
        self.head = nn.Linear(channels * side * side, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        y0 = self.stem(pixels.unsqueeze(1))
        return self.head(self.block(y0).flatten(1))

    @property
    def alpha(self) -> float | None:
        """The learned order as it is now; None for an ordinary equation, where it is 1."""
        return self.block.alpha.item() if isinstance(self.block, pfde.nn.FDEBlock) else None


# Training -------------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """Everything that a checkpoint keeps: the model, the optimizer and how far the training is."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # epochs completed
    step: int = 0  # steps completed in the current one, and what they add up to:
    loss_sum: float = 0.0
    hits: int = 0
    losses: list[float] = field(default_factory=list)  # after every step since the first
    alphas: list[float] = field(default_factory=list)  # where it is learned
    epoch_losses: list[float] = field(default_factory=list)
    epoch_ends: list[int] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {k: v.state_dict() if k in ("model", "optimizer") else v for k, v in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if name in ("model", "optimizer"):
                getattr(self, name).load_state_dict(value)
            else:
                setattr(self, name, value)


def make_optimizer(model: Classifier, lr: float) -> torch.optim.Optimizer:
    """Adam, with a longer step for the order where it is learned."""
    weights = dict(model.named_parameters())
    order = weights.pop("block.raw_alpha", None)
    groups: list[dict[str, Any]] = [{"params": list(weights.values())}]
    if order is not None:  # one number that every image depends on: so it keeps up with the thousands of weights
        groups.append({"params": [order], "lr": 5 * lr})
    return torch.optim.Adam(groups, lr=lr)


class StopRequest:
    """`received` turns true with SIGINT (Ctrl-C) or SIGTERM; whoever trains finishes the step and looks."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.received = True


def backward(model: Classifier, batch: _data.Images, stop: bool, comm: MPI.Comm) -> tuple[float, int, bool]:
    """Leave the gradient of the batch's mean loss in the parameters; return the loss, the hits, and whether to stop.

    Collective: one sum over the ranks carries the gradients, the loss, the hits and every rank's wish to stop.
    """
    share = batch[comm.rank :: comm.size]  # empty on some ranks when the batch is small
    loss = hits = 0.0
    model.zero_grad(set_to_none=True)
    with pfde.raise_together(comm):  # an error on one rank becomes an error on all, not a hang in Allreduce
        if len(share):
            logits = model(share.pixels)
            part = F.cross_entropy(logits, share.labels, reduction="sum") / len(batch)
            part.backward()
            loss, hits = part.item(), count_hits(logits, share.labels)
    parameters = list(model.parameters())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    # In float64 for a float32 model too: the rounding of the sum depends on the number of ranks.
    scalars = torch.tensor([loss, hits, stop], dtype=torch.float64)
    buffer = torch.cat([gradient.flatten().double() for gradient in gradients] + [scalars])
    comm.Allreduce(MPI.IN_PLACE, buffer.numpy())
    *sums, scalars = buffer.split([p.numel() for p in parameters] + [3])
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
    loss, hits, stops = scalars.tolist()
    return loss, int(hits), stops > 0


def train(
    training: Training, images: _data.Images, args: argparse.Namespace, request: StopRequest, comm: MPI.Comm
) -> bool:
    """Train on to the end of epoch args.epochs, or until some rank is asked to stop; return whether it was. Collective.

    A checkpoint is written after every epoch and on stopping.
    """
    stop = False
    while training.epoch < args.epochs and not stop:
        # The shuffle is a function of seed and epoch: the same on every rank, and the same again after --resume.
        generator = torch.Generator().manual_seed(1_000_003 * args.seed + training.epoch)
        batches = torch.randperm(len(images), generator=generator).split(args.batch_size)
        title = f"epoch {training.epoch + 1}/{args.epochs}"
        with progress_bar(title, len(batches), training.step, comm) as bar:
            while training.step < len(batches) and not stop:
                batch = images[batches[training.step]]
                loss, hits, stop = backward(training.model, batch, request.received, comm)
                training.optimizer.step()
                training.step += 1
                training.loss_sum += loss * len(batch)
                training.hits += hits
                training.losses.append(loss)
                shown = {"loss": f"{loss:.4f}"}
                if (alpha := training.model.alpha) is not None:
                    training.alphas.append(alpha)
                    shown["alpha"] = f"{alpha:.4f}"
                bar.set_postfix(shown, refresh=False)
                bar.update()
        if training.step == len(batches):
            loss, accuracy = training.loss_sum / len(images), training.hits / len(images)
            training.epoch_losses.append(loss)
            training.epoch_ends.append(len(training.losses))
            training.epoch, training.step, training.loss_sum, training.hits = training.epoch + 1, 0, 0.0, 0
            order = f"  alpha {training.alphas[-1]:.4f}" if training.alphas else ""
            say(comm, f"{title}  loss {loss:.4f}  accuracy {accuracy:.2%}{order}")
        save_checkpoint(training, args, comm)
    return stop


def count_hits(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(1) == labels).sum())


@torch.no_grad()
def accuracy_on(images: _data.Images, model: Classifier, comm: MPI.Comm) -> float:
    """The fraction of the images whose largest logit is at their label. Collective."""
    share = images[comm.rank :: comm.size]
    hits = 0
    with pfde.raise_together(comm):
        for part in torch.arange(len(share)).split(256):
            hits += count_hits(model(share[part].pixels), share[part].labels)
    return comm.allreduce(hits) / len(images)


def adjoint_error(batch: _data.Images, model: Classifier, args: argparse.Namespace, comm: MPI.Comm) -> float:
    """How far the discrete adjoint's gradient is from autograd's through the same steps, relative to its size.

    In float64, over all parameters and a learned alpha; each rank compares its share, the largest counts. Collective.
    """
    share = batch[comm.rank :: comm.size]
    error = 0.0
    with pfde.raise_together(comm):
        if len(share):
            gradients = []
            for gradient in (pfde.Discrete(), pfde.Backprop()):
                twin = Classifier(share.pixels.shape[-1], args, gradient).double()
                twin.load_state_dict(model.state_dict())
                F.cross_entropy(twin(share.pixels.double()), share.labels).backward()
                gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
            adjoint, autograd = gradients
            error = float((adjoint - autograd).norm() / autograd.norm())
    return comm.allreduce(error, MPI.MAX)


# Checkpoint, picture, terminal ----------------------------------------------------------------------------------------


def save_checkpoint(training: Training, args: argparse.Namespace, comm: MPI.Comm) -> None:
    """Write OUT/checkpoint.pt on rank 0; an interrupted write leaves the former one. Collective."""
    with pfde.raise_together(comm):
        if comm.rank == 0:
            options = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE_ON_RESUME}
            partial = args.out / "checkpoint.pt.partial"
            with open(partial, "wb") as file:
                torch.save({"options": options, "training": training.state_dict()}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, args.out / "checkpoint.pt")


def load_checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    """The state in OUT/checkpoint.pt; refused when other options made it."""
    path = args.out / "checkpoint.pt"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path} to resume from: run without --resume first, or name its --out")
    content = torch.load(path, weights_only=True)
    for name, value in content["options"].items():
        if getattr(args, name) != value:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{path} was made with {option} {value}, not {getattr(args, name)}: resume with {value}")
    return content["training"]


def draw(training: Training, path: Path) -> None:
    """The curves of the loss and, where it is learned, of the order."""
    from matplotlib.figure import Figure  # here, since rank 0 alone draws: the others start sooner

    figure = Figure(figsize=(7, 5), layout="constrained")
    top, *below = figure.subplots(2 if training.alphas else 1, 1, sharex=True, squeeze=False)[:, 0]
    steps = range(1, len(training.losses) + 1)
    top.semilogy(steps, training.losses, color="tab:blue", linewidth=0.7, alpha=0.4, label="batch")
    top.semilogy(training.epoch_ends, training.epoch_losses, "o-", color="tab:blue", markersize=3, label="epoch")
    top.set_ylabel("mean loss")
    top.legend()
    for bottom in below:
        bottom.plot(steps, training.alphas, color="tab:orange")
        bottom.set_ylabel("order alpha")
    figure.axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=150)


def progress_bar(title: str, total: int, done: int, comm: MPI.Comm) -> tqdm:
    """A bar on rank 0; on stdout like the lines that follow it, for mpiexec may reorder two streams."""
    return tqdm(
        desc=title,
        total=total,
        initial=done,
        unit="step",
        file=sys.stdout,
        mininterval=0.25,
        ncols=90,  # under mpiexec there is no terminal to ask
        leave=False,
        disable=comm.rank > 0,
    )


def say(comm: MPI.Comm, line: str) -> None:
    if comm.rank == 0:
        print(line, flush=True)


# The program ----------------------------------------------------------------------------------------------------------


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and the words that are PETSc's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False
    )
    add = parser.add_argument
    add("--data", choices=("digits", "mnist"), default="digits", help="mnist: mnist10k.npz in $PFDE_DATA [digits]")
    add("--epochs", type=int, default=15, help="in all, those before --resume included [15]")
    add("--batch-size", type=int, default=32, help="images per step, over all ranks [32]")
    add("--lr", type=float, default=3e-3, help="Adam's learning rate [0.003]")
    add("--alpha", type=float, default=0.7, help="the order at the start, in (0, 1); or 1, not learned [0.7]")
    add(
        "--method",
        choices=dict.fromkeys((*FDE_METHODS, *ODE_METHODS)),
        metavar="NAME",
        help=f"of the FDE: {', '.join(FDE_METHODS)}; all but euler and pece are implicit [pece]. "
        f"With --alpha 1, of the ODE: {', '.join(ODE_METHODS)}; docs/odes.md tells which are implicit [dopri5]",
    )
    add("--step-size", type=float, help=f"on [0, 1] [0.1; adaptive steps for {', '.join(ADAPTIVE)} with --alpha 1]")
    add("--rtol", type=float, help="relative tolerance of adaptive steps [0.001]")
    add("--atol", type=float, help="absolute tolerance of adaptive steps [0.0001]")
    add("--channels", type=int, default=16, help="of stem and block; an even number [16]")
    add("--dtype", choices=("float32", "float64"), default="float32", help="of model and data [float32]")
    add("--seed", type=int, default=0, help="of the first parameters and the shuffles [0]")
    add("--limit", type=int, help="use so many images only, for a quick try")
    add("--out", type=Path, default=Path("results"), help="the folder of checkpoint.pt and train.png [results]")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt, to the bit as if never stopped")
    add("--help", action="help", help="this text; so does -h (-help is PETSc's)")
    args, rest = parser.parse_known_args(["--help" if word == "-h" else word for word in sys.argv[1:]])
    if rest and (rest[0][0] != "-" or any(word.startswith("--") for word in rest)):
        parser.error(f"unknown: {' '.join(rest)} (PETSc's options have one dash)")
    for name in ("epochs", "batch_size", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more: got {value}")
    settle_block(args, parser)
    return args, rest


def settle_block(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what does not go with the order or the method, and fill in what depends on them."""
    for name in ("alpha", "step_size", "rtol", "atol"):
        if (value := getattr(args, name)) is not None and not 0 < value <= 1:
            parser.error(f"--{name.replace('_', '-')} must be in (0, 1]: got {value:g}")
    if args.method is None:
        args.method = "dopri5" if args.alpha == 1 else "pece"
    elif args.alpha == 1 and args.method not in ODE_METHODS:
        parser.error(
            f"--alpha 1 is an ordinary equation, which --method {args.method} is not for: choose one of "
            f"{', '.join(ODE_METHODS)}, or start from an --alpha below 1"
        )
    elif args.alpha < 1 and args.method not in FDE_METHODS:
        parser.error(
            f"--method {args.method} is for ordinary equations: got --alpha {args.alpha:g}; add --alpha 1, or choose "
            f"one of {', '.join(FDE_METHODS)}"
        )
    if args.alpha == 1 and args.method in ADAPTIVE and args.step_size is None:
        args.rtol = 1e-3 if args.rtol is None else args.rtol
        args.atol = 1e-4 if args.atol is None else args.atol
        return
    for name in ("rtol", "atol"):
        if getattr(args, name) is not None:
            parser.error(
                f"--{name} is for adaptive steps, and these are fixed: leave it out, or use --alpha 1 without "
                f"--step-size and one of the methods {', '.join(ADAPTIVE)}"
            )
    args.step_size = 0.1 if args.step_size is None else args.step_size


def describe_block(args: argparse.Namespace) -> str:
    """The method and what else the block is, for the first line of the output."""
    order = ", ordinary equation (alpha is 1, not learned)" if args.alpha == 1 else ""
    steps = f", adaptive steps with rtol {args.rtol:g}, atol {args.atol:g}" if args.step_size is None else ""
    return f"{args.method}{order}{steps}"


def main() -> int:
    args, petsc_options = parse_options()
    petsc4py.init([sys.argv[0], *petsc_options])
    comm = MPI.COMM_WORLD
    request = StopRequest()
    if comm.size > 1:
        torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    torch.set_default_dtype(getattr(torch, args.dtype))

    found = None  # rank 0 reads the files and tells the others
    try:
        with pfde.raise_together(comm):
            if comm.rank == 0:
                args.out.mkdir(parents=True, exist_ok=True)
                data = _data.load(args.data, args.limit)
                found = data, load_checkpoint(args) if args.resume else None
    except (OSError, ValueError) as error:  # a wrong option or a missing file: a message does
        sys.exit(f"train.py: error: {error}")
    (images, test_images), checkpoint = comm.bcast(found)

    model = Classifier(images.pixels.shape[-1], args, pfde.Discrete())
    training = Training(model, make_optimizer(model, args.lr))
    training.load_state_dict(checkpoint or comm.bcast(training.state_dict()))  # the same start on all ranks
    size = sum(parameter.numel() for parameter in model.parameters())
    say(comm, f"{args.data}: {len(images)} images; {size} parameters; {describe_block(args)}; {comm.size} ranks")

    if train(training, images, args, request, comm):
        say(comm, f"stopped in epoch {training.epoch + 1} after {training.step} steps: --resume goes on from there")
        return 130

    accuracy = accuracy_on(test_images, model, comm)
    error = adjoint_error(images[: args.batch_size], model, args, comm)
    peak = comm.allreduce(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, MPI.MAX) / 1024
    with pfde.raise_together(comm):
        if comm.rank == 0:
            draw(training, args.out / "train.png")
    say(comm, f"test accuracy: {accuracy:.2%} of {len(test_images)} images")
    if model.alpha is not None:
        say(comm, f"learned alpha: {model.alpha:.4f}")
    say(comm, f"memory peak: {peak:.0f} MiB (the largest of the ranks)")
    say(comm, f"adjoint against autograd: {error:.1e}")
    say(comm, f"written: {args.out / 'checkpoint.pt'}, {args.out / 'train.png'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except pfde.PeerError:  # the rank where the error happened has reported it
        sys.exit(1)
