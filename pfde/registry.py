"""Registries: names and what they stand for, filled by the files that define it.

    METHODS: Registry[Scheme] = Registry("method")

    @METHODS.register("euler")
    class Euler(Scheme): ...

A file in a folder that has such a registry is found by `discover`: to add one of a kind is to add a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Generic, TypeVar

T = TypeVar("T")
Maker = TypeVar("Maker", bound=Callable[[], object])


class Registry(Mapping[str, T], Generic[T]):
    """Names, in the order of `rank` and then of registration, and what they stand for, made when first asked for."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._makers: dict[str, Callable[[], T]] = {}
        self._ranks: dict[str, int] = {}
        self._made: dict[str, T] = {}

    def register(self, name: str, *, rank: int = 0) -> Callable[[Maker], Maker]:
        """Decorate what makes it: a class without arguments, or a function. Raises ValueError for a name twice."""

        def add(maker: Maker) -> Maker:
            self.add(name, maker, rank=rank)  # type: ignore[arg-type]
            return maker

        return add

    def add(self, name: str, maker: Callable[[], T], *, rank: int = 0) -> None:
        """The same without a decorator."""
        if name in self._makers:
            raise ValueError(f"{self.kind} {name!r} is registered twice: give one of them another name")
        self._makers[name], self._ranks[name] = maker, rank

    def __getitem__(self, name: str) -> T:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers  # Mapping's own would make it

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._makers, key=self._ranks.__getitem__))

    def __len__(self) -> int:
        return len(self._makers)


def discover(package: str, path: list[str]) -> None:
    """Import all modules of a package, so that they register what they define."""
    for module in iter_modules(path):
        import_module(f"{package}.{module.name}")
