"""Where snapshots are kept: in memory, or on disk in one file each that is what was written or is refused.

A snapshot is the data from which a solve can be resumed at a step: named tensors and numbers. The memory tier holds
copies. The disk tier holds files in a folder of their own, `pfde-<host>-<pid>-<random>`, laid out as

    offset  bytes
    0       8       magic, b"PFDESNP1"
    8       8       size of the file
    16      4       size H of the header                                      (integers little-endian)
    20      4       CRC-32 of everything else: bytes 8 to 19, and 24 to the end
    24      H       header, JSON: step, numbers, and name, dtype, shape, device, offset of every tensor
    ...             the tensors' bytes in the machine's order, each at a multiple of 64 from the start

NOTE 1. The checksum is CRC-32 because it costs little beside the disk (4 GB/s on our machine, where BLAKE2b
makes 0.9) and suffices: what it is to find is decay and truncation, not forgery. It finds every error of one bit and
every burst of up to 32, and misses another with probability 2^-32.

NOTE 2. A file is written under another name, flushed to the device, and only then renamed, so that under its own name
there is always a whole snapshot. A process that is killed leaves its folder behind; the next store created with the
same directory by the same user on the same host removes it. Processes in different containers that share a directory
need different host names, since one cannot see whether the other's process is alive.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import struct
import tempfile
import weakref
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from checkpoint_schedules import StorageType

from ..errors import SnapshotError

_MAGIC = b"PFDESNP1"
_PREFIX = struct.Struct("<8sQII")
_ALIGN = 64


class Snapshot(NamedTuple):
    """Named tensors of any floating or integer dtype, any shape and device, and named small numbers."""

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, int | float]

    @property
    def bytes(self) -> int:
        """What the tensors weigh."""
        return sum(x.numel() * x.element_size() for x in self.tensors.values())


class SnapshotStore:
    """Snapshots by step and tier, StorageType.RAM or DISK; owned and used by one solve, in one thread.

    `directory` is where the folder of the disk tier is made, at the first snapshot that goes there (None: the system's
    folder for temporary files). `prefetch=False` makes the method of that name do nothing. The folder goes with
    `close`, at the latest with the store or the process; folders of processes that were killed are removed here.

    `count` snapshots are held, in both tiers together; `snapshots_peak` and `bytes_peak` are the most there have been
    at a time, `memory_peak` the most bytes of the memory tier alone. Buffers of discarded snapshots are reused for the
    next of the same shapes, so that they count until then; a snapshot being loaded or prefetched is not counted.

    SnapshotError, naming step and file, when a snapshot cannot be written, is missing, or is not what was written.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, *, prefetch: bool = True) -> None:
        self.directory = Path(tempfile.gettempdir() if directory is None else directory)
        self.snapshots_peak = self.bytes_peak = self.memory_peak = 0
        self._prefetch = prefetch
        self._memory: dict[int, Snapshot] = {}
        self._disk: dict[int, int] = {}  # step: bytes
        self._pool: list[torch.Tensor] = []
        self._coming: dict[int, Future[_Loaded]] = {}
        self._reader: ThreadPoolExecutor | None = None
        self._folder: Path | None = None
        self._remove: weakref.finalize | None = None
        self._closed = False
        _sweep(self.directory)

    def __enter__(self) -> SnapshotStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def count(self) -> int:
        """Snapshots held, in memory and on disk."""
        return len(self._memory) + len(self._disk)

    @property
    def on_disk(self) -> int:
        """Snapshots held on disk."""
        return len(self._disk)

    def holds(self, n: int, storage: StorageType) -> bool:
        """Whether there is a snapshot of step n in this tier."""
        return n in self._tier(storage)

    def put(self, n: int, snapshot: Snapshot, storage: StorageType) -> None:
        """Keep a copy of the snapshot as that of step n in this tier, in place of an earlier one."""
        if self._closed:
            raise ValueError("store must be open to take a snapshot: got a closed one; make a new one")
        if self.holds(n, storage):
            self.discard(n, storage)
        if storage is StorageType.RAM:
            copies = {name: self._copy(x) for name, x in snapshot.tensors.items()}
            self._pool.clear()  # what did not fit this one is not kept for another: memory stays that of the peak
            self._memory[n] = Snapshot(copies, dict(snapshot.numbers))
        else:
            _write(self._path(n), n, snapshot)
            self._disk[n] = snapshot.bytes
        self._note_peaks()

    def get(self, n: int, storage: StorageType) -> Snapshot:
        """The snapshot of step n: from memory the tensors held, to be read until it is discarded, and not written to.

        From disk new tensors, on the devices the snapshot came from.
        """
        self._require(n, storage)
        if storage is StorageType.RAM:
            return self._memory[n]
        coming = self._coming.pop(n, None)
        tensors, numbers, devices = coming.result() if coming else _read(self._path(n), n)
        return Snapshot({name: x.to(devices[name]) for name, x in tensors.items()}, numbers)

    def move(self, n: int, source: StorageType, target: StorageType) -> None:
        """From one tier to the other; to StorageType.NONE it is discarded."""
        self._require(n, source)
        if target is not StorageType.NONE and target is not source:
            self.put(n, self.get(n, source), target)
        if target is not source:
            self.discard(n, source)

    def discard(self, n: int, storage: StorageType) -> None:
        """Give up the snapshot of step n in this tier; its buffers in memory may hold another one next."""
        self._require(n, storage)
        if storage is StorageType.RAM:
            self._pool.extend(self._memory.pop(n).tensors.values())
            return
        coming = self._coming.pop(n, None)
        if coming is not None and not coming.cancel():
            coming.exception()  # the file is being read: wait
        del self._disk[n]
        with suppress(OSError):
            self._path(n).unlink()

    def prefetch(self, n: int) -> None:
        """Start reading step n from disk in the background; `get` will wait for it. Nothing if it is not there."""
        if not self._prefetch or n not in self._disk or n in self._coming:
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pfde-snapshots")
        self._coming[n] = self._reader.submit(_read, self._path(n), n)

    def clear(self) -> None:
        """Give up all snapshots, the buffers and the folder; peaks are kept, and the store can be used again."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._reader = None
        self._coming.clear()
        self._memory.clear()
        self._disk.clear()
        self._pool.clear()
        if self._remove is not None:
            self._remove()
        self._folder = self._remove = None

    def close(self) -> None:
        """Clear, and take no more snapshots."""
        self.clear()
        self._closed = True

    def _tier(self, storage: StorageType) -> dict[int, Snapshot] | dict[int, int]:
        if storage is StorageType.RAM:
            return self._memory
        if storage is StorageType.DISK:
            return self._disk
        raise ValueError(f"storage must be StorageType.RAM or StorageType.DISK: got {storage!r}; name one of the two")

    def _require(self, n: int, storage: StorageType) -> None:
        if not self.holds(n, storage):
            where = "memory" if storage is StorageType.RAM else f"disk, {self._folder or self.directory}"
            raise SnapshotError(f"no snapshot of step {n} is held in {where}; it was never kept, or was discarded")

    def _copy(self, x: torch.Tensor) -> torch.Tensor:
        """x in a buffer of its own, one from the pool if it matches."""
        x = x.detach()
        for i, buffer in enumerate(self._pool):
            if buffer.shape == x.shape and buffer.dtype == x.dtype and buffer.device == x.device:
                return self._pool.pop(i).copy_(x)
        return x.clone(memory_format=torch.contiguous_format)

    def _note_peaks(self) -> None:
        memory = sum(snapshot.bytes for snapshot in self._memory.values())
        self.snapshots_peak = max(self.snapshots_peak, self.count)
        self.memory_peak = max(self.memory_peak, memory)
        self.bytes_peak = max(self.bytes_peak, memory + sum(self._disk.values()))

    def _path(self, n: int) -> Path:
        """The file of step n, in the folder, which is made now if need be."""
        if self._folder is None:
            prefix = f"pfde-{socket.gethostname()}-{os.getpid()}-"
            folder = self.directory / f"{prefix}{secrets.token_hex(6)}"
            remove = weakref.finalize(self, _remove_own, folder, os.getpid())  # first: Ctrl-C may come in between
            try:
                os.mkdir(folder, 0o700)
            except OSError as error:
                remove.detach()
                raise _not_written(n, self.directory / f"{prefix}*", error) from error
            self._folder, self._remove = folder, remove
        return self._folder / f"step-{n}.snapshot"


class _Loaded(NamedTuple):
    """A snapshot as read, on the CPU, and where its tensors belong."""

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, int | float]
    devices: dict[str, str]


def _write(path: Path, n: int, snapshot: Snapshot) -> None:
    """The snapshot under this name, on the device when this returns; nothing under any name if it fails."""
    prefix, header, pieces = _encode(n, snapshot)
    temporary = path.with_suffix(".partial")
    try:
        try:
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                _write_all(file, [memoryview(prefix), memoryview(header), *pieces])
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise _not_written(n, path, error) from error


def _encode(n: int, snapshot: Snapshot) -> tuple[bytes, bytes, list[memoryview]]:
    """Prefix, header and the tensors' bytes with what pads them; the tensors on the CPU are not copied."""
    entries: list[dict[str, object]] = []
    pieces: list[memoryview] = []
    offset = 0
    for name, x in snapshot.tensors.items():
        dtype = str(x.dtype).removeprefix("torch.")
        entries.append({"name": name, "dtype": dtype, "shape": list(x.shape), "device": str(x.device), "at": offset})
        array = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        content = memoryview(array)  # type: ignore[arg-type]  # numpy's annotation before Python 3.12
        padding = -len(content) % _ALIGN
        pieces += [content, memoryview(bytes(padding))]
        offset += len(content) + padding
    header = json.dumps({"step": n, "numbers": snapshot.numbers, "tensors": entries}).encode()
    header += b" " * (-(_PREFIX.size + len(header)) % _ALIGN)
    size = _PREFIX.size + len(header) + offset
    checksum = _checksum(size, len(header), (header, *pieces))
    return _PREFIX.pack(_MAGIC, size, len(header), checksum), header, pieces


def _checksum(size: int, header: int, pieces: Iterable[bytes | bytearray | memoryview]) -> int:
    checksum = zlib.crc32(struct.pack("<QI", size, header))
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    return checksum


def _write_all(file: int, pieces: list[memoryview]) -> None:
    """os.write until all is written: one call writes at most 2 GiB."""
    for rest in pieces:
        while rest:
            rest = rest[os.write(file, rest) :]


def _sync_folder(folder: Path) -> None:
    """The name of a new file on the device, too."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _read(path: Path, n: int) -> _Loaded:
    """What `_write` wrote, checked; the tensors share one buffer, which they own."""

    def refuse(why: str) -> SnapshotError:
        return SnapshotError(
            f"the snapshot of step {n} cannot be used: {path} {why}; was it touched, or is the disk failing? "
            "solve again, with another directory=..."
        )

    try:
        with open(path, "rb") as file:
            content = bytearray(os.fstat(file.fileno()).st_size)
            view, got = memoryview(content), 0
            while got < len(content) and (more := file.readinto(view[got:])):
                got += more
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise refuse("is missing" if missing else f"cannot be read ({error.strerror})") from error
    if got < _PREFIX.size:
        raise refuse(f"is truncated to {got} bytes")
    magic, size, length, checksum = _PREFIX.unpack_from(content)
    if magic != _MAGIC:
        raise refuse("does not begin as a snapshot does")
    if got != size or _PREFIX.size + length > size:
        raise refuse(f"has {got} bytes and says {size}: truncated or damaged")
    if _checksum(size, length, (view[_PREFIX.size :],)) != checksum:
        raise refuse("is damaged: its checksum differs")
    start = _PREFIX.size + length
    header = json.loads(bytes(view[_PREFIX.size : start]))
    if header["step"] != n:
        raise refuse(f"is that of step {header['step']}")
    tensors = {entry["name"]: _tensor(content, entry, start) for entry in header["tensors"]}
    return _Loaded(tensors, header["numbers"], {entry["name"]: entry["device"] for entry in header["tensors"]})


def _tensor(content: bytearray, entry: dict, start: int) -> torch.Tensor:
    """A view of the file's bytes as the tensor that the entry describes."""
    dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start + entry["at"]).reshape(shape)


def _not_written(n: int, path: Path, error: OSError) -> SnapshotError:
    return SnapshotError(
        f"the snapshot of step {n} could not be written to {path}: {error.strerror}; "
        "free space there, name another directory=..., or allow fewer snapshots on disk"
    )


def _remove_own(folder: Path, pid: int) -> None:
    """Remove the folder, unless this is a fork of the process that made it; all of it, and Ctrl-C comes then."""
    if os.getpid() != pid:
        return
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sweep(directory: Path) -> None:
    """Remove this user's snapshot folders of processes of this host that are no longer alive."""
    pattern = re.compile(rf"pfde-{re.escape(socket.gethostname())}-([0-9]+)-[a-z0-9_]+")
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            match = pattern.fullmatch(entry.name)
            with suppress(OSError):
                if (
                    match is not None
                    and entry.is_dir(follow_symlinks=False)
                    and entry.stat(follow_symlinks=False).st_uid == os.getuid()
                    and not _alive(int(match[1]))
                ):
                    shutil.rmtree(entry.path, ignore_errors=True)


def _alive(pid: int) -> bool:
    """Whether a process of this number exists on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
