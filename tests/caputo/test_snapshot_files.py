"""Snapshots on disk: nothing is left behind, and no fault of the disk is silent."""

import errno
import gc
import itertools
import os

import pytest

import pfde
from pfde.schedules import storage as storage_module
from support.checkpointing import (
    SCHEDULES,
    Field,
    Solve,
    assert_same,
    discrete,
    gradients,
    left_in,
    store_all,
)

pytestmark = [
    pytest.mark.usefixtures("folder"),
    pytest.mark.filterwarnings("ignore:Numba not available:RuntimeWarning"),
]


# -- nothing is left behind --------------------------------------------------------------------------------------------

ON_DISK = {name: SCHEDULES[name] for name in ("revolve on disk", "online on disk", "multistage", "mixed on disk")}
on_disk = pytest.mark.parametrize("make", ON_DISK.values(), ids=ON_DISK)


def files(folder):
    return sorted(folder.glob("pfde-*/*"))


@on_disk
def test_nothing_is_left_by_a_backward_pass_or_without_one(folder, make):
    solve = Solve("euler", "exponentials", discrete(make()))
    assert files(folder)
    solve.backward(retain_graph=True)
    assert left_in(folder) == []  # at once, though the graph is alive
    solve.backward()
    assert left_in(folder) == []
    other = Solve("euler", "exponentials", discrete(make()))
    assert files(folder)
    gc.disable()
    try:
        del other, solve
        assert left_in(folder) == []  # with the graph, without waiting for the garbage collector
    finally:
        gc.enable()


@on_disk
@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt("ctrl-c")])
def test_nothing_is_left_by_an_error(folder, make, error):
    """In the middle of the forward pass; in the backward pass at its first, an early, and its last evaluation."""
    probe = Solve("euler", "exponentials", discrete(make()))
    forward = probe.f.calls
    probe.backward()
    last = probe.f.calls

    def solve(when):
        f = Field()

        def hook(calls):
            if calls == when:
                raise error

        f.hook = hook
        Solve("euler", "exponentials", discrete(make()), f=f).backward()

    for when in (forward - 1, forward + 1, forward + 9, last):
        with pytest.raises(type(error)) as caught:
            solve(when)
        assert caught.value is error
        assert left_in(folder) == [], f"evaluation {when} of {last}"  # at once, though `caught` holds the solve
        error.__traceback__ = None
    assert_same(gradients("euler", "exponentials", discrete(make())), store_all("euler", "exponentials"))


def test_a_backward_pass_after_an_interrupted_one():
    """What an interrupted backward pass has spent is computed anew by the next one."""
    solve = Solve("euler", "exponentials", discrete(pfde.Revolve(1, on_disk=1, leaf=6)))
    boom, at = ValueError("boom"), solve.f.calls + 20

    def hook(calls):
        if calls == at:
            raise boom

    solve.f.hook = hook
    with pytest.raises(ValueError, match="boom"):
        solve.backward(retain_graph=True)
    assert_same(solve.backward(), store_all("euler", "exponentials"))


# -- faults of the disk ------------------------------------------------------------------------------------------------

REVOLVE = {"on_disk": 3, "leaf": 4}


def revolve(directory):
    return discrete(pfde.Revolve(1, directory=directory, **REVOLVE))


def still_works(directory):
    assert_same(gradients("euler", "exponentials", revolve(directory)), store_all("euler", "exponentials"))


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["missing", "a file", "read-only"])
def test_a_directory_that_cannot_be_used(tmp_path, folder, kind):
    directory = tmp_path / "nowhere"
    if kind == "a file":
        directory.write_text("here")
    elif kind == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        directory.mkdir(mode=0o500)
    with pytest.raises(
        pfde.SnapshotError,
        match=rf"snapshot of step 0 could not be written to {directory}/pfde-.*; free space there, name another "
        r"directory=",
    ):
        gradients("euler", "exponentials", revolve(directory))
    if directory.is_dir():
        directory.rmdir()
    directory.unlink(missing_ok=True)
    still_works(folder)


@pytest.mark.parametrize("call", ["fsync", "write"])
@pytest.mark.parametrize("when", [1, 4])
def test_a_full_disk(folder, monkeypatch, call, when):
    """At the first and at a later call: of the forward pass, or of the backward pass, which writes too."""
    original, calls = getattr(os, call), itertools.count(1)

    def failing(*arguments):
        if next(calls) >= when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(storage_module.os, call, failing)
        with pytest.raises(
            pfde.SnapshotError,
            match=r"snapshot of step \d+ could not be written to .*step-\d+.snapshot: No space left.*; free space",
        ):
            gradients("euler", "exponentials", revolve(folder))
    gc.collect()
    assert left_in(folder) == []
    still_works(folder)


def test_a_disk_that_fills_in_the_backward_pass(folder, monkeypatch):
    solve = Solve("euler", "exponentials", revolve(folder))

    def failing(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage_module.os, "write", failing)
        with pytest.raises(pfde.SnapshotError, match=r"snapshot of step \d+ could not be written to .*: No space left"):
            solve.backward(retain_graph=True)
    assert left_in(folder) == []
    assert_same(solve.backward(), store_all("euler", "exponentials"))
    still_works(folder)


@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("damage", ["truncate", "flip a bit", "delete", "exchange"])
def test_a_file_that_is_not_what_was_written(folder, damage, which):
    solve = Solve("euler", "exponentials", revolve(folder))
    path = sorted(files(folder), key=lambda path: int(path.stem.split("-")[1]))[which]
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip a bit":
        content[3 * len(content) // 4] ^= 4
        path.write_bytes(content)
    elif damage == "delete":
        path.unlink()
    else:
        other = next(other for other in files(folder) if other != path)
        path.write_bytes(other.read_bytes())
    step = path.stem.split("-")[1]
    with pytest.raises(
        pfde.SnapshotError, match=rf"snapshot of step {step} cannot be used: {path} .*; was it touched"
    ) as caught:
        solve.backward(retain_graph=True)
    assert left_in(folder) == []
    assert solve.y0.grad is None
    assert_same(solve.backward(), store_all("euler", "exponentials"))  # which computes it anew
    del caught, solve
    still_works(folder)
