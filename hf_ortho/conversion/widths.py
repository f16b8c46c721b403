"""Whether the channels of activations can be divided into groups, seen from the modules beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from ..errors import WidthError
from .fit_sites import sources_of_groups

CHANNELS_FIRST = (_ConvNd, _BatchNorm, nn.GroupNorm)


def check_groups(model: PreTrainedModel, paths: Sequence[str], groups: int) -> None:
    """Raise WidthError unless the activations at ``paths`` can have ``groups``, as far as the modules beside them tell;
    SiteError if they have groups that these cannot continue.

    Example:
        >>> from hf_ortho.conversion.widths import check_groups
        >>> check_groups(model, ["transformer.h.0.mlp.act"], groups=8)
    """
    for path in paths:
        sources_of_groups(model.get_submodule(path), groups)
    widths = {path: width for path in paths if groups > 1 and (width := width_of(model, path))}
    for path, width in widths.items():
        if width % groups:
            raise WidthError(
                f"{path} has {width} channels, which cannot be divided into {groups} groups: the number must divide "
                f"{math.gcd(*widths.values())}"
            )


def width_of(model: PreTrainedModel, path: str) -> int | None:
    """The number of channels of the activation at ``path``: those of the first linear layer beside it, or half of them
    if another one takes half as many. None if there is no linear layer.

    Raises:
        WidthError: it follows a convolution, so its channels are not the last dimension.
    """
    above, _, name = path.rpartition(".")
    parent = model.get_submodule(above)
    beside = list(parent.children())
    if isinstance(parent, nn.Sequential):  # its children() would leave out repeated modules
        at, beside = list(parent._modules).index(name), list(parent)
        beside = beside[:at][::-1] + beside[at + 1 :]
    # nn.Linear, its quantized substitutes, and Conv1D of transformers, by the names of their sizes
    outputs = [n for m in beside if isinstance(n := getattr(m, "out_features", getattr(m, "nf", None)), int)]
    inputs = [n for m in beside if isinstance(n := getattr(m, "in_features", getattr(m, "nx", None)), int)]
    if outputs:
        halved = outputs[0] not in inputs[1:] and outputs[0] in [2 * n for n in inputs[1:]]  # a gate beside the values
        return outputs[0] // 2 if halved else outputs[0]
    if any(isinstance(m, CHANNELS_FIRST) for m in parent.modules()):
        raise WidthError(
            f"{path} belongs to a convolution, so its last dimension is not the channels: groups are not possible "
            "there; use one function for all channels, or select other config fields"
        )
    return None
