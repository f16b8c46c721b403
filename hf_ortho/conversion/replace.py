"""Put other activations into a model and its config, together or not at all."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from ..errors import SiteError
from .sites import Site, rebuild, set_field


def replace_modules(
    model: PreTrainedModel, sites: list[Site], modules: dict[str, nn.Module], names: dict[str, str]
) -> Callable[[], None]:
    """Put ``modules`` in place by path and their ``names`` into the config, by field.

    Returns:
        A function that undoes it.

    Raises:
        SiteError: a model that is built from the new config has other tensors; ``model`` is as before.
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
        found = {k: v.shape for k, v in model.state_dict().items()}
        if expected != found:
            odd = min(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
            raise SiteError(f"the converted model would not reload: its config builds other tensors ({odd} ...)")
    except BaseException:
        restore()
        raise
    return restore
