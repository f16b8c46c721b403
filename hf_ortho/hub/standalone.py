"""Copy definitions of this package, with all that they need of it, into one source text that imports nothing of it."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from ..errors import HfOrthoError

PACKAGE = __name__.split(".")[0]
DOCSTRING = ""
# What evaluates a function. Of a class these members are copied, and those that they mention.
EVALUATION = frozenset({DOCSTRING, "__init__", "value", "scratch_rows", "series", "cpu_series", "family"})


@dataclasses.dataclass(frozen=True)
class _Parsed:
    lines: list[str]
    definitions: dict[str, ast.stmt]
    imports: dict[str, tuple[str, str]]  # the local name to (module, name in it or empty)


@functools.cache
def _parsed(module: ModuleType) -> _Parsed:
    text = Path(str(module.__file__)).read_text(encoding="utf-8")
    definitions: dict[str, ast.stmt] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            imports |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            place = importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__)
            imports |= {alias.asname or alias.name: (place, alias.name) for alias in node.names}
        else:
            definitions |= dict.fromkeys(_targets(node), node)
    return _Parsed(text.splitlines(), definitions, imports)


def _targets(node: ast.stmt) -> list[str]:
    """The names that a statement binds."""
    if isinstance(node, ast.Expr):
        return [DOCSTRING]
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _lines(parsed: _Parsed, node: ast.stmt) -> list[str]:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return parsed.lines[first - 1 : node.end_lineno]


class Standalone:
    """Definitions in an order in which they can be executed, and the imports that they need."""

    def __init__(self) -> None:
        self._imports: set[tuple[str, str, str]] = set()
        self._sources: dict[str, str] = {}
        self._origin: dict[str, str] = {}

    def need(self, place: str, name: str = "") -> None:
        """Import the module ``place``, or ``name`` from it."""
        self._imports.add((place, name, name or place))

    def add(
        self, module: ModuleType, name: str, *, members: Iterable[str] = (), without: Iterable[str] = (), own: str = ""
    ) -> None:
        """Copy the definition ``name`` of ``module`` and, before it, what it mentions of this package.

        Args:
            members: of a class, what to copy beside ``EVALUATION``.
            without: of a class, what to leave out in any case.
            own: the text that a class begins with in their place.

        Raises:
            HfOrthoError: two modules define different things of that name.
        """
        if name in self._origin:
            if self._origin[name] != module.__name__:
                raise HfOrthoError(f"{name} is defined in both {self._origin[name]} and {module.__name__}: rename one")
            return
        self._origin[name] = module.__name__
        parsed = _parsed(module)
        node = parsed.definitions[name]
        if isinstance(node, ast.ClassDef):
            kept = _kept(node, EVALUATION.union(members) - set(without), set(without))
            header = parsed.lines[node.lineno - 1 : node.body[0].lineno - 1]
            nodes: list[ast.AST] = [*node.bases, *kept]
            text = "\n".join([*header, own + "\n".join(_body(parsed, kept))])
        else:
            nodes, text = [node], "\n".join(_lines(parsed, node))
        for alias, target in self._mentioned(parsed, module, nodes):
            text = re.sub(rf"\b{re.escape(alias)}\b", target, text)
        self._sources[name] = text

    def _mentioned(self, parsed: _Parsed, module: ModuleType, nodes: list[ast.AST]) -> list[tuple[str, str]]:
        """Add what the nodes mention; returns (``module.name``, ``name``) of what they reach through a module."""
        renamed = []
        found = [inner for node in nodes for inner in ast.walk(node)]
        through = {id(n.value): n.attr for n in found if isinstance(n, ast.Attribute)}
        for inner in found:
            if not isinstance(inner, ast.Name):
                continue
            if inner.id in parsed.definitions:
                self.add(module, inner.id)
            elif inner.id in parsed.imports:
                place, attribute = parsed.imports[inner.id]
                if place.split(".")[0] != PACKAGE:
                    self._imports.add((place, attribute, inner.id))
                elif importlib.util.find_spec(place).submodule_search_locations is None:  # type: ignore[union-attr]
                    self.add(importlib.import_module(place), attribute)
                else:  # a module of the package
                    self.add(importlib.import_module(f"{place}.{attribute}"), through[id(inner)])
                    renamed.append((f"{inner.id}.{through[id(inner)]}", through[id(inner)]))
        return renamed

    @property
    def imports(self) -> str:
        plain, names = set(), defaultdict(set)
        for place, attribute, alias in self._imports:
            if attribute:
                names[place].add(attribute if alias == attribute else f"{attribute} as {alias}")
            else:
                plain.add(f"import {place}" if alias == place else f"import {place} as {alias}")
        return "\n".join(
            [*sorted(plain), *(f"from {place} import {', '.join(sorted(names[place]))}" for place in sorted(names))]
        )

    @property
    def definitions(self) -> str:
        """Constants on lines of their own, blank lines around the others."""
        text = "\n\n\n".join(self._sources.values())
        return re.sub(r"(?m)^(\w+ = .*)\n\n\n(?=\w+ = )", r"\1\n", text)


def _kept(node: ast.ClassDef, wanted: set[str] | frozenset[str], without: set[str]) -> list[ast.stmt]:
    """The members ``wanted``, and those that these mention as attributes."""
    while True:
        kept = [n for n in node.body if not wanted.isdisjoint(_targets(n))]
        mentioned = {n.attr for member in kept for n in ast.walk(member) if isinstance(n, ast.Attribute)} - without
        if wanted >= mentioned:
            return kept
        wanted = wanted | mentioned


def _body(parsed: _Parsed, members: list[ast.stmt]) -> list[str]:
    lines: list[str] = []
    for i, member in enumerate(members):
        function = isinstance(member, ast.FunctionDef)
        if i and (function or isinstance(members[i - 1], (ast.FunctionDef, ast.Expr))):
            lines.append("")
        lines += _lines(parsed, member)
    return lines
