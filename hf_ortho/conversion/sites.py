"""Find the activations that the config of a model drives.

transformers rebuilds a model from its config alone, so a conversion may only replace modules that the config creates.
They are found by experiment: put a sentinel name into each activation field, send the config through JSON, rebuild
the model without memory (meta device), and see where sentinels appear. A field is left alone if its name has any
other effect: see ``_probe``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterator
from types import CodeType

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2CLS, ACT2FN

from ..errors import SiteError
from .states import not_a_model

SENTINEL = "hf_ortho_sentinel"
TIES = "all_tied_weights_keys"  # of a PreTrainedModel, with those of activations


class _Sentinel(nn.Identity):
    built = 0

    def __init__(self):
        super().__init__()
        self.mark = nn.Parameter(torch.empty(0))  # shows where transformers ties
        type(self).built += 1


@dataclasses.dataclass(frozen=True)
class Site:
    """One config field that drives activations, and its modules.

    Attributes:
        field: dotted path in the config, for example ``activation_function`` or ``text_config.hidden_act``.
        prefix: text before the activation's name in the field's value (``gated-`` in T5), usually empty.
        source: the activation's name in ``ACT2FN``.
        modules: dotted paths of the modules in the model.
        tied: (path, other path) of the modules in blocks that share their parameters with another block.
    """

    field: str
    prefix: str
    source: str
    modules: tuple[str, ...]
    tied: tuple[tuple[str, str], ...] = ()


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
    """The model that ``from_pretrained`` would build from the saved ``config``, on the meta device."""
    config = type(config).from_dict(copy.deepcopy(config.to_dict()))
    with torch.device("meta"):
        return type(model)(config)


def activation_fields(config: PreTrainedConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str]]:
    """(field, prefix, source) of each string field whose value, or its part after a dash, is in ACT2FN."""
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            yield from activation_fields(value, (*path, key))
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
    """The fields that drive activations of ``model``, and (field, reason) pairs for the fields left alone.

    Raises:
        SiteError: ``model`` is not a transformers model, or no field (or none of ``fields``) drives a module.

    Example:
        >>> from hf_ortho.conversion import find_sites
        >>> (site,), left_alone = find_sites(model)
        >>> site.field, site.source, site.modules
        ('activation_function', 'gelu_new', ('transformer.h.0.mlp.act', 'transformer.h.1.mlp.act'))
    """
    if not isinstance(model, PreTrainedModel):
        raise SiteError(not_a_model(model))
    if isinstance(fields, str):
        raise SiteError(f"fields {fields!r}: must be a list of config fields, for example [{fields!r}]")
    sites: list[Site] = []
    left_alone: list[tuple[str, str]] = []
    candidates = list(activation_fields(model.config))
    if fields is not None and (unknown := set(fields) - {field for field, _, _ in candidates}):
        known = ", ".join(field for field, _, _ in candidates) or "none"
        raise SiteError(f"{', '.join(sorted(unknown))}: no such activation field in the config; it has: {known}")
    original = rebuild(model, model.config)
    for field, prefix, source in candidates:
        if fields is not None and field not in fields:
            left_alone.append((field, "not selected"))
            continue
        found = _probe(model, original, field, prefix, source)
        if isinstance(found, str):
            left_alone.append((field, found))
        elif taken := next((site.field for site in sites if set(site.modules) & set(found.modules)), ""):
            left_alone.append((field, f"{taken} drives the same modules"))
        else:
            sites.append(found)
    if not sites:
        reasons = "; ".join(f"{field}: {why}" for field, why in left_alone) or "no field names an activation"
        raise SiteError(
            f"the config of {type(model).__name__} (model_type {model.config.model_type!r}) drives no activation "
            f"({reasons}), so a converted model could not be reloaded"
        )
    _check_together(model, sites)
    return sites, left_alone


def _check_together(model: PreTrainedModel, sites: list[Site]) -> None:
    """Raise SiteError unless all fields together drive the same modules as separately."""
    if len(sites) < 2:
        return
    try:
        twin, _ = _with_sentinels(model, {site.field: site.prefix for site in sites})
        together = {name for name, module in twin.named_modules() if isinstance(module, _Sentinel)}
        odd = together ^ {name for site in sites for name in site.modules}
        why = f"interfere at {min(odd)}" if odd else ""
    except Exception as error:
        why = f"raise {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if why:
        fields = ", ".join(site.field for site in sites)
        raise SiteError(f"{fields} together {why}; select one of them, for example fields=[{sites[0].field!r}]")


def _probe(model: PreTrainedModel, original: PreTrainedModel, field: str, prefix: str, source: str) -> Site | str:
    """The site of the field, or why the field cannot be used; ``original`` is ``model`` rebuilt."""
    try:
        twin, built = _with_sentinels(model, {field: prefix})
    except Exception as error:  # whatever fails in the model's code, the field does not accept other names
        return f"{type(error).__name__} with another name: {' '.join(str(error).split())[:160]}"
    if reader := _reader(twin, field.rpartition(".")[2]):
        return f"{reader} reads the name and looks the activation up inside forward, where it cannot be trained"
    placed = [(n, m) for n, m in twin.named_modules(remove_duplicate=False) if isinstance(m, _Sentinel)]
    if not placed:
        return "it creates no module" if not built else "it is looked up, but not kept as a module"
    names = tuple(n for n, _ in placed)
    if len({id(m) for _, m in placed}) < len(placed):
        return "several paths share one instance, which safetensors does not support"
    if built > len(placed):
        return f"{built - len(placed)} of the {built} activations that it creates are not kept as modules"
    present = dict(model.named_modules(remove_duplicate=False))
    if missing := set(names) - present.keys():
        return f"the model has no {min(missing)}, but its config builds it"
    for name in names:
        if type(present[name]) is not type(expected := original.get_submodule(name)):
            kinds = f"{type(present[name]).__name__}, but its config builds {type(expected).__name__}"
            return f"{name} of the model is {kinds}"
    if not any(_is_used(twin, name) for name in names):
        return f"no method uses its module {names[0]}"
    if difference := _difference(original, twin, names, source):
        return f"another name changes more than the activation: {difference}"
    ties = twin.all_tied_weights_keys
    tied = tuple((n, ties[f"{n}.mark"].removesuffix(".mark")) for n in names if f"{n}.mark" in ties)
    return Site(field, prefix, source, names, tied)


def _with_sentinels(model: PreTrainedModel, fields: dict[str, str]) -> tuple[PreTrainedModel, int]:
    """``model`` rebuilt with sentinels in ``fields`` (field to prefix), and the number of sentinels built."""
    config = copy.deepcopy(model.config)
    with _sentinel_registered():
        for field, prefix in fields.items():
            set_field(config, field, prefix + SENTINEL)
        _Sentinel.built = 0
        return rebuild(model, config), _Sentinel.built


def _names(code: CodeType) -> set[str]:
    """The attributes, globals and strings that a function mentions."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
        elif isinstance(constant, str):
            names.add(constant)
    return names


def _names_at_run_time(cls: type) -> frozenset[str]:
    """The names that methods of ``cls`` mention, except methods that only build or initialize."""
    # A model may read the name of an activation from its config in ``forward``, without a module to replace. A sentinel
    # cannot show that, since forward does not run on the meta device with every kind of input. Therefore the compiled
    # methods are inspected: a class that never mentions an attribute at run time cannot look it up there. Methods of
    # torch and PreTrainedModel are skipped, since they mention everything. An overridden method counts only if the
    # overriding one calls super. Building methods are closed under calls: a helper of __init__ is a building method.
    methods: dict[str, set[str]] = {}
    for base in cls.__mro__:
        if base not in PreTrainedModel.__mro__ and not base.__module__.startswith("torch."):
            for name, value in vars(base).items():
                function = inspect.unwrap(getattr(value, "fget", value))
                overridden = name in methods and "super" not in methods[name]
                if hasattr(function, "__code__") and not overridden:
                    methods.setdefault(name, set()).update(_names(function.__code__))
    building = {"__init__", "_init_weights", "extra_repr"}
    while more := {name for b in building for name in methods.get(b, ()) if name in methods} - building:
        building |= more
    return frozenset().union(*(names for name, names in methods.items() if name not in building))


def _reader(twin: PreTrainedModel, leaf: str) -> str:
    """The class of ``twin`` with a method that reads the sentinel's name from the module or its config, or empty."""
    configs = {id(module.config): module.config for module in twin.modules() if hasattr(module, "config")}
    with_sentinel = {key for key, config in configs.items() if SENTINEL in str(config)}
    mentioned = {kind: _names_at_run_time(kind) for kind in {type(module) for module in twin.modules()}}
    for module in twin.modules():
        stored = {key for key, value in vars(module).items() if _is_plain(value) and SENTINEL in str(value)}
        if id(getattr(module, "config", None)) in with_sentinel and not hasattr(module, leaf):
            stored.add(leaf)
        if stored & mentioned[type(module)]:
            return type(module).__name__
    return ""


def _is_plain(value) -> bool:
    """Whether ``value`` is a string, a number, or a sequence or mapping of those."""
    if isinstance(value, dict):
        return _is_plain(tuple(value.values()))
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, (str, int, float))


def _is_used(twin: PreTrainedModel, path: str) -> bool:
    """Whether a parent of ``path`` mentions it by name. Items of containers are not accessed by name."""
    *parents, leaf = path.split(".")
    if leaf.isdigit():
        return True
    above = (twin.get_submodule(".".join(parents[:n])) for n in range(len(parents) + 1))
    return any(leaf in _names_at_run_time(type(module)) for module in above)


def _difference(original: PreTrainedModel, twin: PreTrainedModel, sites: tuple[str, ...], source: str) -> str:
    """Where two rebuilt models differ in modules, shapes or plain settings, ignoring the activations; or empty."""

    def outline(model):
        return {
            name: (
                f"{type(module).__module__}.{type(module).__qualname__}",  # torch creates new parametrized classes
                {key: parameter.shape for key, parameter in module.named_parameters(recurse=False)},
                {k: str(v).replace(SENTINEL, source) for k, v in vars(module).items() if k != TIES and _is_plain(v)},
            )
            for name, module in model.named_modules()
            if not any(name == site or name.startswith(f"{site}.") for site in sites)
        }

    expected, actual = outline(original), outline(twin)
    differing = (name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    return next((name or type(original).__name__ for name in differing), "")


def norm_layers(model: nn.Module) -> list[str]:
    """Paths of the layers with parameters whose class name contains "norm"."""
    return [
        path
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and next(module.parameters(recurse=False), None) is not None
    ]
