"""Parameter groups and optimizers that treat the parameters of activations apart."""

from __future__ import annotations

import inspect
import math
import re
from collections import defaultdict
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import Trainer

from ..activations import LearnableActivation
from ..checkpoints.adapter import ATTRIBUTE
from ..errors import ConfigError
from ..text import suggestion

# LBFGS takes no groups, SparseAdam no dense gradients, Muon only matrices.
NAMES: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls)
    and issubclass(cls, torch.optim.Optimizer)
    and cls is not torch.optim.Optimizer
    and name not in ("LBFGS", "SparseAdam", "Muon")
}


def param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, activation_lr: float | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters of a model as groups for any ``torch.optim.Optimizer``.

    Up to three groups, without the empty ones: what decays (the rule of ``Trainer``: all but norms and biases), what
    does not, and the parameters of learnable activations, which do not either: decay would pull them to f = 0. Frozen
    parameters are left out, tied ones come once. Wrapped models (DDP, FSDP2, ``torch.compile``) will do; parameters on
    different device meshes get groups of their own, as fused optimizers ask for.

    Args:
        model: any module.
        lr: the learning rate.
        weight_decay: of the first group.
        activation_lr: the learning rate of activations; ``lr`` if None.

    Raises:
        ConfigError: a value is negative or not finite, or nothing is trainable.
    """
    _check(lr=lr, weight_decay=weight_decay, activation_lr=activation_lr)
    learned = {id(p) for module in activations_by_path(model).values() for p in module.parameters(recurse=False)}
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it reads no self
    rates = (lr, weight_decay), (lr, 0.0), (lr if activation_lr is None else activation_lr, 0.0)
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = 2 if id(parameter) in learned else 0 if name in decayed else 1
            groups[kind, getattr(parameter, "device_mesh", None)].append(parameter)
    if not groups:
        raise ConfigError(f"{type(model).__name__} has no trainable parameters: all have requires_grad=False")
    in_order = sorted(groups.items(), key=lambda item: item[0][0])  # Trainer logs the learning rate of the first
    return [{"params": found, "lr": rates[kind][0], "weight_decay": rates[kind][1]} for (kind, _), found in in_order]


def optimizer_cls_and_kwargs(
    name_or_cls: str | type[torch.optim.Optimizer] = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.0,
    activation_lr: float | None = None,
    gradient_scale: float = 1.0,
    natural_steps: bool = False,
    **options,
) -> tuple[Any, dict[str, Any]]:
    """The argument for ``Trainer(..., optimizer_cls_and_kwargs=hf_ortho.optimizer_cls_and_kwargs(...))``.

    ``Trainer`` gives such an optimizer none of its own ``TrainingArguments``: learning rate, weight decay and betas are
    those given here. The schedule multiplies the learning rate of each group.

    Args:
        name_or_cls: a class, or the name of one in ``torch.optim`` in lower case, such as adamw, sgd, adafactor.
        lr, weight_decay, activation_lr: as in ``param_groups``.
        gradient_scale, natural_steps: as in ``scale_steps``.
        options: for the class, such as ``betas=(0.9, 0.95)``.

    Raises:
        ConfigError: an unknown name or option, or a value out of range.
    """
    cls: Any = name_or_cls
    if isinstance(cls, str):
        if cls not in NAMES:
            raise ConfigError(f"optimizer {cls!r}: no such class in torch.optim{suggestion(cls, NAMES)}")
        cls = NAMES[cls]
    _check(lr=lr, weight_decay=weight_decay, activation_lr=activation_lr, gradient_scale=gradient_scale)
    try:
        inspect.signature(cls).bind([], lr=lr, **options)
    except TypeError as error:
        raise ConfigError(f"optimizer {cls.__name__}: {error}") from error

    def build(model: nn.Module) -> torch.optim.Optimizer:
        groups = param_groups(model, lr=lr, weight_decay=weight_decay, activation_lr=activation_lr)
        return scale_steps(
            cls(groups, lr=lr, **options), model, gradient_scale=gradient_scale, natural_steps=natural_steps
        )

    return lambda: build, {}


optimizer = optimizer_cls_and_kwargs  # its earlier name


def scale_steps(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, gradient_scale: float = 1.0, natural_steps: bool = False
) -> torch.optim.Optimizer:
    """Let an optimizer see the parameters of activations in other units, by hooks on its ``step``; returns it.

    With ``natural_steps`` it steps u = c / s and gets the gradient s * dL/dc, with s of
    ``LearnableActivation.natural_units``, such as sqrt(k!) for the coefficient c_k of a Hermite series: Adam's steps of
    one learning rate in u then move f about equally for all k, and its epsilon weighs equally on them.
    ``gradient_scale`` multiplies the gradients, after any clipping; it moves SGD, while Adam does not notice it.

    Saved states are in these units, so that a resumed training calls this again with the same values. The parameters
    may be replaced in their groups by sharded ones, as Accelerate does for FSDP2, but not be flattened, as DeepSpeed
    does. ``step`` takes no closure.

    Raises:
        ConfigError: ``gradient_scale`` is negative or not finite.
    """
    _check(gradient_scale=gradient_scale)
    if gradient_scale == 1.0 and not natural_steps:
        return optimizer
    units: dict[int, Tensor | None] = {}
    for module in activations_by_path(model).values():
        natural = module.natural_units() if natural_steps else {}
        for name, parameter in module.named_parameters(recurse=False):
            units[id(parameter)] = torch.tensor(natural[name]) if name in natural else None
    # by place in the groups, where Accelerate may put other tensors
    places = [
        (group, i, units[id(parameter)])
        for group, entries in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(entries["params"])
        if id(parameter) in units
    ]
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def prepare(optimizer, args, kwargs) -> None:
        for group, i, unit in places:
            parameter = optimizer.param_groups[group]["params"][i]
            if parameter.grad is None:
                continue
            if gradient_scale != 1.0:
                parameter.grad *= gradient_scale
            if unit is not None:
                s = _placed(unit, parameter)
                old, scaled = parameter.clone(), parameter / s
                parameter.grad *= s
                parameter.copy_(scaled)
                seen.append((parameter, old, scaled, s))

    @torch.no_grad()
    def finish(optimizer, args, kwargs) -> None:
        for parameter, old, scaled, s in seen:
            parameter.copy_(old + s * (parameter - scaled))
        seen.clear()

    optimizer.register_step_pre_hook(prepare)
    optimizer.register_step_post_hook(finish)
    return optimizer


def _placed(unit: Tensor, parameter: Tensor) -> Tensor:
    """``unit`` where and how ``parameter`` is: on its device, and sharded as it is."""
    if not hasattr(parameter, "placements"):
        return unit.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    mesh = sharded.device_mesh
    return distribute_tensor(unit.to(mesh.device_type), mesh, sharded.placements, src_data_rank=None)


def activations_by_path(model: nn.Module) -> dict[str, LearnableActivation]:
    """The activations in use by their paths in the plain model, whatever wraps it: an engine, a compiler or peft.

    Of those that peft trains (``modules_to_save``, ``OrthoConfig``) it is the trained one, not the original beside it.
    """
    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return {
        re.sub(rf"\.(modules_to_save|{ATTRIBUTE})\.default\b|\b_orig_mod\.|\._orig_mod$", "", path): module
        for path, module in inner.named_modules()
        if isinstance(module, LearnableActivation) and not {"original_module", "base_layer"} & set(path.split("."))
    }


def _check(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and (not isinstance(value, (int, float)) or not 0.0 <= value < math.inf):
            raise ConfigError(f"{name} {value!r}: must be a finite number, at least 0")
