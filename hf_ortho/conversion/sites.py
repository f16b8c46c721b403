"""Find the activations that the config of a model drives.

transformers rebuilds a model from its config alone, so a conversion may only touch modules that the config places.
They are found by experiment: put a sentinel name into each activation field, send the config through JSON, rebuild
the model without memory (meta device), and see where sentinels appear.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2CLS, ACT2FN

from ..errors import SiteError

SENTINEL = "hf_ortho_sentinel"


class _Sentinel(nn.Identity):
    built = 0

    def __init__(self):
        super().__init__()
        type(self).built += 1


@dataclasses.dataclass(frozen=True)
class Site:
    """One driving field of the config and the modules behind it.

    Attributes:
        field: dotted path in the config, for example ``activation_function`` or ``text_config.hidden_act``.
        prefix: text before the activation's name in the field's value (``gated-`` in T5), usually empty.
        source: the activation's name in ``ACT2FN``.
        modules: dotted paths of the modules in the model.
    """

    field: str
    prefix: str
    source: str
    modules: tuple[str, ...]


def get_field(config: PreTrainedConfig, field: str) -> str:
    *path, leaf = field.split(".")
    for part in path:
        config = getattr(config, part)
    return getattr(config, leaf)


def set_field(config: PreTrainedConfig, field: str, value: str) -> None:
    *path, leaf = field.split(".")
    for part in path:
        config = getattr(config, part)
    setattr(config, leaf, value)


def rebuild(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """What ``from_pretrained`` would build from the saved ``config``, on the meta device."""
    config = type(config).from_dict(copy.deepcopy(config.to_dict()))
    with torch.device("meta"):
        return type(model)(config)


def _activation_fields(config: PreTrainedConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str]]:
    """(field, prefix, source) of each string field whose value, or its part after a dash, is in ACT2FN."""
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            yield from _activation_fields(value, (*path, key))
        elif isinstance(value, str) and not key.startswith("_"):
            prefix, dash, source = value.rpartition("-")
            if source in ACT2FN:
                yield ".".join((*path, key)), prefix + dash, source


@contextlib.contextmanager
def _sentinel_registered():
    ACT2FN[SENTINEL] = ACT2CLS[SENTINEL] = _Sentinel
    try:
        yield
    finally:
        del ACT2FN[SENTINEL], ACT2CLS[SENTINEL]


def find_sites(model: PreTrainedModel, fields: list[str] | None = None) -> tuple[list[Site], list[tuple[str, str]]]:
    """The driving fields of ``model`` and, as (field, why) pairs, the fields left alone.

    Raises:
        SiteError: ``model`` is not a transformers model, or no field (or none of ``fields``) drives a module.
    """
    if not isinstance(model, PreTrainedModel):
        raise SiteError(f"{type(model).__name__} is not a transformers PreTrainedModel, so no config drives it")
    sites: list[Site] = []
    left: list[tuple[str, str]] = []
    seen = list(_activation_fields(model.config))
    if fields is not None and (unknown := set(fields) - {field for field, _, _ in seen}):
        known = ", ".join(field for field, _, _ in seen) or "none"
        raise SiteError(f"{', '.join(sorted(unknown))}: no such activation field in the config; it has: {known}")
    for field, prefix, source in seen:
        if fields is not None and field not in fields:
            left.append((field, "not selected"))
            continue
        why, names = _probe(model, field, prefix)
        if why:
            left.append((field, why))
        else:
            sites.append(Site(field, prefix, source, names))
    if not sites:
        reasons = "; ".join(f"{field}: {why}" for field, why in left) or "it has no field that names an activation"
        raise SiteError(
            f"the config of {type(model).__name__} (model_type {model.config.model_type!r}) drives no activation "
            f"({reasons}); a conversion would not reload"
        )
    return sites, left


def _probe(model: PreTrainedModel, field: str, prefix: str) -> tuple[str, tuple[str, ...]]:
    """Why the field cannot be used (else empty), and the modules it drives."""
    config = copy.deepcopy(model.config)
    with _sentinel_registered():
        try:
            set_field(config, field, prefix + SENTINEL)
            _Sentinel.built = 0
            twin = rebuild(model, config)
        except Exception as error:  # any failure of foreign code means that this field takes no foreign name
            return f"{type(error).__name__} with another name: {str(error).splitlines()[0][:120]}", ()
    found = [(n, m) for n, m in twin.named_modules(remove_duplicate=False) if isinstance(m, _Sentinel)]
    if not found:
        return "it places no module" if not _Sentinel.built else "it is looked up but no module is kept", ()
    if len({id(m) for _, m in found}) < len(found):
        return "one instance stands at several paths, which safetensors does not store", ()
    names = tuple(n for n, _ in found)
    present = {n for n, _ in model.named_modules(remove_duplicate=False)}
    if missing := set(names) - present:
        return f"the model lacks {min(missing)}, which its config builds", ()
    return "", names
