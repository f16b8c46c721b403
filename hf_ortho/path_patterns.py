"""Short forms for the module paths of many layers, and evenly spaced selections."""

from __future__ import annotations

from collections.abc import Sequence


def thin(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` indices, evenly spaced, including the first and the last."""
    n = min(count, most)
    return [round(i * (count - 1) / max(n - 1, 1)) for i in range(n)]


def split_shared(paths: Sequence[str]) -> tuple[str, list[str]]:
    """``["h.0.mlp.act", "h.1.mlp.act"]`` to ``"h.*.mlp.act"`` and ``["0", "1"]``."""
    parts = [path.split(".") for path in paths]
    shortest = min(map(len, parts))
    head = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    if head == shortest:
        return (paths[0], ["*"]) if len(paths) == 1 else ("*", list(paths))
    most = shortest - head  # do not count a part at both ends
    tail = next((i for i in range(most) if len({p[-1 - i] for p in parts}) > 1), most)
    if any(len(p) == head + tail for p in parts):
        return "*", list(paths)
    rows = [".".join(p[head : len(p) - tail]) for p in parts]
    return ".".join([*parts[0][:head], "*", *parts[0][len(parts[0]) - tail :]]), rows


def by_kind(paths: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Group paths that differ only in numbers: pattern -> [(text for ``*``, path)], in order of appearance.

    ``split_shared`` is applied to each group: ``stages.0.layers.1.act`` is ``0.layers.1`` in ``stages.*.act``.
    """
    kinds: dict[str, list[str]] = {}
    for path in paths:
        kinds.setdefault(".".join("*" if part.isdecimal() else part for part in path.split(".")), []).append(path)
    by_pattern: dict[str, list[tuple[str, str]]] = {}
    for members in kinds.values():
        pattern, rows = split_shared(members)
        by_pattern[pattern] = list(zip(rows, members, strict=True))
    return by_pattern
