"""examples/train.py end to end at a tiny size: what it prints and writes, ranks, --resume, Ctrl-C, users' mistakes.

Each run starts mpiexec in a subprocess with a time limit.  Most compare the training state in the checkpoint.
"""

import contextlib
import importlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from support import launch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 240.0  # seconds; a run takes about five
# 50 images in batches of 6: the last batch has 2, so that two of four ranks get none of it.
TINY = ["--limit", "50", "--batch-size", "6", "--channels", "4", "--dtype", "float64"]

pytestmark = [pytest.mark.mpi, launch.needs_mpiexec]


def start(ranks: int, *options: str, **environment: str) -> subprocess.Popen[str]:
    return launch.start(ranks, Path("examples/train.py"), *options, cwd=ROOT, **environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    return launch.finish(process, TIME_LIMIT)


def run(ranks: int, *options: str, **environment: str) -> str:
    code, output = finish(start(ranks, *options, **environment))
    assert code == 0, output
    return output


def state_in(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["training"]


def same(a: object, b: object) -> bool:
    """Bitwise equality of nested dicts, lists, numbers and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def four_epochs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of four epochs on two ranks, never interrupted."""
    folder = tmp_path_factory.mktemp("four_epochs")
    return folder, run(2, *TINY, "--epochs", "4", "--out", str(folder))


@pytest.mark.smoke
def test_report_picture_and_checkpoint(four_epochs: tuple[Path, str]) -> None:
    folder, output = four_epochs
    epochs = re.findall(r"epoch (\d)/4  loss (\S+)  accuracy (\S+)%  alpha (\S+)", output)
    assert [int(epoch) for epoch, *_ in epochs] == [1, 2, 3, 4], output
    assert float(epochs[-1][1]) < float(epochs[0][1]), "the loss did not fall"
    assert float(epochs[-1][3]) != 0.7, "alpha was not learned"
    assert "step/s" in output, "no progress bar"
    assert re.search(r"^test accuracy: \S+% of 50 images$", output, re.M), output
    assert re.search(r"^learned alpha: 0\.\d+$", output, re.M), output
    assert re.search(r"^memory peak: \d+ MiB", output, re.M), output
    match = re.search(r"^adjoint against autograd: (\S+)$", output, re.M)
    assert match, output
    assert float(match[1]) < 1e-12
    assert (folder / "train.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "train.png"]
    state = state_in(folder)
    assert (state["epoch"], state["step"]) == (4, 0)
    assert len(state["losses"]) == len(state["alphas"]) == 4 * 9


@pytest.mark.parametrize("ranks", [1, 4])
def test_any_number_of_ranks_gives_the_same_curves(ranks: int, four_epochs: tuple[Path, str], tmp_path: Path) -> None:
    run(ranks, *TINY, "--epochs", "4", "--out", str(tmp_path))
    state, reference = state_in(tmp_path), state_in(four_epochs[0])
    for curve in ("losses", "alphas"):
        difference = (torch.tensor(state[curve]) - torch.tensor(reference[curve])).abs().max().item()
        # Rounding differs in the sums over a batch; Adam's g/sqrt(v) passes it on at about the size it has.
        assert difference < 1e-10, f"{curve}: {ranks} ranks differ from 2 by {difference:.1e}"


def test_resume_is_bit_for_bit(four_epochs: tuple[Path, str], tmp_path: Path) -> None:
    run(2, *TINY, "--epochs", "2", "--out", str(tmp_path))
    assert state_in(tmp_path)["epoch"] == 2
    output = run(2, *TINY, "--epochs", "4", "--out", str(tmp_path), "--resume")
    assert "epoch 3/4" in output
    assert "epoch 2/4" not in output
    assert same(state_in(tmp_path), state_in(four_epochs[0]))


# Fixed and adaptive steps, explicit and implicit ones, f in two parts, a name that both kinds of equation have.
ODES = {
    "rk4": ["--method", "rk4"],
    "dopri5": [],  # the default
    "cn": ["--method", "cn", "--step-size", "0.25"],
    "ark3": ["--method", "ark3", "--rtol", "1e-2", "--atol", "1e-3"],
    "beuler": ["--method", "beuler", "--step-size", "0.25"],
}
ADAPTIVE_STEPS = {"dopri5": "with rtol 0.001, atol 0.0001", "ark3": "with rtol 0.01, atol 0.001"}


@pytest.fixture(scope="module")
def rk4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two epochs with rk4 on one rank."""
    folder = tmp_path_factory.mktemp("rk4")
    run(1, *TINY, "--epochs", "2", "--alpha", "1", *ODES["rk4"], "--out", str(folder))
    return folder


@pytest.mark.parametrize("method", ODES)
def test_ordinary_equations(method: str, tmp_path: Path) -> None:
    output = run(1, *TINY, "--epochs", "2", "--alpha", "1", *ODES[method], "--out", str(tmp_path))
    steps = f", adaptive steps {ADAPTIVE_STEPS[method]}" if method in ADAPTIVE_STEPS else ""
    assert f"; {method}, ordinary equation (alpha is 1, not learned){steps}; 1 ranks" in output, output
    assert "learned alpha:" not in output
    losses = re.findall(r"epoch \d/2  loss (\S+)  accuracy \S+%$", output, re.M)
    assert len(losses) == 2 and float(losses[1]) < float(losses[0]), output
    match = re.search(r"^adjoint against autograd: (\S+)$", output, re.M)
    assert match, output
    assert float(match[1]) < 1e-11  # implicit stages stop at residuals of 32 eps, 7e-15, which add up over the steps
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    state = state_in(tmp_path)
    assert (state["epoch"], len(state["losses"]), state["alphas"]) == (2, 2 * 9, [])


def test_an_ordinary_equation_on_four_ranks_gives_the_same_curve(rk4: Path, tmp_path: Path) -> None:
    """Fixed steps do not couple the images of a batch."""
    output = run(4, *TINY, "--epochs", "1", "--alpha", "1", *ODES["rk4"], "--out", str(tmp_path))
    assert "; 4 ranks" in output
    four, one = (torch.tensor(state_in(folder)["losses"][:9]) for folder in (tmp_path, rk4))
    difference = (four - one).abs().max().item()
    assert difference < 1e-10, f"4 ranks differ from 1 by {difference:.1e}"


def test_an_ordinary_equation_resumes_bit_for_bit(rk4: Path, tmp_path: Path) -> None:
    options = [*TINY, "--alpha", "1", *ODES["rk4"], "--out", str(tmp_path)]
    run(1, *options, "--epochs", "1")
    run(1, *options, "--epochs", "2", "--resume")
    assert same(state_in(tmp_path), state_in(rk4))


def ranks_below(mpiexec: int) -> list[int]:
    """The pids of the Python processes that mpiexec started, through its proxy."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                command, _, fields = (entry / "stat").read_text().rpartition(")")
                parents[int(entry.name)] = (int(fields.split()[1]), command)
    proxies = [pid for pid, (parent, _) in parents.items() if parent == mpiexec]
    return [pid for pid, (parent, command) in parents.items() if parent in proxies and "python" in command]


@pytest.mark.parametrize("whom", ["everyone", "one rank"])
def test_ctrl_c_leaves_a_checkpoint_to_resume_from(whom: str, four_epochs: tuple[Path, str], tmp_path: Path) -> None:
    """Both as at a terminal (mpiexec passes SIGINT on) and when a single rank gets the signal."""
    process = start(2, *TINY, "--epochs", "1000", "--out", str(tmp_path))
    deadline = time.monotonic() + TIME_LIMIT
    while not (tmp_path / "checkpoint.pt").exists():  # the first epoch's
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.01)
    if whom == "everyone":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(ranks_below(process.pid)[-1], signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "Traceback" not in output
    assert "--resume goes on from there" in output
    state = state_in(tmp_path)
    assert 1 <= state["epoch"] < 1000

    epochs = str(state["epoch"] + 1)
    run(2, *TINY, "--epochs", epochs, "--out", str(tmp_path), "--resume")
    resumed, straight = state_in(tmp_path), state_in(four_epochs[0])
    common = min(len(resumed["losses"]), len(straight["losses"]))
    assert resumed["epoch"] == state["epoch"] + 1
    assert resumed["losses"][:common] == straight["losses"][:common]
    assert len(resumed["losses"]) == 9 * resumed["epoch"]


def test_petsc_options_pass_through(tmp_path: Path) -> None:
    output = run(1, *TINY, "--epochs", "1", "--out", str(tmp_path), "-log_view")
    assert "PETSc Performance Summary" in output


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        (1, ["--epoch", "3"], "unknown: --epoch 3"),
        (1, ["digits"], "unknown: digits"),
        (1, ["--batch-size", "0"], "--batch-size must be 1 or more: got 0"),
        (2, ["--data", "mnist"], "PFDE_DATA"),  # rank 0 reads files; the other must not wait for ever
        (2, ["--resume"], "run without --resume first"),
    ],
)
def test_mistakes_are_told_without_a_traceback(ranks: int, options: list[str], message: str, tmp_path: Path) -> None:
    code, output = finish(start(ranks, *TINY, "--out", str(tmp_path), *options, PFDE_DATA=str(tmp_path)))
    assert code != 0
    assert message in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method rk4", "--method rk4 is for ordinary equations: got --alpha 0.7; add --alpha 1, or choose one of"),
        ("--alpha 1 --method pece", "which --method pece is not for: choose one of euler, midpoint,"),
        ("--alpha 1.5", "--alpha must be in (0, 1]: got 1.5"),
        ("--alpha nan", "--alpha must be in (0, 1]: got nan"),
        ("--rtol 1e-3", "--rtol is for adaptive steps, and these are fixed: leave it out, or use --alpha 1"),
        ("--alpha 1 --method cn --atol 1e-3", "--atol is for adaptive steps"),
        ("--alpha 1 --step-size 0.5 --rtol 1e-3", "or use --alpha 1 without --step-size"),
        ("--alpha 1 --rtol 0", "--rtol must be in (0, 1]: got 0"),
    ],
)
def test_options_that_do_not_go_together(
    options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr("sys.argv", ["train.py", *options.split()])
    with pytest.raises(SystemExit):
        importlib.import_module("train").parse_options()
    assert message in capsys.readouterr().err


def test_resume_refuses_other_options(four_epochs: tuple[Path, str]) -> None:
    options = ["--epochs", "5", "--out", str(four_epochs[0]), "--resume", "--lr", "0.5"]
    code, output = finish(start(1, *TINY, *options))
    assert code != 0
    assert "was made with --lr 0.003, not 0.5" in output
    assert "Traceback" not in output
