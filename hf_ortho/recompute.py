"""Recompute an activation's output in the backward pass instead of storing it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

from .activations import LearnableActivation
from .errors import ConfigError
from .kernels import dispatch

LINEAR_LAYERS = (nn.Linear, Conv1D)


def fuse_mlp(model: nn.Module, enabled: bool = True) -> list[str]:
    """Recompute act(x) in the backward pass of the linear layer that follows, instead of storing it.

    With y = act(x) and the linear layer z = y W + b, the gradient of W is y^T dL/dz. Autograd stores y for it: one
    tensor of the MLP's inner width per token. x is stored anyway, for the gradient of the activation, so y = act(x)
    can be recomputed, by the same code and with the parameters of the forward pass. Loss, gradients and parameters
    stay the same bit for bit. Each MLP pays one more forward pass of its activation per backward pass.

    This works wherever the output of a learnable activation is the direct input of an ``nn.Linear`` (also inside a
    LoRA layer) or ``Conv1D``, as in GPT-2, BERT, ViT or ConvNeXt. Nothing changes if another operation lies in between
    (the product of a gated MLP, an active dropout), if autograd stores nothing (no grad), or if something else decides
    what it stores (gradient checkpointing and other ``torch.autograd.graph.saved_tensors_hooks``, ``torch.func``,
    ``torch.compile``, tracing). Changing x in place before the backward pass raises autograd's ``RuntimeError``.

    It is done by forward hooks on the current activations and linear layers. State dict, config and module names do
    not change, and copies of the model are fused too. Call ``fuse_mlp`` again after ``convert``, ``revert`` or peft
    has added activations or layers. Calling it twice changes nothing.

    Args:
        model: any module with learnable activations; changed in place.
        enabled: False removes the hooks.

    Returns:
        The paths of the model's learnable activations.

    Raises:
        ConfigError: the model has no learnable activations, and ``enabled`` is True.

    Example:
        >>> report = hf_ortho.convert(model, "hermite_3")
        >>> hf_ortho.fuse_mlp(model)
        ['transformer.h.0.mlp.act', 'transformer.h.1.mlp.act']
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, LearnableActivation)]
    if enabled and not paths:
        raise ConfigError(
            f"fuse_mlp: {type(model).__name__} has no learnable activations whose output could be recomputed; convert "
            "it first, with hf_ortho.convert(model, ...) or `hf-ortho convert`"
        )
    for module in model.modules():
        for kinds, hook in (((LearnableActivation,), _remember_input), (LINEAR_LAYERS, _drop_input)):
            if isinstance(module, kinds):
                for key, present in list(module._forward_hooks.items()):
                    if present is hook:
                        del module._forward_hooks[key]
                if enabled:
                    # Before FSDP's own hook, which shards the parameters again.
                    module.register_forward_hook(hook, prepend=True)
    return paths


@dataclasses.dataclass(frozen=True, eq=False)
class _Source:
    """The input, the parameters and the tensor versions that an activation's output was computed from."""

    family: type[LearnableActivation]
    x: Tensor
    x_version: int
    y_version: int
    parameters: list[Tensor]

    def output(self, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        if self.x._version != self.x_version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                f"input {list(self.x.shape)} of a {self.family.family} activation is at version {self.x._version}; "
                f"expected version {self.x_version} instead"
            )
        with torch.no_grad():
            return dispatch.activation(self.family, self.x, *self.parameters).to(dtype).view(shape)


# Sources by output; an entry lives as long as the output does.
_sources = WeakTensorKeyDictionary()


def _remember_input(activation: LearnableActivation, args: tuple[Tensor, ...], y: Tensor) -> None:
    if _is_traced() or not args or y.grad_fn is None:  # without a graph x is not stored
        return
    x = args[0].detach()  # shares the version counter
    # Before the backward pass an optimizer may step, or FSDP may shard the parameters.
    parameters = [t.detach().clone() for t in activation._tensors()]
    _sources[y] = _Source(type(activation), x, x._version, y._version, parameters)


def _drop_input(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    if _is_traced() or not args or output.grad_fn is None:
        return
    y = args[0]
    source = _sources.get(y)
    if source is None or y._version != source.y_version or _saved_tensors_are_hooked():
        return
    for node in _nodes(output.grad_fn, y.grad_fn):
        for raw, saved in _saved_tensors(node):
            if _holds_whole(saved, y):
                unpack = functools.partial(_Source.output, dtype=saved.dtype, shape=saved.shape)
                raw.register_hooks(lambda _: source, unpack)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _saved_tensors_are_hooked() -> bool:
    """Whether other hooks decide what is saved (checkpointing, offloading), or hooks are forbidden (torch.func)."""
    forbidden = not torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    return forbidden or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _nodes(last: Node, first: Node | None) -> Iterator[Node]:
    """The nodes of the graph from ``last`` back to ``first``, which is excluded."""
    seen, todo = {first}, [last]
    while todo:
        node = todo.pop()
        yield node
        before = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= before
        todo += before


@functools.cache
def _saved_names(kind: type[Node]) -> list[tuple[str, str]]:
    raw = [name for name in dir(kind) if name.startswith("_raw_saved_")]
    return [(name, name.removeprefix("_raw")) for name in raw]


def _saved_tensors(node: Node) -> Iterator[tuple]:
    """Pairs of an autograd ``SavedTensor`` and its tensor."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        yield from zip(node._raw_saved_tensors, node.saved_tensors, strict=True)
    else:
        for raw, name in _saved_names(type(node)):
            if isinstance(saved := getattr(node, name), Tensor):
                yield getattr(node, raw), saved


def _holds_whole(saved: Tensor, y: Tensor) -> bool:
    """Whether ``saved`` is ``y``, flattened or not, or a cast of it by autocast."""
    if saved.numel() != y.numel() or saved.device != y.device or not saved.is_contiguous() or not y.is_contiguous():
        return False
    root = saved if saved._base is None else saved._base
    if root is (y if y._base is None else y._base):
        return saved.storage_offset() == y.storage_offset()
    cast = root.grad_fn
    return cast is not None and cast.name() == "ToCopyBackward0" and cast.next_functions == ((y.grad_fn, y.output_nr),)
