"""Parameter groups by name: entries of a pattern with its own learning rate or weight decay."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..path_patterns import by_kind
from ..text import suggestion

if TYPE_CHECKING:
    from torch import nn

VALUES = ("learning_rate", "weight_decay")
KEYS = ("pattern", *VALUES)
EXAMPLE = "[{pattern: embed, learning_rate: 1e-4}]"


def parse_groups(value: Any) -> list[dict[str, Any]]:
    """Check the entries of ``param_groups``, given as a list or as YAML text, and return them with float values.

    Raises:
        ConfigError: an entry has an unknown key, an invalid pattern, no value, or a value out of range.
    """
    import yaml

    try:
        entries = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ConfigError(f"param_groups {value!r} is not YAML; give a list, such as {EXAMPLE}") from error
    if entries is None:
        return []
    if isinstance(entries, str | Mapping) or not isinstance(entries, Sequence):
        raise ConfigError(f"param_groups {entries!r}: must be a list, such as {EXAMPLE}")
    return [_parsed(entry, f"param_groups, entry {number}") for number, entry in enumerate(entries, 1)]


def _parsed(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: {entry!r} must be a mapping of {', '.join(KEYS)}")
    for key in entry:
        if key not in KEYS:
            hint = suggestion(str(key), KEYS) or f"; the keys are {', '.join(KEYS)}"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
    pattern = entry.get("pattern")
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"{where}: pattern {pattern!r} must be a regular expression for names of parameters")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        hint = "; any text is .* in a regular expression" if pattern.startswith("*") else ""
        raise ConfigError(f"{where}: pattern {pattern!r} is not a regular expression: {error}{hint}") from error
    values = {key: _number(entry[key], f"{where}: {key}") for key in VALUES if entry.get(key) is not None}
    if not values:
        raise ConfigError(f"{where}: {pattern!r} sets nothing; give learning_rate, weight_decay or both")
    return {"pattern": pattern, **values}


def _number(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e-4 as text
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise ConfigError(f"{where} {value!r} must be a finite number and at least 0")
    return number


def assign(
    model: nn.Module, entries: Sequence[Mapping[str, Any]], absent: Collection[str] = ()
) -> tuple[dict[int, int], list[int]]:
    """The position in ``entries`` of each trainable parameter that an entry matches, by its id, and the used positions.

    A pattern is searched for in the names of ``parameter_names``. The first entry that matches a parameter gets it.

    Args:
        absent: names of parameters that the model might have had. An entry that gets only these is not used.

    Raises:
        ConfigError: an entry gets no parameter.
    """
    from .paths import parameter_names

    names = parameter_names(model)
    parameters = {id(p): p for p in model.parameters()}
    position: dict[int, int] = {}
    left = set(absent)
    used = []
    for i, entry in enumerate(entries):
        pattern = re.compile(entry["pattern"])
        matching = [key for key in parameters if any(map(pattern.search, names[key]))]
        trainable = [key for key in matching if parameters[key].requires_grad]
        new = [key for key in trainable if key not in position]
        elsewhere = set(filter(pattern.search, absent))
        if new:
            position |= dict.fromkeys(new, i)
            used.append(i)
        elif not elsewhere & left:
            where = f"param_groups: pattern {entry['pattern']!r}"
            if trainable or elsewhere:
                first = _matching(pattern, names[trainable[0]]) if trainable else min(elsewhere)
                raise ConfigError(f"{where} only matches parameters of earlier entries, such as {first}")
            if matching:
                first = _matching(pattern, names[matching[0]])
                raise ConfigError(f"{where} only matches frozen parameters, such as {first}; check train")
            known = [name for key in parameters if parameters[key].requires_grad for name in names[key]]
            raise ConfigError(f"{where} matches no parameter; the closest are {', '.join(_closest(pattern, known))}")
        left -= elsewhere
    return position, used


def _matching(pattern: re.Pattern, names: Sequence[str]) -> str:
    """The first of a parameter's ``names`` that matches, and one that is tied to it, if any."""
    found = next(filter(pattern.search, names))
    tied = next((f" (tied to {name})" for name in names if name != found), "")
    return found + tied


def _closest(pattern: re.Pattern, names: Sequence[str]) -> list[str]:
    """The three names most like the pattern, with ``*`` for the numbers of layers."""
    text = re.sub(r"\\.|[\^$()|?*+\[\]{}]", ".", pattern.pattern)
    words = [word for word in text.split(".") if word]

    def likeness(name: str) -> float:
        """How like the words of the pattern are to the closest parts of the name, summed."""
        parts = name.split(".")
        return sum(max(difflib.SequenceMatcher(None, w, part).ratio() for part in parts) for w in words)

    return sorted(by_kind(names), key=likeness, reverse=True)[:3]


def absent_names(model: nn.Module, activations: Collection[str]) -> Iterator[str]:
    """The names of parameters that the model would have with other ``activations`` in place of its own."""
    from transformers.activations import ACT2FN

    from ..activations import LearnableActivation
    from ..activations.base import SHARED
    from ..conversion.sites import find_sites
    from .paths import activations_by_path, plain_model

    others = [ACT2FN[name] for name in activations]
    if not others:
        return
    paths = list(activations_by_path(model))
    paths = paths or [path for site in find_sites(plain_model(model))[0] for path in site.modules]  # type: ignore[arg-type]
    for module in others:
        if isinstance(module, LearnableActivation):
            names = [name for name, _ in module.named_parameters(recurse=False) if name not in SHARED]
            yield from (f"{path}.{name}" for path in paths for name in names)


def group_counts(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> str:
    """``groups`` in one sentence, with their numbers of parameters; those with the same values are counted as one."""
    from ..partitioned import full_size
    from .paths import activations_by_path

    learned = {id(p) for module in activations_by_path(model).values() for p in module.parameters(recurse=False)}
    counts: Counter[tuple[str, str]] = Counter()
    for group in groups:
        others = "activations" if all(id(p) in learned for p in group["params"]) else "others"
        label = repr(group["pattern"]) if "pattern" in group else others
        values = f"learning rate {group['lr']:.3g}, weight decay {group['weight_decay']:.3g}"
        counts[label, values] += sum(map(full_size, group["params"]))
    parts = [f"{label}: {count:,} ({values})" for (label, values), count in counts.items()]
    return f"Parameter groups: {'; '.join(parts)}"
