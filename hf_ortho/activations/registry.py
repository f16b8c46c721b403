"""Names and classes: ``FAMILIES`` is the only list of families; importing ``hf_ortho`` registers all names.

Names are known without torch; classes are imported lazily.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..errors import ActivationNameError

if TYPE_CHECKING:
    from .base import LearnableActivation

MAX_DEGREE = 32


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


def parse(name: str) -> tuple[type[LearnableActivation], int]:
    """Split a name into family class and degree. A family name without degree gives the default degree.

    Raises:
        ActivationNameError: the family is unknown, or the degree is not an integer from 1 to 32.

    Example:
        >>> cls, degree = hf_ortho.activations.parse("hermite_8")
        >>> cls.family, degree
        ('hermite', 8)
    """
    if name in FAMILIES:
        return FAMILIES[name], FAMILIES[name].default_degree
    family, _, degree = str(name).rpartition("_")
    if family not in FAMILIES:
        closest = difflib.get_close_matches(family or str(name), FAMILIES, n=1)
        meant = f"{closest[0]}_{degree}" if closest and family and degree.isdecimal() else "".join(closest)
        hint = f"; did you mean {meant}?" if closest else ""
        raise ActivationNameError(
            f"unknown activation {name!r:.80}: names are FAMILY_DEGREE with FAMILY one of {', '.join(FAMILIES)} and "
            f"DEGREE from 1 to {MAX_DEGREE}, for example hermite_8{hint}"
        )
    if not re.fullmatch("[1-9][0-9]?", degree) or int(degree) > MAX_DEGREE:
        raise ActivationNameError(f"degree {degree!r:.80} of {family}: must be an integer from 1 to {MAX_DEGREE}")
    return FAMILIES[family], int(degree)


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


def named(family: str, degree: str | int | None = None) -> str:
    """The name of a family at a degree; None for the family's default degree.

    Raises:
        ActivationNameError: as for ``parse``.

    Example:
        >>> hf_ortho.activations.named("hermite", 4), hf_ortho.activations.named("hermite")
        ('hermite_4', 'hermite_8')
    """
    if degree is None:
        cls, default = parse(family)
        return f"{cls.family}_{default}"
    if family not in FAMILIES and family.rpartition("_")[0] in FAMILIES:
        raise ActivationNameError(
            f"{family!r} already names a degree: give the family {family.rpartition('_')[0]!r} with degree {degree!r}"
        )
    cls, _ = parse(f"{family}_{degree}" if family in FAMILIES else family)
    if cls.family != family:
        raise ActivationNameError(f"degree {degree!r} of {family}: must be an integer from 1 to {MAX_DEGREE}")
    return f"{family}_{degree}"


def build(name: str, init: str = "paper") -> LearnableActivation:
    """Create an activation by its name.

    Example:
        >>> hf_ortho.activations.build("fourier_6", init="unit")
        Fourier(degree=6, domain=[-inf, inf], tail_slopes=[0, 0])
    """
    cls, degree = parse(name)
    return cls(degree, init=init)


def register() -> None:
    """Add every family name, with and without a degree, to ``ACT2FN`` and ``ACT2CLS``.

    The entries take no arguments: some models call ``ACT2CLS[name]()``, which fails for (class, kwargs) entries.

    Example:
        >>> from transformers.activations import ACT2FN
        >>> hf_ortho.activations.register()  # import hf_ortho does this too
        >>> ACT2FN["tropical_4"].name
        'tropical_4'
    """
    from transformers.activations import ACT2CLS, ACT2FN

    for family in FAMILIES:
        for name in (family, *(f"{family}_{n}" for n in range(1, MAX_DEGREE + 1))):
            ACT2FN[name] = ACT2CLS[name] = functools.partial(build, name)
