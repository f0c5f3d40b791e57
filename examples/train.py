"""Image classification with a fractional neural block, trained data-parallel under MPI.

    mpiexec -n 4 python examples/train.py                        # scikit-learn's digits
    mpiexec -n 4 python examples/train.py --resume --epochs 30   # go on from its checkpoint
    python examples/train.py --data mnist --method trapezoid -snes_monitor

The model is  image -> convolutional stem -> y(0),   D^alpha y = f(y, theta) on [0, 1],   y(1) -> linear head -> logits,
where D^alpha is the Caputo derivative, f two small convolutions, and the order alpha is learned together with theta.

Every rank holds the whole model and integrates its share of each batch; one sum over the ranks per step makes the
gradient of the batch's mean loss.  The shuffle depends on the seed and the epoch only, and nothing in the model
couples the images of a batch, so the number of ranks changes the result by rounding and by nothing else.

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
from matplotlib.figure import Figure
from mpi4py import MPI
from torch import Tensor, nn
from tqdm import tqdm

import _data
import pfde  # and no more of it: pfde.nn, imported at its first use, starts PETSc, which main() does with its options

METHODS = ("euler", "pece", "beuler", "trapezoid", "gl", "l1", "bdf2")
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
        self.block = pfde.nn.FDEBlock(
            VectorField(channels),
            alpha=args.alpha,
            learn_alpha=True,
            t=(0.0, 1.0),
            method=args.method,
            step_size=args.step_size,
            gradient=gradient,
        )
        self.head = nn.Linear(channels * side * side, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        y0 = self.stem(pixels.unsqueeze(1))
        return self.head(self.block(y0).flatten(1))


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
    alphas: list[float] = field(default_factory=list)
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
                training.alphas.append(training.model.block.alpha.item())
                bar.set_postfix(loss=f"{loss:.4f}", alpha=f"{training.alphas[-1]:.4f}", refresh=False)
                bar.update()
        if training.step == len(batches):
            loss, accuracy = training.loss_sum / len(images), training.hits / len(images)
            training.epoch_losses.append(loss)
            training.epoch_ends.append(len(training.losses))
            training.epoch, training.step, training.loss_sum, training.hits = training.epoch + 1, 0, 0.0, 0
            say(comm, f"{title}  loss {loss:.4f}  accuracy {accuracy:.2%}  alpha {training.alphas[-1]:.4f}")
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

    In float64 and over all parameters, alpha included; each rank compares its share, the largest counts. Collective.
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
    """The curves of the loss and of the order."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps = range(1, len(training.losses) + 1)
    top.semilogy(steps, training.losses, color="tab:blue", linewidth=0.7, alpha=0.4, label="batch")
    top.semilogy(training.epoch_ends, training.epoch_losses, "o-", color="tab:blue", markersize=3, label="epoch")
    top.set_ylabel("mean loss")
    top.legend()
    bottom.plot(steps, training.alphas, color="tab:orange")
    bottom.set(xlabel="step", ylabel="order alpha")
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
    add("--alpha", type=float, default=0.7, help="the order at the start, in (0, 1) [0.7]")
    add("--method", choices=METHODS, default="pece", help="of the FDE; all but euler and pece are implicit [pece]")
    add("--step-size", type=float, default=0.1, help="of the FDE on [0, 1] [0.1]")
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
    return args, rest


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
    # The order is one number that every image depends on; with a longer step it keeps up with the thousands of weights.
    order = model.block.raw_alpha
    weights = [parameter for parameter in model.parameters() if parameter is not order]
    optimizer = torch.optim.Adam([{"params": weights}, {"params": [order], "lr": 5 * args.lr}], lr=args.lr)
    training = Training(model, optimizer)
    training.load_state_dict(checkpoint or comm.bcast(training.state_dict()))  # the same start on all ranks
    size = sum(parameter.numel() for parameter in model.parameters())
    say(comm, f"{args.data}: {len(images)} images; {size} parameters; {args.method}; {comm.size} ranks")

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
    say(comm, f"learned alpha: {model.block.alpha.item():.4f}")
    say(comm, f"memory peak: {peak:.0f} MiB (the largest of the ranks)")
    say(comm, f"adjoint against autograd: {error:.1e}")
    say(comm, f"written: {args.out / 'checkpoint.pt'}, {args.out / 'train.png'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except pfde.PeerError:  # the rank where the error happened has reported it
        sys.exit(1)
