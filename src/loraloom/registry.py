"""A technique is a plain function, the paper it comes from, and the laws it declares that it breaks.

A registry belongs to a package folder: every module in that folder is imported on first use, so a new technique is one
new file and nothing else. The command line, the tables in the docs and the contract tests read the registries.

    >>> from loraloom.strategies.schedules import schedules
    >>> schedules["linear"].function(0.5)
    0.5
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import ModuleType
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class UnknownName(ValueError):
    """A name that is not there; the message says which names are, nearest first."""

    def __init__(self, what: str, name: object, known: list[str]) -> None:
        self.what, self.name, self.known = what, name, known
        near = get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        told = repr(name) if len(repr(name)) < 300 else repr(name)[:80] + "..."
        super().__init__(f"{what} {told} is not known{hint}; allowed: {', '.join(known) or 'none'}")


@dataclass(frozen=True)
class Technique(Generic[P, T]):
    """One registered function with what the docs, the command line and the contract tests need to know of it."""

    name: str
    function: Callable[P, T]
    paper: str = ""
    breaks: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().split("\n")[0]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function itself."""
        return self.function(*args, **kwargs)


class Registry(Mapping[str, Technique[P, T]]):
    """The techniques of one package folder, by name, in alphabetical order; found by being there.

    Args:
        what: the singular noun of error messages ("schedule").
        package: dotted name of the folder's package.
    """

    def __init__(self, what: str, package: str) -> None:
        self.what, self.package = what, package
        self._found: dict[str, Technique[P, T]] = {}
        self._scanned = False

    def register(
        self, name: str, *, paper: str = "", breaks: tuple[str, ...] = (), **facts: Any
    ) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """Decorator: file the function under ``name`` and return it unchanged.

        Raises:
            ValueError: another function already has that name.
        """

        def add(function: Callable[P, T]) -> Callable[P, T]:
            if name in self._found:
                raise ValueError(f"{self.what} {name!r} is registered twice")
            self._found[name] = Technique(name, function, paper, breaks, facts)
            return function

        return add

    def _scan(self) -> dict[str, Technique[P, T]]:
        if not self._scanned:
            folder = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(folder.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            self._scanned = True
        return self._found

    def __getitem__(self, name: str) -> Technique[P, T]:
        found = self._scan()
        if name not in found:
            raise UnknownName(self.what, name, sorted(found))
        return found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._scan()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._scan()))

    def __len__(self) -> int:
        return len(self._scan())


def edge(name: str) -> ModuleType:
    """The module of ``integrations/`` that carries a pure plan out on a real model (``CoTo.applied`` and its like).

    Plans sit low in the house and know no framework; this is the one seam through which they reach up
    (docs/decisions/0002-plans-reach-their-edge-by-name.md).
    """
    return importlib.import_module(f"loraloom.integrations.{name}")
