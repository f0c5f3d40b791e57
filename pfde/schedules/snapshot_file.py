"""A snapshot as one file, which is what was written or is refused: layout, checksum, errors.

A snapshot is the data from which a solve can be resumed at a step: named tensors and numbers. Its file is laid out as

    offset  bytes
    0       8       magic, b"PFDESNP1"
    8       8       size of the file
    16      4       size H of the header                                      (integers little-endian)
    20      4       CRC-32 of everything else: bytes 8 to 19, and 24 to the end
    24      H       header, JSON: step, numbers, and name, dtype, shape, device, offset of every tensor
    ...             the tensors' bytes in the machine's order, each at a multiple of 64 from the start

NOTE 1. The checksum is CRC-32 because it costs little beside the disk (4 GB/s on our machine, where BLAKE2b
makes 0.9) and suffices: what it is to find is decay and truncation, not forgery. It finds every error of one bit and
every burst of up to 32, and misses another with probability 2^-32. Who wrote a file remembers its size and checksum: a
file that is whole but another one is refused before any of it is believed, or memory asked for.

NOTE 2. A file is written under another name, flushed to the device, and only then renamed, so that under its own name
there is always a whole snapshot.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import SnapshotError

_MAGIC = b"PFDESNP1"
_PREFIX = struct.Struct("<8sQII")
_ALIGN = 64
_LONGEST = 2**48  # of a dimension; of an empty tensor nothing else bounds it
_DTYPES = {str(x).removeprefix("torch."): x for x in vars(torch).values() if isinstance(x, torch.dtype)}


class Snapshot(NamedTuple):
    """Named tensors of any floating or integer dtype, any shape and device, and named small numbers."""

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, int | float]

    @property
    def bytes(self) -> int:
        """What the tensors weigh."""
        return sum(x.numel() * x.element_size() for x in self.tensors.values())


class Written(NamedTuple):
    """What the one who wrote a file remembers of it."""

    size: int
    checksum: int


class Loaded(NamedTuple):
    """A snapshot as read, on the CPU, and where its tensors belong."""

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, int | float]
    devices: dict[str, str]


def write_snapshot(path: Path, n: int, snapshot: Snapshot) -> Written:
    """The snapshot under this name, on the device when this returns; nothing under any name if it fails."""
    prefix, header, pieces = _encode(n, snapshot)
    _, size, _, checksum = _PREFIX.unpack(prefix)
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
        raise not_written(n, path, error) from error
    return Written(size, checksum)


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


def read_snapshot(path: Path, n: int, written: Written) -> Loaded:
    """What `write_snapshot` wrote, checked; the tensors share one buffer, which they own."""
    try:
        content = _content(path, written)
        loaded = _decode(content, n)
        if _PREFIX.unpack_from(content)[3] != written.checksum:
            raise _UnusableError("is whole, but not what was written")
        return loaded
    except _UnusableError as error:
        why = str(error)
    except OSError as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    except MemoryError:
        why = f"takes {written.size} bytes, for which there is no memory"
    raise SnapshotError(
        f"the snapshot of step {n} cannot be used: {path} {why}; was it touched, or is the disk failing? "
        "solve again, with another directory=..."
    )


class _UnusableError(Exception):
    """Why a file is not used, as what follows its name."""


def _content(path: Path, written: Written) -> bytearray:
    """All bytes of the file, whose size and checksum are those written."""
    with open(path, "rb") as file:
        got = os.fstat(file.fileno()).st_size
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size:
            raise _UnusableError(f"is truncated to {len(prefix)} bytes")
        magic, size, length, checksum = _PREFIX.unpack(prefix)
        if magic != _MAGIC:
            raise _UnusableError("does not begin as a snapshot does")
        if got != size or _PREFIX.size + length > size:
            raise _UnusableError(f"has {got} bytes and says {size}: truncated or damaged")
        if size > written.size:  # before its size is asked for in memory
            raise _UnusableError(f"has {size} bytes, where {written.size} were written: another file")
        content = bytearray(size)
        view = memoryview(content)
        view[: _PREFIX.size], got = prefix, _PREFIX.size
        while got < size and (more := file.readinto(view[got:])):
            got += more
    if got != size:
        raise _UnusableError(f"has {got} bytes and says {size}: truncated or damaged")
    if _checksum(size, length, (view[_PREFIX.size :],)) != checksum:
        raise _UnusableError("is damaged: its checksum differs")
    return content


def _decode(content: bytearray, n: int) -> Loaded:
    """The snapshot of step n from the bytes of a whole file; nothing of its header is taken on trust."""
    start = _PREFIX.size + _PREFIX.unpack_from(content)[2]
    try:
        header = json.loads(bytes(memoryview(content)[_PREFIX.size : start]))
    except (ValueError, RecursionError) as error:
        raise _UnusableError("has a header that is no JSON") from error
    step = _field(header, "step", int)
    if step != n:
        raise _UnusableError(f"is that of step {step}")
    numbers, entries = _field(header, "numbers", dict), _field(header, "tensors", list)
    for name in numbers:
        _field(numbers, name, int, float)
    tensors: dict[str, torch.Tensor] = {}
    devices: dict[str, str] = {}
    for entry in entries:
        name, device = _field(entry, "name", str), _field(entry, "device", str)
        if name in tensors:
            raise _UnusableError(f"has two tensors {name!r} in its header")
        tensors[name], devices[name] = _tensor(content, entry, start), device
    return Loaded(tensors, numbers, devices)


def _field(entry: Any, name: str, *kinds: type) -> Any:
    """An entry of the header, of one of these types."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise _UnusableError(f"has a header whose {name!r} is no {kinds[0].__name__}")
    return value


def _tensor(content: bytearray, entry: dict[str, Any], start: int) -> torch.Tensor:
    """A view of the file's bytes as the tensor that the entry describes."""
    kind, shape, at = _field(entry, "dtype", str), _field(entry, "shape", list), _field(entry, "at", int)
    dtype, count = _DTYPES.get(kind), 1
    for length in shape:
        if isinstance(length, bool) or not isinstance(length, int) or length < 0:
            raise _UnusableError(f"has a tensor of shape {shape} in its header")
        count *= length
    if dtype is None:
        raise _UnusableError(f"has a tensor of dtype {kind!r} in its header")
    beyond = count * dtype.itemsize + at + start > max(len(content), at + start) or max(shape, default=0) > _LONGEST
    if at < 0 or at % _ALIGN or beyond:
        raise _UnusableError(f"has a tensor of {count} x {kind} at {at} in its header, which is not in its bytes")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start + at).reshape(shape)


def not_written(n: int, path: Path, error: OSError) -> SnapshotError:
    """What to raise where the snapshot of step n could not be written."""
    return SnapshotError(
        f"the snapshot of step {n} could not be written to {path}: {error.strerror}; "
        "free space there, name another directory=..., or allow fewer snapshots on disk"
    )
