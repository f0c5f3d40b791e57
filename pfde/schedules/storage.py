"""Where snapshots are kept: in memory, or on disk in one file each that is what was written or is refused.

The memory tier holds copies. The disk tier holds files (`snapshot_file`) in a folder of their own,
`pfde-<host>-<pid>-<random>`.

NOTE 1. A process that is killed leaves its folder behind; the next store created with the same directory by the same
user on the same host removes it. Processes in different containers that share a directory need different host names,
since one cannot see whether the other's process is alive.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import tempfile
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from checkpoint_schedules import StorageType

from ..errors import SnapshotError
from .base import check_directory
from .snapshot_file import Loaded, Snapshot, Written, not_written, read_snapshot, write_snapshot


class SnapshotStore:
    """Snapshots by step and tier, StorageType.RAM or DISK; owned and used by one solve, in one thread.

    `directory` is where the folder of the disk tier is made, at the first snapshot that goes there (None: the system's
    folder for temporary files); a relative one is that of the working directory when the store was made.
    `prefetch=False` makes the method of that name do nothing. The folder goes with `close`, at the latest with the
    store or the process; folders of processes that were killed are removed here.

    `count` snapshots are held, in both tiers together; `snapshots_peak` and `bytes_peak` are the most there have been
    at a time, `memory_peak` the most bytes of the memory tier alone. Buffers of discarded snapshots are reused for the
    next of the same shapes, so that they count until then; a snapshot being loaded or prefetched is not counted.

    SnapshotError, naming step and file, when a snapshot cannot be written, is missing, or is not what was written.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, *, prefetch: bool = True) -> None:
        check_directory(directory)
        self.directory = Path(os.path.abspath(tempfile.gettempdir() if directory is None else os.fspath(directory)))
        self.snapshots_peak = self.bytes_peak = self.memory_peak = 0
        self._prefetch = prefetch
        self._memory: dict[int, Snapshot] = {}
        self._disk: dict[int, int] = {}  # step: bytes
        self._written: dict[int, Written] = {}
        self._pool: list[torch.Tensor] = []
        self._coming: dict[int, Future[Loaded]] = {}
        self._reader: ThreadPoolExecutor | None = None
        self._folder: Path | None = None
        self._remove: weakref.finalize[..., SnapshotStore] | None = None
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
            self._written[n] = write_snapshot(self._path(n), n, snapshot)
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
        tensors, numbers, devices = coming.result() if coming else self._read(n)
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
        self._coming[n] = self._reader.submit(read_snapshot, self._path(n), n, self._written[n])

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

    def _read(self, n: int) -> Loaded:
        return read_snapshot(self._path(n), n, self._written[n])

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
                raise not_written(n, self.directory / f"{prefix}*", error) from error
            self._folder, self._remove = folder, remove
        return self._folder / f"step-{n}.snapshot"


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
