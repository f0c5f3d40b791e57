"""How a flat state maps to what the user calls y: one tensor or a tuple of them, real or complex."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .real import real


@dataclass(frozen=True)
class StateLayout:
    """How a flat state of shape (d,) maps to what the user calls y: one tensor, or a tuple of them.

    A complex entry is two real ones, its real and its imaginary part, next to each other.

    shapes : of the parts
    is_tuple : whether the user's y is a tuple
    is_complex : for each part, whether it is complex; () when none is
    narrow : the dtype of the user's tensors where it is too narrow to integrate in (float16, bfloat16); else None
    """

    shapes: tuple[torch.Size, ...]
    is_tuple: bool
    is_complex: tuple[bool, ...] = ()
    narrow: torch.dtype | None = None

    @property
    def plain(self) -> bool:
        """Whether y is one real tensor of the state's dtype."""
        return not self.is_tuple and not self.is_complex and self.narrow is None

    @property
    def size(self) -> int:
        """d, the real entries of a state."""
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        if not self.is_complex:
            return [shape.numel() for shape in self.shapes]
        return [shape.numel() << z for shape, z in zip(self.shapes, self.is_complex, strict=True)]

    def unflatten(self, y: Tensor) -> Any:
        """Views of the last dimension of y, (..., d), in the user's shapes."""
        if self.narrow is not None:
            y = y.to(self.narrow)
        if not self.is_tuple:
            return self._part(0, y) if self.is_complex else y.view((*y.shape[:-1], *self.shapes[0]))
        return tuple(self._part(i, part) for i, part in enumerate(torch.split(y, self._sizes, dim=-1)))

    def finish(self, y: Tensor) -> Any:
        """Outputs, (T, d) or already in y's shape, as the user is given them.

        A tensor in its shape is given as it is: a view of it would hide the node that it came from from Python's
        garbage collector.
        """
        return y if self.plain and y.shape[1:] == self.shapes[0] else self.unflatten(y)

    def _part(self, i: int, y: Tensor) -> Tensor:
        if self.is_complex and self.is_complex[i]:
            pairs = y.reshape((*y.shape[:-1], *self.shapes[i], 2))
            return torch.view_as_complex(pairs if pairs.numel() else pairs.clone())  # nothing may lie at an odd place
        return y.reshape((*y.shape[:-1], *self.shapes[i]))

    def flatten(self, value: Any, dtype: torch.dtype, source: str, *, cast: bool = False) -> Tensor:
        """The flat tensor of a value of this layout. Raises TypeError or ValueError when it is of another."""
        if not self.is_tuple:
            return self._flat(0, value, dtype, source, cast)
        if not isinstance(value, tuple | list) or len(value) != len(self.shapes):
            raise TypeError(f"{source} must return a tuple of {len(self.shapes)} tensors like y: got {describe(value)}")
        return torch.cat([self._flat(i, part, dtype, source, cast) for i, part in enumerate(value)])

    def _flat(self, i: int, value: Any, dtype: torch.dtype, source: str, cast: bool) -> Tensor:
        value = self.accept(i, value, dtype, source, cast=cast)
        return real(value).reshape(-1)

    def accept(self, i: int, value: Any, dtype: torch.dtype, source: str, *, cast: bool = False) -> Tensor:
        """A value as part i, dense. Raises TypeError or ValueError unless it is one.

        cast : whether another floating-point dtype is converted
        """
        shape, is_complex = self.shapes[i], bool(self.is_complex) and self.is_complex[i]
        if not isinstance(value, Tensor):
            if self.is_tuple:
                raise TypeError(f"{source} must return tensors like y: got {type(value).__name__} in its tuple")
            raise TypeError(f"{source} must return a tensor like y: got {describe(value)}")
        if is_complex:
            dtype = dtype.to_complex()
        if value.shape != shape:
            raise ValueError(f"{source} must return the shape of y, {tuple(shape)}: got {tuple(value.shape)}")
        if value.layout != torch.strided:
            value = value.to_dense()
        same = value.dtype == dtype
        if same or (cast and value.dtype.is_floating_point and not is_complex):
            accepted: Tensor = value if same else value.to(dtype)
            return accepted
        raise TypeError(f"{source} must return the dtype of y, {dtype}: got {value.dtype}; convert its result")


def describe(value: Any) -> str:
    """What a value is, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
