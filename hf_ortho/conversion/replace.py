"""Replace activations in a model and in its config, both or neither."""

from __future__ import annotations

from collections.abc import Callable

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
        SiteError: a model built from the new config has other tensors; ``model`` is unchanged.
    """
    old = {path: model.get_submodule(path) for path in modules}

    def restore() -> None:
        for path, module in old.items():
            model.set_submodule(path, module)
        for site in sites:
            set_field(model.config, site.field, site.prefix + site.source)

    try:
        for path, module in modules.items():
            model.set_submodule(path, module)
        for site in sites:
            set_field(model.config, site.field, site.prefix + names[site.field])
        expected = {k: v.shape for k, v in rebuild(model, model.config).state_dict().items()}
        actual = {k: v.shape for k, v in model.state_dict().items()}
        if expected != actual:
            odd = min(k for k in expected.keys() | actual.keys() if expected.get(k) != actual.get(k))
            raise SiteError(f"the converted model could not be reloaded: its config builds other tensors ({odd} ...)")
    except BaseException:
        restore()
        raise
    return restore
