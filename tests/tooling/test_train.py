"""examples/train.py end to end at a tiny size: what it prints and writes, ranks, --resume, Ctrl-C, users' mistakes.

Each launch starts mpiexec in a subprocess with a time limit, and most make several runs: the launches are fixtures of
the module. Most tests compare the training state in the checkpoint.
"""

import contextlib
import importlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support import launch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path(__file__).parent / "programs" / "runs.py"
TIME_LIMIT = 240.0  # seconds; a launch takes about twenty
# 20 images in batches of 6: the last batch has 2, so that two of four ranks get none of it.
TINY = "--limit 20 --batch-size 6 --channels 4 --dtype float64"
STEPS = 4  # an epoch

pytestmark = [pytest.mark.mpi, launch.needs_mpiexec]


class Launch:
    """Several runs in one launch: of each the exit status, and what was printed meanwhile.

    meanwhile : called with mpiexec's process while they run
    """

    def __init__(
        self,
        ranks: int,
        options: dict[str, str],
        meanwhile: Callable[[subprocess.Popen[str]], None] = lambda process: None,
        **environment: str,
    ) -> None:
        commands = [f"{TINY} {more}" for more in options.values()]
        process = launch.start(ranks, RUNS, "examples/train.py", *commands, cwd=ROOT, **environment)
        meanwhile(process)
        code, self.output = launch.finish(process, TIME_LIMIT)
        parts = self.output.split("== run")[1:]
        assert len(parts) == len(options), self.output
        assert "Traceback" not in self.output, self.output
        self.printed = dict(zip(options, parts, strict=True))
        # what is on stderr may come before or after
        self.status = {name: int(re.search(r"== exit (\d+)", part)[1]) for name, part in self.printed.items()}
        assert code == list(self.status.values())[-1], f"mpiexec ended with {code}:\n{self.output}"


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


# -- launches ---------------------------------------------------------------------------------------------------------

# Fixed and adaptive steps, explicit and implicit ones, f in two parts, a name that both kinds of equation have.
ODES = {
    "rk4": "--method rk4",
    "dopri5": "",  # the default
    "cn": "--method cn --step-size 0.5",
    "ark3": "--method ark3 --rtol 0.1 --atol 0.01",
    "beuler": "--method beuler --step-size 0.5",
}
ADAPTIVE_STEPS = {"dopri5": "with rtol 0.001, atol 0.0001", "ark3": "with rtol 0.1, atol 0.01"}
MISTAKES = {
    "--epoch 3": "unknown: --epoch 3",
    "digits": "unknown: digits",
    "--batch-size 0": "--batch-size must be 1 or more: got 0",
}


INTERRUPTED = ("one_rank_alone", "everyone")  # the latter last: mpiexec takes Ctrl-C once, and ends as its ranks do


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each run."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Launch:
    """Two epochs, never interrupted, and one; then runs without end, of which Ctrl-C makes one."""
    options = {str(n): f"--epochs {n} --out {folder}/two_ranks_{n}" for n in (2, 1)}
    options |= {whom: f"--epochs 1000 --out {folder}/{whom}" for whom in INTERRUPTED}

    def meanwhile(process: subprocess.Popen[str]) -> None:
        for whom in INTERRUPTED:
            interrupt(whom, process, folder / whom)

    return Launch(2, options, meanwhile)


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> Launch:
    options = {"log_view": f"--epochs 1 --out {folder}/log_view -log_view"}
    options |= {name: f"--epochs 2 --alpha 1 {ODES[name]} --out {folder}/{name}" for name in ODES}
    options |= {"2": f"--epochs 2 --out {folder}/one_rank"}
    options |= {
        f"rk4, {n}": f"--epochs {n} --alpha 1 {ODES['rk4']} --out {folder}/again {more}"
        for n, more in ((1, ""), (2, "--resume"))
    }
    options |= {mistake: f"--out {folder}/mistakes {mistake}" for mistake in MISTAKES}
    options |= {"--lr": f"--epochs 5 --out {folder}/one_rank --resume --lr 0.5"}
    return Launch(1, options)


@pytest.fixture(scope="module")
def four_ranks(folder: Path) -> Launch:
    rk4 = f"--epochs 1 --alpha 1 {ODES['rk4']} --out {folder}/four_ranks_rk4"
    return Launch(4, {"2": f"--epochs 2 --out {folder}/four_ranks", "rk4": rk4})


@pytest.fixture(scope="module")
def interrupted(folder: Path, two_ranks: Launch) -> dict[str, dict]:
    """The states that Ctrl-C left."""
    return {whom: state_in(folder / whom) for whom in INTERRUPTED}


@pytest.fixture(scope="module")
def resumed(folder: Path, interrupted: dict[str, dict]) -> Launch:
    """In processes that have not seen what went before; and mistakes that rank 0 sees."""
    options = {"1": f"--epochs 2 --out {folder}/two_ranks_1 --resume"}
    for whom, state in interrupted.items():
        options[whom] = f"--epochs {state['epoch'] + 1} --out {folder}/{whom} --resume"
    options["mnist"] = f"--out {folder}/mnist --data mnist"  # rank 0 reads files; the other must not wait for ever
    options["nothing"] = f"--out {folder}/nothing --resume"
    return Launch(2, options, PFDE_DATA=str(folder))


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


def interrupt(whom: str, mpiexec: subprocess.Popen[str], out: Path) -> None:
    """Ctrl-C, once this run has its first checkpoint."""
    deadline = time.monotonic() + TIME_LIMIT
    while not (out / "checkpoint.pt").exists():
        assert mpiexec.poll() is None and time.monotonic() < deadline, launch.finish(mpiexec, 0.0)
        time.sleep(0.01)
    if whom == "everyone":
        os.killpg(mpiexec.pid, signal.SIGINT)
    else:
        os.kill(ranks_below(mpiexec.pid)[-1], signal.SIGINT)


# -- what they show ---------------------------------------------------------------------------------------------------


def test_report_picture_and_checkpoint(two_ranks: Launch, folder: Path) -> None:
    output, out = two_ranks.printed["2"], folder / "two_ranks_2"
    assert two_ranks.status["2"] == 0
    epochs = re.findall(r"epoch (\d)/2  loss (\S+)  accuracy (\S+)%  alpha (\S+)", output)
    assert [int(epoch) for epoch, *_ in epochs] == [1, 2], output
    assert float(epochs[-1][1]) < float(epochs[0][1]), "the loss did not fall"
    assert float(epochs[-1][3]) != 0.7, "alpha was not learned"
    assert "step/s" in two_ranks.output, "no progress bar"
    assert re.search(r"^test accuracy: \S+% of 20 images$", output, re.M), output
    assert re.search(r"^learned alpha: 0\.\d+$", output, re.M), output
    assert re.search(r"^memory peak: \d+ MiB", output, re.M), output
    match = re.search(r"^adjoint against autograd: (\S+)$", output, re.M)
    assert match, output
    assert float(match[1]) < 1e-12
    assert (out / "train.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "train.png"]
    state = state_in(out)
    assert (state["epoch"], state["step"]) == (2, 0)
    assert len(state["losses"]) == len(state["alphas"]) == 2 * STEPS


@pytest.mark.parametrize("ranks", ["one_rank", "four_ranks"])
def test_any_number_of_ranks_gives_the_same_curves(
    ranks: str, two_ranks: Launch, folder: Path, request: pytest.FixtureRequest
) -> None:
    assert request.getfixturevalue(ranks).status["2"] == 0
    state, reference = state_in(folder / ranks), state_in(folder / "two_ranks_2")
    for curve in ("losses", "alphas"):
        difference = (torch.tensor(state[curve]) - torch.tensor(reference[curve])).abs().max().item()
        # Rounding differs in the sums over a batch; Adam's g/sqrt(v) passes it on at about the size it has.
        assert difference < 1e-10, f"{curve}: {ranks} differ from two by {difference:.1e}"


def test_resume_is_bit_for_bit(two_ranks: Launch, resumed: Launch, folder: Path) -> None:
    assert "epoch 1/1" in two_ranks.printed["1"] and two_ranks.status["1"] == 0
    output = resumed.printed["1"]
    assert "epoch 2/2" in output
    assert "epoch 1/2" not in output
    assert same(state_in(folder / "two_ranks_1"), state_in(folder / "two_ranks_2"))


@pytest.mark.parametrize("method", ODES)
def test_ordinary_equations(method: str, one_rank: Launch, folder: Path) -> None:
    output = one_rank.printed[method]
    steps = f", adaptive steps {ADAPTIVE_STEPS[method]}" if method in ADAPTIVE_STEPS else ""
    assert f"; {method}, ordinary equation (alpha is 1, not learned){steps}; 1 ranks" in output, output
    assert "learned alpha:" not in output
    losses = re.findall(r"epoch \d/2  loss (\S+)  accuracy \S+%$", output, re.M)
    assert len(losses) == 2 and float(losses[1]) < float(losses[0]), output
    match = re.search(r"^adjoint against autograd: (\S+)$", output, re.M)
    assert match, output
    assert float(match[1]) < 1e-11  # implicit stages stop at residuals of 32 eps, 7e-15, which add up over the steps
    assert (folder / method / "train.png").read_bytes().startswith(b"\x89PNG")
    state = state_in(folder / method)
    assert (state["epoch"], len(state["losses"]), state["alphas"]) == (2, 2 * STEPS, [])


def test_an_ordinary_equation_on_four_ranks_gives_the_same_curve(
    one_rank: Launch, four_ranks: Launch, folder: Path
) -> None:
    """Fixed steps do not couple the images of a batch."""
    assert "; 4 ranks" in four_ranks.printed["rk4"]
    four, one = (torch.tensor(state_in(folder / name)["losses"][:STEPS]) for name in ("four_ranks_rk4", "rk4"))
    difference = (four - one).abs().max().item()
    assert difference < 1e-10, f"4 ranks differ from 1 by {difference:.1e}"


def test_an_ordinary_equation_resumes_bit_for_bit(one_rank: Launch, folder: Path) -> None:
    assert one_rank.status["rk4, 1"] == one_rank.status["rk4, 2"] == 0
    assert same(state_in(folder / "again"), state_in(folder / "rk4"))


@pytest.mark.parametrize("whom", INTERRUPTED)
def test_ctrl_c_leaves_a_checkpoint_to_resume_from(
    whom: str, two_ranks: Launch, interrupted: dict[str, dict], resumed: Launch, folder: Path
) -> None:
    """Both as at a terminal (mpiexec passes SIGINT on) and when a single rank gets the signal."""
    state, output = interrupted[whom], two_ranks.printed[whom]
    assert two_ranks.status[whom] == 130, output
    assert "--resume goes on from there" in output
    assert 1 <= state["epoch"] < 1000
    assert resumed.status[whom] == 0
    after, straight = state_in(folder / whom), state_in(folder / "two_ranks_2")
    common = min(len(after["losses"]), len(straight["losses"]))
    assert after["epoch"] == state["epoch"] + 1
    assert after["losses"][:common] == straight["losses"][:common]
    assert len(after["losses"]) == STEPS * after["epoch"]


def test_petsc_options_pass_through(one_rank: Launch) -> None:
    assert one_rank.status["log_view"] == 0
    assert "PETSc Performance Summary" in one_rank.output


@pytest.mark.parametrize(("mistake", "message"), [*MISTAKES.items(), ("--lr", "was made with --lr 0.003, not 0.5")])
def test_mistakes_are_told_without_a_traceback(mistake: str, message: str, one_rank: Launch) -> None:
    assert one_rank.status[mistake] != 0
    assert message in one_rank.output


@pytest.mark.parametrize(("mistake", "message"), [("mnist", "PFDE_DATA"), ("nothing", "run without --resume first")])
def test_mistakes_that_one_rank_sees_end_all_of_them(mistake: str, message: str, resumed: Launch) -> None:
    assert resumed.status[mistake] != 0
    assert message in resumed.output


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
