"""vLLM: converted checkpoints in its own model classes and in its Transformers backend.

vLLM calls ``register`` in each of its processes, by the entry point ``vllm.general_plugins``.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from wrapt import register_post_import_hook

from .activations import LearnableActivation, build, parse
from .activations.registry import is_learnable
from .checkpoints.provenance import Provenance
from .conversion.sites import activation_fields
from .errors import CheckpointError

MODELS = "vllm.model_executor.models."
BACKEND = f"{MODELS}transformers."  # classes that build the model with transformers


@functools.cache
def register() -> None:
    """Let vLLM load converted checkpoints.

    - Its own classes find the activations by name, also those that otherwise support only SiLU, such as Llama. If a
      class does not use them, it raises CheckpointError instead of computing another function.
    - The parameters of activations are float32 in a model of any dtype, also with ``--model-impl transformers``.

    Call it before ``vllm.LLM(...)`` only if hf_ortho is not installed but on ``sys.path``, or if ``VLLM_PLUGINS`` does
    not list ``hf_ortho``.

    Example:
        >>> import hf_ortho.vllm
        >>> hf_ortho.vllm.register()
    """
    register_post_import_hook(_extend_registries, "vllm.model_executor.layers.activation")
    register_post_import_hook(_extend_classes, "vllm.model_executor.model_loader.utils")
    register_post_import_hook(_keep_float32, f"{BACKEND}base")


class Gated:
    """Mixin: f(gate) * up, where the last dimension of the input (..., 2n) is [gate, up]; returns (..., n)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return super().forward(gate) * up  # type: ignore[misc]


@functools.cache
def _gated_class(cls: Any) -> Any:
    return type(f"Gated{cls.__name__}", (Gated, cls), {"__doc__": f"{cls.__name__} as in SwiGLU."})


def gated(name: str) -> LearnableActivation:
    """The activation ``name`` in place of SiLU in SwiGLU, with the same tensors.

    Example:
        >>> activation = hf_ortho.vllm.gated("hermite_8")
        >>> activation(torch.randn(2, 6)).shape
        torch.Size([2, 3])
    """
    cls: Any
    cls, degree = parse(name)
    return _gated_class(cls)(degree)


def _extend_registries(activation: Any) -> None:
    """Find learnable activations by name, each time as a new module: layers have parameters of their own."""

    def extended(known: Any, make: Callable[[str], nn.Module]) -> Any:
        lazy_dict: Any = type(known)

        class Registry(lazy_dict):
            def __getitem__(self, name: str) -> nn.Module:
                return make(name) if is_learnable(name) else super().__getitem__(name)

        return Registry(known._factory)

    activation._ACTIVATION_REGISTRY = extended(activation._ACTIVATION_REGISTRY, build)
    activation._ACTIVATION_AND_MUL_REGISTRY = extended(activation._ACTIVATION_AND_MUL_REGISTRY, gated)


def _extend_classes(loader: Any) -> None:
    """Extend the classes of vLLM's own models, when a model is about to be built."""
    original = loader.get_model_architecture

    @functools.wraps(original)
    def get_model_architecture(*args, **kwargs):
        model_class, name = original(*args, **kwargs)
        if model_class.__module__.startswith(MODELS) and not model_class.__module__.startswith(BACKEND):
            _extend_class(model_class)
        return model_class, name

    loader.get_model_architecture = get_model_architecture


@functools.cache
def _extend_class(model_class: Any) -> None:
    """Let the layers that support only SiLU take learnable activations, and check that the model has all it should."""
    modules = {sys.modules[base.__module__] for base in model_class.__mro__ if base.__module__.startswith(MODELS)}
    layers: set[Any] = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    for layer in layers:
        init = inspect.unwrap(layer.__init__)
        code = getattr(init, "__code__", None)
        if code and "SiluAndMul" in code.co_names and "hidden_act" in code.co_varnames[: code.co_argcount]:
            _replace_silu(layer)
    original = model_class.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        _check(self, inspect.signature(original).bind(self, *args, **kwargs).arguments["vllm_config"])

    model_class.__init__ = __init__


def _check(model: nn.Module, vllm_config: Any) -> None:
    """Raise CheckpointError if the model lacks learnable activations that its config names."""
    config = vllm_config.model_config.hf_config
    if not any(is_learnable(name) for _, _, name in activation_fields(config)):
        return
    expected = len(Provenance.of(config).layers) or 1
    if vllm_config.parallel_config.pipeline_parallel_size > 1:  # this process has some of the layers
        expected = 1
    found = sum(isinstance(module, LearnableActivation) for module in model.modules())
    if found < expected:
        raise CheckpointError(
            f"{type(model).__name__} of vLLM has {found} of the {expected} learnable activations of "
            f"{vllm_config.model_config.model}: serve it with --model-impl transformers"
        )


@functools.cache
def _replace_silu(layer: Any) -> None:
    original, signature = layer.__init__, inspect.signature(layer.__init__)

    @functools.wraps(original)
    def __init__(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        activation: Any = bound.arguments.get("hidden_act")
        if not is_learnable(activation):
            return original(*args, **kwargs)
        bound.arguments["hidden_act"] = "silu"
        original(*bound.args, **bound.kwargs)
        for name, child in list(args[0].named_children()):
            if type(child).__name__ == "SiluAndMul":
                setattr(args[0], name, gated(activation))

    layer.__init__ = __init__


def _keep_float32(backend: Any) -> None:
    """Let the backend, which makes every parameter of the model's dtype, keep those of activations in float32."""
    original = backend.Base.init_parameters

    @functools.wraps(original)
    def init_parameters(self, module: nn.Module, *args, **kwargs):
        original(self, module, *args, **kwargs)
        for activation in module.modules():
            if isinstance(activation, LearnableActivation):
                activation.float()

    backend.Base.init_parameters = init_parameters
