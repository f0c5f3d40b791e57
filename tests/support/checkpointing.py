"""Solves under checkpoint schedules, and what they are compared with."""

import functools

import checkpoint_schedules as cs
import torch
from torch import nn

import pfde
from pfde.caputo.schemes import METHODS

RTOL = 1e-12
N = 45
UNIFORM = torch.linspace(0.2, 1.4, N + 1, dtype=torch.float64)
EXPLICIT = [name for name, scheme in METHODS.items() if not scheme.implicit]
IMPLICIT = [name for name, scheme in METHODS.items() if scheme.implicit]
NONUNIFORM = [name for name, scheme in METHODS.items() if scheme.rules]
HISTORIES = {
    "exact": pfde.Exact(),
    "exponentials": pfde.SumOfExponentials(1e-6),
    "short": pfde.ShortMemory(0.4),
}
BOUNDED = ["exponentials", "short"]
OURS = {
    "revolve, every step": lambda: pfde.Revolve(3, leaf=1),
    "revolve": lambda: pfde.Revolve(2, leaf=7),
    "revolve, a block": lambda: pfde.Revolve(2, leaf=32),
    "revolve on disk": lambda: pfde.Revolve(2, on_disk=2, leaf=5),
    "revolve by memory": lambda: pfde.Revolve(memory="6kB"),
    "online": lambda: pfde.Online(3, leaf=4),
    "online on disk": lambda: pfde.Online(1, on_disk=2, leaf=4),
}
FOREIGN = {
    "multistage": lambda: cs.MultistageCheckpointSchedule(N, 3, 2),
    "h-revolve": lambda: cs.HRevolve(N, 2, 3),
    "disk revolve": lambda: cs.DiskRevolve(N, 3),
    "mixed": lambda: cs.MixedCheckpointSchedule(N, 4, storage=cs.StorageType.RAM),
    "mixed on disk": lambda: cs.MixedCheckpointSchedule(N, 4),
    "two level": lambda: cs.TwoLevelCheckpointSchedule(7, 2),
    "memory": lambda: cs.SingleMemoryStorageSchedule(),
    "disk": lambda: cs.SingleDiskStorageSchedule(),
    "disk, once": lambda: cs.SingleDiskStorageSchedule(move_data=True),
}
SCHEDULES = OURS | FOREIGN


def left_in(folder):
    """The folders of snapshots (others use the system's folder for temporary files, too)."""
    return sorted(path.name for path in folder.glob("pfde-*"))


class Field(nn.Module):
    """f = b sin(a y) + t, on three components; calls hook(calls) first."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5, -0.3, 0.8], dtype=dtype))
        self.b = nn.Parameter(torch.tensor(1.3, dtype=dtype))
        self.calls, self.hook = 0, lambda calls: None

    def forward(self, t, y):
        self.calls += 1
        self.hook(self.calls)
        return self.b * torch.sin(self.a * y) + t


class Solve:
    """One solve that awaits its backward pass."""

    def __init__(
        self, method, history=None, gradient=None, *, t=UNIFORM, alpha=0.6, dtype=torch.float64, f=None, **keywords
    ):
        self.f = f or Field(dtype)
        self.y0 = torch.tensor([1.0, 2.0, -0.5], dtype=dtype, requires_grad=True)
        self.alpha = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
        if isinstance(history, str):
            history = HISTORIES[history]
        if METHODS[method].implicit:
            keywords = {"options": {"fde_jacobian": "blocks"}} | keywords  # no component is in the f of another
        solution = pfde.solve(
            self.f, self.y0, t, self.alpha, method=method, history=history, gradient=gradient, **keywords
        )
        self.y, self.stats = solution.y, solution.stats

    def backward(self, retain_graph=False):
        """y and the gradient of <v, y>; not all outputs count alike, and some not at all."""
        v = torch.cos(torch.arange(self.y.numel(), dtype=self.y.dtype)).reshape(self.y.shape)
        v[1::3] = 0
        inputs = (self.y0, self.f.a, self.f.b, self.alpha)
        bars = torch.autograd.grad((v * self.y).sum(), inputs, retain_graph=retain_graph)
        return dict(zip(("y", "y0", "a", "b", "alpha"), [self.y.detach(), *bars], strict=True))


def gradients(*arguments, **keywords):
    return Solve(*arguments, **keywords).backward()


@functools.cache
def store_all(method, history):
    """The reference, itself compared with autograd through the steps."""
    found = gradients(method, history, pfde.Discrete())
    assert_close(found, gradients(method, history, pfde.Backprop()))
    return found


def assert_close(found, expected, rtol=RTOL):
    for name, x in expected.items():
        error = float((found[name] - x).norm() / (x.norm() or 1.0))
        assert error <= rtol, f"{name}: relative error {error:.2e}, allowed {rtol:.0e}"


def assert_same(found, expected, what=""):
    for name, x in expected.items():
        y = found[name]
        assert torch.equal(y, x), f"{what}: {name} differs by {float((y - x).abs().max()):.1e}, should be bitwise equal"


def discrete(schedule, **keywords):
    return pfde.Discrete(schedule=schedule, **keywords)
