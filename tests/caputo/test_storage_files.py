"""A snapshot's file whose bytes are not those written ends in SnapshotError, whatever they are; paths and chdir."""

from __future__ import annotations

import json
import os
import random
import struct
import zlib
from pathlib import Path

import pytest
import torch
from checkpoint_schedules import MultistageCheckpointSchedule, StorageType

import pfde
from pfde.schedules import Foreign, Online, Revolve, Snapshot, SnapshotStore
from pfde.schedules import snapshot_file as module
from pfde.schedules.snapshot_file import Written, read_snapshot
from support.checkpointing import Solve, assert_same, discrete, left_in, store_all

DISK = StorageType.DISK
REFUSED = (
    r"the snapshot of step 5 cannot be used: .*step-5\.snapshot .*; was it touched, or is the disk failing\? solve"
)


@pytest.fixture
def store(tmp_path):
    with SnapshotStore(tmp_path) as store:
        tensors = {"y": torch.arange(6, dtype=torch.float64), "rows": torch.ones(2, 3), "none": torch.empty(0, 4)}
        store.put(5, Snapshot(tensors, {"restart": 1, "t": 0.5}), DISK)
        yield store


def file_of(store) -> Path:
    (path,) = store.directory.glob("pfde-*/step-5.snapshot")
    return path


def taken_apart(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[16:20], "little")
    return json.loads(content[24 : 24 + length]), content[24 + length :]


def sealed(header: bytes, data: bytes) -> bytes:
    """A file with a checksum that is right."""
    header += b" " * (-(24 + len(header)) % 64)
    size = 24 + len(header) + len(data)
    checksum = zlib.crc32(data, zlib.crc32(header, zlib.crc32(struct.pack("<QI", size, len(header)))))
    return struct.pack("<8sQII", b"PFDESNP1", size, len(header), checksum) + header + data


def refused(store, content: bytes, why: str = "") -> None:
    """Through the store, and by a reader who remembers this very file, so that the header itself has to be checked."""
    path = file_of(store)
    path.write_bytes(content)
    with pytest.raises(pfde.SnapshotError, match=REFUSED):
        store.get(5, DISK)
    checksum = int.from_bytes(content[20:24], "little")
    with pytest.raises(pfde.SnapshotError, match=REFUSED) as caught:
        read_snapshot(path, 5, Written(len(content), checksum))
    assert why in str(caught.value)


VALUES = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    2**200,
    0.5,
    1e308,
    "",
    "x",
    "float64",
    "nn",
    "\0",
    [],
    [1],
    {},
    {"a": 1},
]


def test_every_field_of_a_forged_header(store):
    """Each replaced by each of many values, or left out, under a right checksum: refused, nothing else."""
    content = file_of(store).read_bytes()
    original, data = taken_apart(content)
    places = [("step",), ("numbers",), ("tensors",), ("numbers", "restart")]
    places += [("tensors", i, name) for i in range(3) for name in ("name", "dtype", "shape", "at")]
    seen = 0
    for place in places:
        for value in [*VALUES, KeyError]:
            header = json.loads(json.dumps(original))
            inner = header
            for key in place[:-1]:
                inner = inner[key]
            if value is KeyError:
                del inner[place[-1]]
            elif inner[place[-1]] == value and type(inner[place[-1]]) is type(value):
                continue
            else:
                inner[place[-1]] = value
            forged = sealed(json.dumps(header).encode(), data)
            file_of(store).write_bytes(forged)
            with pytest.raises(pfde.SnapshotError, match=REFUSED):
                store.get(5, DISK)
            try:  # a reader to whom this is the file that was written: a snapshot, or the same error
                read_snapshot(file_of(store), 5, Written(len(forged), int.from_bytes(forged[20:24], "little")))
            except pfde.SnapshotError:
                seen += 1
    assert seen > 200


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"3", "'step'"),
        (b"null", "'step'"),
        (b'{"step": 6, "numbers": {}, "tensors": []}', "is that of step 6"),
        (b'{"step": 5, "numbers": {"a": "b"}, "tensors": []}', "'a' is no int"),
        (b'{"step": 5, "numbers": {}, "tensors": [3]}', "'name' is no str"),
    ],
    ids=range(8),
)
def test_headers_that_are_none(store, header, why):
    refused(store, sealed(header, b""), why)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": "float63"}, "dtype 'float63'"),
        ({"dtype": "Tensor"}, "dtype 'Tensor'"),
        ({"shape": [-6]}, "shape [-6]"),
        ({"shape": [6, 2**62]}, "which is not in its bytes"),
        ({"shape": [2**70, 0]}, "which is not in its bytes"),
        ({"shape": [7_000]}, "which is not in its bytes"),
        ({"at": 64 * 10**6}, "which is not in its bytes"),
        ({"at": 8}, "which is not in its bytes"),
        ({"at": -64}, "which is not in its bytes"),
        ({"name": "rows"}, "two tensors 'rows'"),
    ],
    ids=str,
)
def test_tensors_that_are_not_there(store, change, why):
    header, data = taken_apart(file_of(store).read_bytes())
    header["tensors"][0] |= change
    refused(store, sealed(json.dumps(header).encode(), data), why)


def test_bytes_at_random(store):
    """Cut, extended, overwritten at random, with a right or a wrong checksum."""
    content, rng = file_of(store).read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            kind, at = rng.randrange(4), rng.randrange(len(damaged) or 1)
            if kind == 0:
                del damaged[at:]
            elif kind == 1:
                damaged[at:at] = rng.randbytes(rng.randint(1, 70))
            else:
                damaged[at : at + 4] = rng.randbytes(4)
        if rng.random() < 0.5 and len(damaged) >= 24:
            length = min(int.from_bytes(damaged[16:20], "little"), len(damaged) - 24)
            damaged = sealed(bytes(damaged[24 : 24 + length]), bytes(damaged[24 + length :]))
        if damaged == content:
            continue
        file_of(store).write_bytes(damaged)
        with pytest.raises(pfde.SnapshotError, match=REFUSED):
            store.get(5, DISK)


@pytest.mark.parametrize("says", [False, True])
def test_a_file_of_a_terabyte(store, says):
    """Sparse, so that it takes no room; whether its prefix says so too or not: no memory is asked for."""
    path = file_of(store)
    if says:
        prefix = bytearray(path.read_bytes())
        prefix[8:16] = struct.pack("<Q", 10**12)
        path.write_bytes(prefix)
    os.truncate(path, 10**12)
    with pytest.raises(pfde.SnapshotError, match=REFUSED):
        store.get(5, DISK)


def test_no_memory_for_a_file(store, monkeypatch):
    def full(_):
        raise MemoryError

    monkeypatch.setattr(module, "bytearray", full, raising=False)
    with pytest.raises(pfde.SnapshotError, match=r"takes \d+ bytes, for which there is no memory"):
        store.get(5, DISK)


# -- paths -------------------------------------------------------------------------------------------------------------


class Raw:
    """An os.PathLike of bytes."""

    def __fspath__(self):
        return b"/tmp"


@pytest.mark.parametrize(
    "make",
    [
        lambda directory: SnapshotStore(directory),
        lambda directory: Revolve(1, on_disk=1, directory=directory),
        lambda directory: Revolve(memory="1MB", on_disk=1, directory=directory),
        lambda directory: Online(1, on_disk=1, directory=directory),
        lambda directory: Foreign(MultistageCheckpointSchedule(10, 1, 1), directory),
    ],
    ids=["store", "revolve", "memory", "online", "foreign"],
)
@pytest.mark.parametrize(
    ("directory", "error", "why"),
    [
        (b"/tmp", TypeError, "must be a path as text: got b'/tmp'; give a str or os.PathLike"),
        (Raw(), TypeError, "must be a path as text: got"),
        (3, TypeError, "must be a path as text: got 3"),
        (True, TypeError, "must be a path as text: got True"),
        (["a"], TypeError, "must be a path as text: got"),
        ("a\0b", ValueError, "must not have a NUL character: got 'a"),
        (Path("a\0b"), ValueError, "must not have a NUL character"),
        ("a\ud800", ValueError, "must be a path that the file system can name"),
    ],
    ids=range(8),
)
def test_directories_that_are_no_paths(make, directory, error, why):
    with pytest.raises(error, match=f"directory {why}"):
        make(directory)


@pytest.mark.parametrize("history", ["exponentials", "exact"])
def test_a_relative_directory_and_a_change_of_directory(folder, monkeypatch, history):
    """The folder is that of the forward pass: read from there in the backward pass, used again, and removed."""
    home, elsewhere = folder / "home", folder / "elsewhere"
    for path in (home, elsewhere):
        path.mkdir()
    (home / "snapshots").mkdir()
    monkeypatch.chdir(home)
    solve = Solve("euler", history, discrete(Revolve(1, on_disk=2, leaf=5, directory="snapshots")))
    monkeypatch.chdir(elsewhere)
    assert_same(solve.backward(retain_graph=True), store_all("euler", history))
    assert left_in(home / "snapshots") == []
    assert_same(solve.backward(), store_all("euler", history))  # computed anew, with snapshots where they were
    assert left_in(home / "snapshots") == [] and list(elsewhere.iterdir()) == []


def test_a_relative_directory_and_adaptive_steps(folder, monkeypatch):
    (folder / "snapshots").mkdir()
    monkeypatch.chdir(folder)
    rate = torch.ones((), dtype=torch.float64, requires_grad=True)
    gradient = discrete(Online(1, on_disk=2, leaf=2, directory="snapshots"))
    y0, t = torch.ones(3, dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    y = pfde.odeint(lambda t, y: -rate * y, y0, t, params=[rate], gradient=gradient)
    assert left_in(folder / "snapshots")
    monkeypatch.chdir("/")
    first, second = (torch.autograd.grad(y[-1].sum(), rate, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and left_in(folder / "snapshots") == []
