"""Snapshots come back as they went in or are refused by step and file, and nothing is left behind on disk."""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import stat
import subprocess
import sys
import threading

import pytest
import torch
from checkpoint_schedules import StorageType

from pfde.errors import SnapshotError
from pfde.schedules import Snapshot, SnapshotStore
from pfde.schedules import storage as module

RAM, DISK, NONE = StorageType.RAM, StorageType.DISK, StorageType.NONE
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def make(rows=3):
    """Every dtype and some odd shapes; NaN, inf and -0.0 among the values."""
    values = torch.tensor([[0.1, -0.0, float("nan")], [float("inf"), 1e-30, -3.5]])
    tensors = {str(dtype): values.to(dtype) for dtype in FLOATS}
    tensors |= {str(dtype): torch.arange(5).to(dtype) for dtype in INTEGERS}
    tensors |= {
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.25, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "large": torch.randn(rows, 70, dtype=torch.float64),
    }
    return Snapshot(tensors, {"t": 0.1, "n": 2**60, "big": 1e300, "none of it": float("inf")})


def same(a, b):
    assert a.numbers == b.numbers and [type(x) for x in a.numbers.values()] == [type(x) for x in b.numbers.values()]
    assert list(a.tensors) == list(b.tensors)
    for name, x in a.tensors.items():
        y = b.tensors[name]
        assert (x.dtype, x.shape, x.device) == (y.dtype, y.shape, y.device), name
        assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)), name


def entries(directory):
    return sorted(os.listdir(directory))


def only_file(directory):
    (path,) = directory.glob("pfde-*/*")
    return path


@pytest.mark.smoke
@pytest.mark.parametrize("storage", [RAM, DISK])
def test_round_trip(tmp_path, storage):
    with SnapshotStore(tmp_path) as store:
        snapshots = {n: make(n % 10) for n in (0, 7, 10**12 + 5)}
        for n, snapshot in snapshots.items():
            store.put(n, snapshot, storage)
        for n, snapshot in snapshots.items():
            same(store.get(n, storage), snapshot)
        assert store.count == 3 and store.holds(7, storage) and not store.holds(8, storage)
    assert entries(tmp_path) == []


def test_what_is_not_contiguous_or_needs_a_gradient_is_kept_by_value():
    x = torch.randn(4, 6, requires_grad=True)
    with SnapshotStore() as store:
        for storage in (RAM, DISK):
            store.put(1, Snapshot({"x": x.T[::2]}, {}), storage)
            got = store.get(1, storage).tensors["x"]
            assert torch.equal(got, x.T[::2]) and not got.requires_grad and got.is_contiguous()


def test_memory_holds_copies_and_reuses_its_buffers():
    x = torch.ones(5)
    with SnapshotStore() as store:
        store.put(0, Snapshot({"x": x}, {}), RAM)
        x.zero_()
        held = store.get(0, RAM).tensors["x"]
        assert held.sum() == 5 and store.get(0, RAM).tensors["x"] is held
        store.discard(0, RAM)
        store.put(1, Snapshot({"x": x + 2}, {}), RAM)
        assert store.get(1, RAM).tensors["x"].data_ptr() == held.data_ptr()
        assert torch.equal(store.get(1, RAM).tensors["x"], x + 2)
        store.discard(1, RAM)
        store.put(2, Snapshot({"x": torch.ones(6)}, {}), RAM)  # of another shape
        assert torch.equal(store.get(2, RAM).tensors["x"], torch.ones(6))


def test_moving_discarding_replacing(tmp_path):
    first, second = make(1), make(2)
    with SnapshotStore(tmp_path) as store:
        store.put(3, first, RAM)
        store.move(3, RAM, DISK)
        assert store.holds(3, DISK) and not store.holds(3, RAM)
        store.move(3, DISK, RAM)
        same(store.get(3, RAM), first)
        assert list(tmp_path.glob("pfde-*/*")) == []
        for storage in (RAM, DISK):
            store.put(3, first, storage)
            store.put(3, second, storage)
            same(store.get(3, storage), second)
        assert store.count == 2
        store.move(3, DISK, NONE)
        store.discard(3, RAM)
        assert store.count == 0
        for storage in (RAM, DISK):
            for use in (store.get, store.discard):
                with pytest.raises(SnapshotError, match="no snapshot of step 3 is held in"):
                    use(3, storage)
        with pytest.raises(
            ValueError, match=r"storage must be StorageType.RAM or StorageType.DISK: got StorageType.NONE"
        ):
            store.get(3, NONE)


def test_peaks_count_both_tiers():
    x = torch.zeros(100, dtype=torch.float64)  # 800 bytes
    with SnapshotStore() as store:
        for n in range(4):
            store.put(n, Snapshot({"x": x}, {"t": 1.0}), RAM if n < 3 else DISK)
        store.discard(0, RAM)
        store.discard(3, DISK)
        store.put(5, Snapshot({"x": x}, {}), RAM)
        assert (store.count, store.snapshots_peak, store.bytes_peak, store.memory_peak) == (3, 4, 3200, 2400)
        store.clear()
        assert (store.count, store.snapshots_peak, store.bytes_peak) == (0, 4, 3200)


def test_clear_and_close(tmp_path):
    store = SnapshotStore(tmp_path)
    assert entries(tmp_path) == []  # nothing before the first snapshot on disk
    store.put(0, make(), RAM)
    assert entries(tmp_path) == []
    store.put(0, make(), DISK)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"pfde-{socket.gethostname()}-{os.getpid()}-")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    store.clear()
    assert entries(tmp_path) == [] and store.count == 0
    snapshot = make()
    store.put(1, snapshot, DISK)
    same(store.get(1, DISK), snapshot)
    store.close()
    store.close()
    assert entries(tmp_path) == []
    with pytest.raises(ValueError, match="store must be open"):
        store.put(0, make(), RAM)


def test_the_folder_goes_with_the_store(tmp_path):
    store = SnapshotStore(tmp_path)
    store.put(0, make(), DISK)
    store.prefetch(0)
    assert len(entries(tmp_path)) == 1
    del store
    gc.collect()
    assert entries(tmp_path) == []


def test_the_folder_goes_with_the_process_but_not_with_its_fork(tmp_path):
    code = (
        "import os, sys, torch; from checkpoint_schedules import StorageType as S\n"
        "from pfde.schedules import Snapshot, SnapshotStore\n"
        "store = SnapshotStore(sys.argv[1]); store.put(0, Snapshot({'x': torch.ones(3)}, {}), S.DISK)\n"
        "pid = os.fork()\n"
        "if pid == 0: sys.exit()\n"  # runs the fork's exit handlers
        "os.waitpid(pid, 0); print(store.get(0, S.DISK).tensors['x'].sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("3.0\n", 0), done.stderr
    assert entries(tmp_path) == []


def test_flipped_bits_are_found(tmp_path):
    """Every byte of prefix and header, one bit each; in the data 200 places, the last byte among them."""
    with SnapshotStore(tmp_path) as store:
        snapshot = make()
        store.put(5, snapshot, DISK)
        path = only_file(tmp_path)
        content = path.read_bytes()
        start = 24 + int.from_bytes(content[16:20], "little")
        places = [*range(start), *range(start, len(content), (len(content) - start) // 200), len(content) - 1]
        for i in places:
            damaged = bytearray(content)
            damaged[i] ^= 1 << (i % 8)
            path.write_bytes(damaged)
            with pytest.raises(SnapshotError, match=r"snapshot of step 5 cannot be used: .*step-5\.snapshot "):
                store.get(5, DISK)
        path.write_bytes(content)
        same(store.get(5, DISK), snapshot)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "truncated to 0 bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:23]), "truncated to 23 bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "truncated or damaged"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "truncated or damaged"),
        (lambda path: path.write_bytes(b"x" * 5000), "does not begin as a snapshot does"),
        (lambda path: os.replace(path.with_name("step-2.snapshot"), path), "is that of step 2"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    ],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_file_that_is_not_what_was_written(tmp_path, damage, message, ahead):
    with SnapshotStore(tmp_path) as store:
        store.put(2, make(), DISK)
        store.put(5, make(), DISK)
        (path,) = tmp_path.glob("pfde-*/step-5.*")
        damage(path)
        if ahead:
            store.prefetch(5)
        with pytest.raises(SnapshotError, match=rf"snapshot of step 5 cannot be used: {path} .*{message}"):
            store.get(5, DISK)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("name", ["write", "fsync", "replace", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails(tmp_path, monkeypatch, name, code):
    """Says so, keeps what was there, leaves nothing half written, and works again once there is room."""
    with SnapshotStore(tmp_path) as store:
        store.put(1, make(), DISK)

        def fail(*_, **__):
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(module.os, name, fail)
            message = rf"step 2 could not be written to {tmp_path}/.*step-2\.snapshot: {os.strerror(code)}; free space"
            with pytest.raises(SnapshotError, match=message) as caught:
                store.put(2, make(), DISK)
        assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == code
        assert only_file(tmp_path).name == "step-1.snapshot"
        assert not store.holds(2, DISK) and store.count == 1
        store.put(2, make(), DISK)
        assert store.count == 2


def test_a_disk_that_is_full_half_way(tmp_path, monkeypatch):
    """Writes come back short, and then fail."""
    room, write = 700, os.write

    def short(file, content):
        nonlocal room
        done = write(file, content[: min(100, room)]) if room else 0
        room -= done
        if not done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return done

    snapshot = make()
    with SnapshotStore(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(module.os, "write", short)
            with pytest.raises(SnapshotError, match="No space left on device"):
                store.put(2, snapshot, DISK)
            assert list(tmp_path.glob("pfde-*/*")) == []
            room = 10**9
            store.put(2, snapshot, DISK)
        same(store.get(2, DISK), snapshot)


def test_an_interrupt_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    with SnapshotStore(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(module.os, "fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                store.put(2, make(), DISK)
        assert list(tmp_path.glob("pfde-*/*")) == []


@pytest.mark.parametrize("kind", ["missing", "below a file"])
def test_a_directory_that_cannot_be_used(tmp_path, kind):
    (tmp_path / "file").write_text("")
    directory = tmp_path / ("missing" if kind == "missing" else "file/below")
    with SnapshotStore(directory) as store:
        store.put(0, make(), RAM)
        with pytest.raises(SnapshotError, match=rf"step 4 could not be written to {directory}/.*directory=") as caught:
            store.put(4, make(), DISK)
        assert isinstance(caught.value.__cause__, OSError)
        assert store.count == 1


ALIVE = """
import sys, time, torch
from checkpoint_schedules import StorageType
from pfde.schedules import Snapshot, SnapshotStore
store = SnapshotStore(sys.argv[1])
store.put(0, Snapshot({"x": torch.ones(1000)}, {}), StorageType.DISK)
print("there", flush=True)
time.sleep(60)
"""


def test_what_killed_processes_left_is_swept(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ALIVE, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "there\n"
        (theirs,) = tmp_path.glob("pfde-*")
        host = socket.gethostname()
        kept = [
            f"pfde-other-{host}-{process.pid}-abcdefgh",  # of another host
            f"pfde-{host}-{process.pid}-abc-def",  # no name of ours
            f"pfde-{host}-1-abcdefgh",  # of a process that lives (or is hidden from us)
            "something else",
        ]
        for name in kept:
            (tmp_path / name).mkdir()
        SnapshotStore(tmp_path).close()
        assert entries(tmp_path) == sorted([*kept, theirs.name])  # alive
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        process.stdout.close()
    assert (theirs / "step-0.snapshot").exists()
    (tmp_path / f"pfde-{host}-{process.pid}-linklink").symlink_to(tmp_path / "something else")
    SnapshotStore(tmp_path).close()
    assert entries(tmp_path) == sorted([*kept, f"pfde-{host}-{process.pid}-linklink"])


def test_prefetch_reads_in_the_background(tmp_path, monkeypatch):
    read, threads = module.read_snapshot, []

    def watched(path, n, written):
        threads.append((n, threading.current_thread().name))
        return read(path, n, written)

    monkeypatch.setattr(module, "read_snapshot", watched)
    snapshots = {n: make(n + 1) for n in range(4)}
    with SnapshotStore(tmp_path) as store:
        for n, snapshot in snapshots.items():
            store.put(n, snapshot, DISK)
        for n in (3, 3, 2, 17):  # twice, and one that is not there
            store.prefetch(n)
        for n in (3, 2, 1):
            same(store.get(n, DISK), snapshots[n])
        assert [n for n, _ in threads] == [3, 2, 1]
        assert [name.startswith("pfde-snapshots") for _, name in threads] == [True, True, False]
        store.prefetch(0)
        store.put(0, snapshots[1], DISK)  # what is being read is given up
        same(store.get(0, DISK), snapshots[1])
        store.prefetch(1)
        store.discard(1, DISK)
        store.prefetch(0)
    assert not [t for t in threading.enumerate() if t.name.startswith("pfde-snapshots")]
    with SnapshotStore(tmp_path, prefetch=False) as store:
        store.put(0, snapshots[0], DISK)
        threads.clear()
        store.prefetch(0)
        same(store.get(0, DISK), snapshots[0])
        assert threads == [(0, threading.current_thread().name)]


def test_tensors_return_to_their_device(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    x = torch.randn(5, device="cuda")
    with SnapshotStore(tmp_path) as store:
        for storage in (RAM, DISK):
            store.put(0, Snapshot({"x": x}, {}), storage)
            got = store.get(0, storage).tensors["x"]
            assert got.device == x.device and torch.equal(got, x)
