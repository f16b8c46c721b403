"""Names and classes: ``FAMILIES`` is the only list of families; importing ``hf_ortho`` registers all names.

Names are known without torch; classes are imported lazily.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ActivationNameError

if TYPE_CHECKING:
    from .base import LearnableActivation

MAX_DEGREE = 32
MAX_GROUPS = 65536
# Numbers of groups with entries in ``ACT2CLS`` and ``ACT2FN``; others are built by ``ACT2FN`` on demand.
USUAL_GROUPS = tuple(2**k for k in range(1, 13))


class _Families(Mapping[str, type["LearnableActivation"]]):
    """Mapping from the name of each family to its class, imported lazily from ``module:class``."""

    def __init__(self, places: dict[str, str]):
        self._places = places

    def __getitem__(self, family: str) -> type[LearnableActivation]:
        module, _, name = self._places[family].partition(":")
        return getattr(importlib.import_module(module, __package__), name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, family: object) -> bool:
        return family in self._places


FAMILIES = _Families(
    {
        "hermite": ".hermite:Hermite",
        "fourier": ".fourier:Fourier",
        "tropical": ".tropical:Tropical",
        "tropical_rational": ".tropical:TropicalRational",
    }
)


class ParsedName(NamedTuple):
    """The class of the family, the degree, and the number of groups of channels (1 for one function per layer)."""

    cls: type[LearnableActivation]
    degree: int
    groups: int

    @property
    def family(self) -> str:
        """The name of the family."""
        return self.cls.family

    @property
    def name(self) -> str:
        """The name in ``ACT2FN``, for example ``hermite_3_g16``."""
        return f"{self.family}_{self.degree}" + (f"_g{self.groups}" if self.groups > 1 else "")

    def build(self, init: str = "paper") -> LearnableActivation:
        """A new activation."""
        return self.cls(self.degree, init=init, groups=self.groups)


def parse(name: str) -> ParsedName:
    """Split a name into family class, degree and groups. A family name without degree gives the default degree.

    Raises:
        ActivationNameError: the family is unknown, the degree is not an integer from 1 to 32, or the number of groups
            is not an integer from 2 to 65536.

    Example:
        >>> cls, degree, groups = hf_ortho.activations.parse("hermite_3_g16")
        >>> cls.family, degree, groups
        ('hermite', 3, 16)
    """
    if name in FAMILIES:
        return ParsedName(FAMILIES[name], FAMILIES[name].default_degree, 1)
    plain, _, groups = str(name).rpartition("_g")
    if not groups[:1].isdecimal():
        plain, groups = str(name), ""
    family, _, degree = (plain, "", "") if plain in FAMILIES else plain.rpartition("_")
    if family not in FAMILIES:
        closest = difflib.get_close_matches(family or plain, FAMILIES, n=1)
        rest = str(name).removeprefix(family) if family and degree.isdecimal() else ""
        hint = f"; did you mean {closest[0]}{rest}?" if closest else ""
        raise ActivationNameError(
            f"unknown activation {name!r:.80}: names are FAMILY_DEGREE with FAMILY one of {', '.join(FAMILIES)} and "
            f"DEGREE from 1 to {MAX_DEGREE}, for example hermite_8, or FAMILY_DEGREE_gN with N groups of channels{hint}"
        )
    if not re.fullmatch("[1-9][0-9]?", degree) or int(degree) > MAX_DEGREE:
        example = f"{family}_3" + (f"_g{groups:.20}" if groups else "")
        raise ActivationNameError(
            f"degree {degree!r:.80} of {family}: must be an integer from 1 to {MAX_DEGREE}, as in {example}"
        )
    if groups and not (re.fullmatch("[1-9][0-9]{0,4}", groups) and 2 <= int(groups) <= MAX_GROUPS):
        raise ActivationNameError(f"groups {groups!r:.80} of {plain}: must be an integer from 2 to {MAX_GROUPS}")
    return ParsedName(FAMILIES[family], int(degree), int(groups or 1))


def is_learnable(name: str) -> bool:
    """Whether ``parse`` accepts the name."""
    try:
        parse(name)
    except ActivationNameError:
        return False
    return True


def check_name(name: str) -> None:
    """Raise ActivationNameError with the closest learnable activation unless ``name`` is in ``ACT2FN``."""
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        parse(name)


def named(family: str, degree: str | int | None = None, groups: int | None = None) -> str:
    """The name of a family at a degree, with groups of channels. ``family`` may also be a whole name.

    Args:
        family: a family, or a name such as ``hermite_8`` or ``hermite_3_g16``.
        degree: None for the degree in the name, or the default degree of the family.
        groups: None for the groups in the name, or 1.

    Raises:
        ActivationNameError: as for ``parse``, or ``family`` already names the degree or the groups.

    Example:
        >>> hf_ortho.activations.named("hermite", 4), hf_ortho.activations.named("hermite", 3, groups=16)
        ('hermite_4', 'hermite_3_g16')
    """
    if groups is not None and (type(groups) is not int or not 1 <= groups <= MAX_GROUPS):
        raise ActivationNameError(f"groups {groups!r:.80} of {family}: must be an integer from 1 to {MAX_GROUPS}")
    bare = family in FAMILIES
    found = parse(f"{family}_{degree}" if bare and degree is not None else family)
    if bare and degree is not None and (found.family, str(found.degree)) != (family, str(degree)):
        raise ActivationNameError(f"degree {degree!r:.80} of {family}: must be an integer from 1 to {MAX_DEGREE}")
    for key, given, allowed in (("degree", degree, bare), ("groups", groups, found.groups == 1)):
        if given is not None and not allowed:
            raise ActivationNameError(
                f"{family!r} already names its {key}: give the family {found.family!r} with {key} {given!r}"
            )
    return found._replace(groups=groups or found.groups).name


def build(name: str, init: str = "paper") -> LearnableActivation:
    """Create an activation by its name.

    Example:
        >>> hf_ortho.activations.build("fourier_6", init="unit")
        Fourier(degree=6, domain=[-inf, inf], tail_slopes=[0, 0])
    """
    return parse(name).build(init)


def register() -> None:
    """Add every family name, with and without a degree, to ``ACT2FN`` and ``ACT2CLS``.

    Names with groups are in both for powers of two up to 4096; ``ACT2FN`` contains and builds all others on demand. The
    entries take no arguments: some models call ``ACT2CLS[name]()``, which fails for (class, kwargs) entries.

    Example:
        >>> from transformers.activations import ACT2FN
        >>> hf_ortho.activations.register()  # import hf_ortho does this too
        >>> ACT2FN["tropical_4"].name, ACT2FN["tropical_4_g12"].name
        ('tropical_4', 'tropical_4_g12')
    """
    from transformers.activations import ACT2CLS, ACT2FN

    for family in FAMILIES:
        degrees = [f"{family}_{n}" for n in range(1, MAX_DEGREE + 1)]
        for name in (family, *degrees, *(f"{name}_g{groups}" for name in degrees for groups in USUAL_GROUPS)):
            ACT2FN[name] = ACT2CLS[name] = functools.partial(build, name)
    mapping: Any = type(ACT2FN)
    mapping.__missing__, mapping.__contains__ = _missing, _contains


def _missing(mapping: dict, name: str) -> functools.partial:
    """The entry of a learnable activation that ``ACT2FN`` does not list."""
    if name not in mapping:
        raise KeyError(name)
    return functools.partial(build, name)


def _contains(mapping: dict, name: object) -> bool:
    return dict.__contains__(mapping, name) or (isinstance(name, str) and is_learnable(name))
