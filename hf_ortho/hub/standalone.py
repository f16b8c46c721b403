"""Copy definitions of this package, with their dependencies in it, into one source text that does not import it."""

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
# Members that evaluate a function: these, and the members that they mention, are copied from a class.
EVALUATION = frozenset({DOCSTRING, "__init__", "value", "scratch_rows", "series", "cpu_series", "family"})


@dataclasses.dataclass(frozen=True)
class _Parsed:
    lines: list[str]
    definitions: dict[str, ast.stmt]
    imports: dict[str, tuple[str, str]]  # local name to (module, name in the module or empty)


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
    """Definitions in executable order, with their imports.

    ``add`` parses the module of a definition and finds the names it mentions. Names from this package are added first,
    recursively, so every definition follows its dependencies. Other names become imports. References through a module
    of the package, such as ``formula.horner``, are rewritten to the bare name. The names of all definitions must
    therefore be unique.
    """

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
        """Copy the definition ``name`` of ``module``, preceded by its dependencies in this package.

        Args:
            members: for a class: members to copy in addition to ``EVALUATION``.
            without: for a class: members to leave out.
            own: for a class: text that replaces the omitted members.

        Raises:
            HfOrthoError: two modules define the same name.
        """
        if name in self._origin:
            if self._origin[name] != module.__name__:
                raise HfOrthoError(f"{name} is defined in both {self._origin[name]} and {module.__name__}; rename one")
            return
        self._origin[name] = module.__name__
        parsed = _parsed(module)
        node = parsed.definitions[name]
        if isinstance(node, ast.ClassDef):
            chosen = _chosen(node, EVALUATION.union(members) - set(without), set(without))
            header = parsed.lines[node.lineno - 1 : node.body[0].lineno - 1]
            nodes: list[ast.AST] = [*node.bases, *chosen]
            text = "\n".join([*header, own + "\n".join(_body(parsed, chosen))])
        else:
            nodes, text = [node], "\n".join(_lines(parsed, node))
        for alias, target in self._mentioned(parsed, module, nodes):
            text = re.sub(rf"\b{re.escape(alias)}\b", target, text)
        self._sources[name] = text

    def _mentioned(self, parsed: _Parsed, module: ModuleType, nodes: list[ast.AST]) -> list[tuple[str, str]]:
        """Add the dependencies of the nodes; returns (``module.name``, ``name``) for references through a module."""
        renamed = []
        descendants = [inner for node in nodes for inner in ast.walk(node)]
        through = {id(n.value): n.attr for n in descendants if isinstance(n, ast.Attribute)}
        for inner in descendants:
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
        """The source text: constants on consecutive lines, blank lines around other definitions."""
        text = "\n\n\n".join(self._sources.values())
        return re.sub(r"(?m)^(\w+ = .*)\n\n\n(?=\w+ = )", r"\1\n", text)


def _chosen(node: ast.ClassDef, names: set[str] | frozenset[str], without: set[str]) -> list[ast.stmt]:
    """The members ``names`` of a class, and recursively the members that they mention as attributes."""
    while True:
        chosen = [n for n in node.body if not names.isdisjoint(_targets(n))]
        mentioned = {n.attr for member in chosen for n in ast.walk(member) if isinstance(n, ast.Attribute)} - without
        if names >= mentioned:
            return chosen
        names = names | mentioned


def _body(parsed: _Parsed, members: list[ast.stmt]) -> list[str]:
    lines: list[str] = []
    for i, member in enumerate(members):
        function = isinstance(member, ast.FunctionDef)
        if i and (function or isinstance(members[i - 1], (ast.FunctionDef, ast.Expr))):
            lines.append("")
        lines += _lines(parsed, member)
    return lines
