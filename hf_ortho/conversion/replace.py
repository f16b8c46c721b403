"""Replace activations in a model and in its config, both or neither."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel

from ..errors import SiteError
from .sites import Site, rebuild, set_field


def replace_modules(
    model: PreTrainedModel, sites: list[Site], modules: dict[str, nn.Module], names: dict[str, str]
) -> Callable[[], None]:
    """Put ``modules`` into the model, by path, and their ``names`` into the config, by field.

    Returns:
        A function that undoes it.

    Raises:
        SiteError: a model built from the new config has other activations; ``model`` is unchanged.
    """
    old = {path: model.get_submodule(path) for path in modules}
    ties = model.all_tied_weights_keys

    def restore() -> None:
        model.all_tied_weights_keys = ties
        for path, module in old.items():
            model.set_submodule(path, module)
        for site in sites:
            set_field(model.config, site.field, site.prefix + site.source)

    try:
        for path, module in modules.items():
            model.set_submodule(path, module)
        for site in sites:
            set_field(model.config, site.field, site.prefix + names[site.field])
        twin = rebuild(model, model.config)
        _tie(model, modules, twin.all_tied_weights_keys)
        for path in modules:  # only these: a quantized model, or one with a new head, has other tensors elsewhere
            expected, actual = (
                {k: v.shape for k, v in m.get_submodule(path).state_dict().items()} for m in (twin, model)
            )
            if expected != actual:
                odd = min(k for k in expected.keys() | actual.keys() if expected.get(k) != actual.get(k))
                raise SiteError(
                    f"the converted model could not be reloaded: its config builds other tensors ({path}.{odd} ...)"
                )
    except BaseException:
        restore()
        raise
    return restore


def _tie(model: PreTrainedModel, modules: dict[str, nn.Module], ties: dict[str, str]) -> None:
    """Share the parameters of ``modules`` that transformers ties after a reload."""

    def inside(key: str) -> bool:
        return key.rpartition(".")[0] in modules

    model.all_tied_weights_keys = {
        key: source for key, source in model.all_tied_weights_keys.items() if not inside(key)
    }
    for key, source in ties.items():
        if inside(key):
            path, _, name = key.rpartition(".")
            setattr(modules[path], name, model.get_parameter(source))
            model.all_tied_weights_keys[key] = source


@contextlib.contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put ``modules`` into the model, by path, and put the present ones back afterwards."""
    present = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            model.set_submodule(path, module)
        yield
    finally:
        for path, module in present.items():
            model.set_submodule(path, module)
