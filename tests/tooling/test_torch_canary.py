"""What pfde uses of torch without torch's promise: each such thing has a canary here, which dies before a user does.

A new version of torch may change a private name without notice. Where there is one, a public way is better; where there
is none the use is found by the search below, and the test fails until what pfde relies on is written down as a canary.
A canary that fails names the places in pfde to look at.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import Variable, forward_ad

ROOT = Path(__file__).resolve().parents[2]

Uses = dict[str, list[str]]  # name of what is used: files and lines
# Private by their spelling only: the documented methods of a named tuple.
PROMISED = {"_replace", "_asdict", "_fields", "_make"}
# What pfde calls objects of its own classes where it asks them for what is private to the class.
OWN = {"self", "cls", "me", "_replay"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def dotted(node: ast.expr) -> str:
    """ "a.b.c" for such an expression; "" for any other."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def private_uses(folder: Path) -> Uses:
    """All that is private and not pfde's own: torch._C..., from torch... import _x, x._version, "torch._dynamo".

    Of x._name where x is not a module only the name is known.
    """
    found: Uses = {}
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text())
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}

        def note(name: str, node: ast.AST, path: Path = path) -> None:
            found.setdefault(name, []).append(f"{path.relative_to(folder.parent)}:{node.lineno}")

        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                whole = dotted(node)
                if whole.startswith("torch.") and any(map(is_private, whole.split("."))):
                    if id(node) not in inner:  # the longest of torch, torch._C, torch._C._functorch, ...
                        note(whole, node)
                elif (
                    is_private(node.attr)
                    and node.attr not in PROMISED
                    and dotted(node.value).rpartition(".")[2] not in OWN
                ):
                    note(node.attr, node)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch") and not node.level:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    if any(map(is_private, whole.split("."))):
                        note(whole, node)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("torch.") and any(map(is_private, alias.name.split("."))):
                        note(alias.name, node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("torch._"):
                note(node.value, node)
    return found


CANARIES: dict[str, Callable[[], object]] = {}


def canary(*names: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Register what must hold of these names; the docstring says what pfde relies on."""

    def register(check: Callable[[], object]) -> Callable[[], object]:
        CANARIES.update(dict.fromkeys(names, check))
        return check

    return register


@canary("torch._C._functorch.peek_interpreter_stack")
def stack_of_transforms() -> None:
    """It is None outside torch.func's transforms, and something inside of each."""
    peek = torch._C._functorch.peek_interpreter_stack
    seen = []

    def f(x):
        seen.append(peek() is not None)
        return (x * x).sum()

    x = torch.ones(2)
    torch.func.grad(f)(x)
    torch.func.vmap(f)(x.view(2, 1))
    torch.func.jvp(f, (x,), (x,))
    torch.func.jacrev(f)(x)
    assert len(seen) >= 4 and all(seen), seen
    assert peek() is None


@canary("_current_level")
def level_of_forward_mode() -> None:
    """It is negative outside forward mode, and not in it."""
    assert forward_ad._current_level < 0
    with forward_ad.dual_level():
        assert forward_ad._current_level >= 0
    assert forward_ad._current_level < 0


@canary("torch._C._autograd._get_sequence_nr", "_sequence_nr")
def count_of_nodes() -> None:
    """Nodes are numbered in the order in which a thread makes them, and the count is the next one's number."""
    count = torch._C._autograd._get_sequence_nr
    x = torch.ones(2, requires_grad=True)
    first = x * 2
    begin = count()
    second = first * 3
    third = second + first
    assert first.grad_fn._sequence_nr() < begin
    assert begin <= second.grad_fn._sequence_nr() < third.grad_fn._sequence_nr() < count()
    with torch.no_grad():
        assert not (x * 2).requires_grad
    leaf = second.grad_fn.next_functions[0][0].next_functions[0][0]  # AccumulateGrad
    assert leaf.variable is x, "a leaf's node has the leaf as .variable"


@canary("torch._C.DisableTorchFunctionSubclass")
def own_rules() -> None:
    """Within it a subclass is the plain tensor that it is, and as_subclass makes no copy."""

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args), func

    x = torch.ones(2)
    own = x.as_subclass(Own)
    assert own[0].__class__ is tuple and own.shape[1].__self__.__name__ == "shape"
    result, func = own + 1
    assert type(result) is torch.Tensor and func.__name__ == "add"
    with torch._C.DisableTorchFunctionSubclass():
        assert own.data_ptr() == x.data_ptr() and type(own.as_subclass(torch.Tensor)) is torch.Tensor


@canary("torch._foreach_add_")
def sums_of_lists() -> None:
    """It adds the second list to the first in place, tensor by tensor, of any shapes and dtypes."""
    sums = [torch.ones(3), torch.ones(2, 2, dtype=torch.float64), torch.tensor(1.0)]
    before = [x.data_ptr() for x in sums]
    torch._foreach_add_(sums, [torch.ones(3), torch.full((2, 2), 2.0, dtype=torch.float64), torch.tensor(0.5)])
    assert [x.sum().item() for x in sums] == [6.0, 12.0, 1.5]
    assert [x.data_ptr() for x in sums] == before


@canary("_execution_engine")
def end_of_a_backward_pass() -> None:
    """What is queued within a backward pass is called at its end, when the tensors saved by nodes are freed."""
    told = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, bar):
            def at_the_end():
                try:
                    _ = ctx.saved_tensors
                    told.append("kept")
                except RuntimeError:
                    told.append("freed")

            Variable._execution_engine.queue_callback(at_the_end)
            told.append("node")
            return bar * 2

    x = torch.ones(2, requires_grad=True)
    y = Node.apply(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert told == ["node", "kept", "node", "freed"], told


@canary("_version")
def count_of_changes() -> None:
    """It grows with every change in place, through views and detached aliases too, and not by reading."""
    x = torch.ones(3)
    before = x._version
    _ = x + 1
    assert x._version == before
    x.add_(1)
    x[0] = 2
    x.view(3).mul_(2)
    x.detach().zero_()
    assert x._version == before + 4


@canary("_parameters", "_buffers", "_modules")
def tables_of_a_module() -> None:
    """They are what the module's attributes are looked up in, so that a tensor put there is the module's."""
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert list(module._modules) == ["0", "1"] and module._modules["0"] is module[0]
    linear, norm = module
    assert linear._parameters["weight"] is linear.weight
    assert norm._buffers["running_mean"] is norm.running_mean
    old, new = linear.weight, torch.zeros(2, 2)
    linear._parameters["weight"] = new
    assert linear.weight is new
    linear._parameters["weight"] = old
    assert linear.weight is old


@canary("_backward_hooks")
def hooks_of_a_tensor() -> None:
    """It is None or empty, or the dict of what register_hook was given: emptied, nothing is called; refilled, all."""
    x = torch.ones(2, requires_grad=True)
    assert not x._backward_hooks
    called = []
    x.register_hook(called.append)
    hooks = x._backward_hooks
    assert isinstance(hooks, dict) and len(hooks) == 1
    kept = dict(hooks)
    hooks.clear()
    torch.autograd.grad((x * 2).sum(), x)
    assert not called
    hooks.update(kept)
    torch.autograd.grad((x * 2).sum(), x)
    assert len(called) == 1


COMPILE = """
import sys, torch

assert "torch._dynamo" not in sys.modules, "import torch imports the compiler"
graphs = []

def count(graph, inputs):
    graphs.append(graph)
    return graph.forward

def inside(x):
    return x * 2

def outside(x):
    return inside(x + 1) - 1

torch.compile(outside, backend=count)(torch.ones(2))
assert "torch._dynamo" in sys.modules, "torch.compile imports another module than torch._dynamo"
assert len(graphs) == 1, f"unmarked: {len(graphs)} graphs"
graphs.clear()
torch._dynamo.reset()
inside._torchdynamo_disable = True
torch.compile(outside, backend=count)(torch.ones(2))
assert len(graphs) > 1, "the marked function is a part of its caller's graph"
"""


@canary("_torchdynamo_disable", "torch._dynamo")
def mark_for_the_compiler() -> None:
    """A compiled region ends at a call of a function so marked; nothing is compiled without torch._dynamo's import."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr).strip().splitlines()[-1]


@functools.cache
def uses() -> Uses:
    return private_uses(ROOT / "pfde")


@pytest.mark.parametrize("check", sorted(set(CANARIES.values()), key=lambda f: f.__name__), ids=lambda f: f.__name__)
def test_canary(check: Callable[[], object]) -> None:
    """torch is still as pfde needs it."""
    names = [name for name, f in CANARIES.items() if f is check]
    try:
        check()
    except Exception as error:
        places = ", ".join(place for name in names for place in uses().get(name, []))
        pytest.fail(
            f"torch {torch.__version__} has changed {' or '.join(names)}, used in {places}. pfde relies on this: "
            f"{check.__doc__} But: {type(error).__name__}: {error}"
        )


def test_every_private_use_has_a_canary() -> None:
    new = {name: places for name, places in uses().items() if name not in CANARIES}
    assert not new, (
        f"private to torch (or to another class, see OWN): use something public, or write a canary for {new}"
    )


def test_every_canary_has_a_use() -> None:
    assert not CANARIES.keys() - uses().keys(), "no longer used: take these canaries away"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("torch._C._new()", "torch._C._new"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from torch.nn.modules import _functions", "torch.nn.modules._functions"),
        ("import torch._inductor", "torch._inductor"),
        ("y0.grad_fn._saved_self", "_saved_self"),
        ("f(x)._base", "_base"),
        ("'torch._dynamo' in sys.modules", "torch._dynamo"),
    ],
)
def test_the_search_finds_what_is_private(tmp_path: Path, line: str, name: str) -> None:
    (tmp_path / "pfde").mkdir()
    (tmp_path / "pfde" / "a.py").write_text(f"import torch\n{line}\nself._own; step._replace(x=1); torch.nn.Module\n")
    assert private_uses(tmp_path / "pfde") == {name: ["pfde/a.py:2"]}
