"""Parameter groups and optimizers with separate settings for the parameters of activations."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..errors import ConfigError
from ..text import suggestion
from .groups import assign, parse_groups
from .paths import activations_by_path

# Excluded: LBFGS has no parameter groups, SparseAdam needs sparse gradients, and Muon accepts matrices only.
NAMES: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls)
    and issubclass(cls, torch.optim.Optimizer)
    and cls is not torch.optim.Optimizer
    and name not in ("LBFGS", "SparseAdam", "Muon")
}


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    activation_lr: float | None = None,
    groups: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Group the trainable parameters of a model for any ``torch.optim.Optimizer``.

    Without ``groups``, there are up to three non-empty groups: parameters with weight decay, parameters without (norms
    and biases, as in ``Trainer``, and all other vectors and scalars, such as layer scales), and the parameters of
    learnable activations, also without weight decay, which would pull them toward f = 0. Otherwise, an optimizer decays
    the activations with everything else, as in ``torch.optim.AdamW(model.parameters(), weight_decay=0.1)``. Frozen
    parameters are excluded and tied parameters appear once. The model may be wrapped (DDP, FSDP2, ``torch.compile``).
    Each device mesh gets separate groups, as fused optimizers require.

    Each entry of ``groups`` takes the parameters in whose name its ``pattern`` is found, as by ``re.search``, and that
    no earlier entry takes. Names are those of the plain model, as before wrapping and peft; a tied parameter has
    several. Its learning rate takes precedence over ``activation_lr``. What an entry does not set stays as without it.
    Its groups come last, with the ``pattern`` as a further key.

    Args:
        model: any module.
        lr: learning rate.
        weight_decay: weight decay of the first group.
        activation_lr: learning rate of the activations; default: ``lr``.
        groups: mappings of ``pattern``, a regular expression, and ``learning_rate``, ``weight_decay`` or both.

    Raises:
        ConfigError: a value is negative or not finite, no parameter is trainable, or an entry is invalid or takes none.

    Example:
        >>> _ = hf_ortho.convert(model, "hermite_3")
        >>> groups = hf_ortho.param_groups(model, lr=1e-3, weight_decay=0.1, activation_lr=1e-2)
        >>> [(group["lr"], group["weight_decay"]) for group in groups]
        [(0.001, 0.1), (0.001, 0.0), (0.01, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
        >>> slow = {"pattern": r"wte|wpe", "learning_rate": 1e-4}
        >>> groups = hf_ortho.param_groups(model, lr=1e-3, weight_decay=0.1, groups=[slow])
        >>> [(group["lr"], group["weight_decay"]) for group in groups]
        [(0.001, 0.1), (0.001, 0.0), (0.001, 0.0), (0.0001, 0.1)]
    """
    _check(lr=lr, weight_decay=weight_decay, activation_lr=activation_lr)
    entries = parse_groups(groups)
    position, _ = assign(model, entries)
    learned = {id(p) for module in activations_by_path(model).values() for p in module.parameters(recurse=False)}
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it reads no self
    rates = (lr, weight_decay), (lr, 0.0), (lr if activation_lr is None else activation_lr, 0.0)
    by_key = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # DeepSpeed ZeRO-3 flattens the tensors
            kind = 2 if id(parameter) in learned else 0 if name in decayed and dimensions > 1 else 1
            number = position.get(id(parameter), -1)
            if number >= 0:  # of its groups, those are one that differ in a value that it sets
                kind = 1 if kind == 2 and "learning_rate" in entries[number] else kind
                kind = 0 if kind == 1 and "weight_decay" in entries[number] else kind
            by_key[number, kind, getattr(parameter, "device_mesh", None)].append(parameter)
    if not by_key:
        raise ConfigError(f"{type(model).__name__} has no trainable parameters: all have requires_grad=False")
    found = []
    for number, kind, mesh in sorted(by_key, key=lambda key: key[:2]):  # Trainer logs the learning rate of the first
        entry = entries[number] if number >= 0 else {}
        rate, decay = entry.get("learning_rate", rates[kind][0]), entry.get("weight_decay", rates[kind][1])
        group = {"params": by_key[number, kind, mesh], "lr": rate, "weight_decay": decay}
        found.append(group | ({"pattern": entry["pattern"]} if entry else {}))
    return found


def optimizer_cls_and_kwargs(
    name_or_cls: str | type[torch.optim.Optimizer] = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.0,
    activation_lr: float | None = None,
    groups: Sequence[dict[str, Any]] = (),
    gradient_scale: float = 1.0,
    natural_steps: bool = False,
    **options,
) -> tuple[Any, dict[str, Any]]:
    """The argument for ``Trainer(..., optimizer_cls_and_kwargs=hf_ortho.optimizer_cls_and_kwargs(...))``.

    ``Trainer`` ignores the learning rate, weight decay and betas in ``TrainingArguments`` and uses the values given
    here. The schedule multiplies the learning rate of each group.

    Args:
        name_or_cls: an optimizer class, or the lowercase name of a class in ``torch.optim``, such as adamw or sgd.
        lr, weight_decay, activation_lr, groups: see ``param_groups``.
        gradient_scale, natural_steps: see ``scale_steps``.
        options: further arguments of the class, such as ``betas=(0.9, 0.95)``.

    Raises:
        ConfigError: unknown name or option, or a value out of range.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> _ = hf_ortho.convert(model, "hermite_3")
        >>> chosen = hf_ortho.optimizer_cls_and_kwargs("sgd", lr=0.1, activation_lr=0.01)
        >>> trainer = Trainer(model, TrainingArguments("out", report_to=[]), optimizer_cls_and_kwargs=chosen)
        >>> [group["lr"] for group in trainer.create_optimizer().param_groups]
        [0.1, 0.1, 0.01]
    """
    cls: Any = name_or_cls
    if isinstance(cls, str):
        if cls not in NAMES:
            raise ConfigError(f"optimizer {cls!r} does not exist in torch.optim{suggestion(cls, NAMES)}")
        cls = NAMES[cls]
    _check(lr=lr, weight_decay=weight_decay, activation_lr=activation_lr, gradient_scale=gradient_scale)
    try:
        inspect.signature(cls).bind([], lr=lr, **options)
    except TypeError as error:
        raise ConfigError(f"optimizer {cls.__name__}: {error}") from error

    entries = parse_groups(groups)

    def build(model: nn.Module) -> torch.optim.Optimizer:
        params = param_groups(model, lr=lr, weight_decay=weight_decay, activation_lr=activation_lr, groups=entries)
        return scale_steps(
            cls(params, lr=lr, **options), model, gradient_scale=gradient_scale, natural_steps=natural_steps
        )

    return lambda: build, {}


optimizer = optimizer_cls_and_kwargs  # the former name


def scale_steps(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, gradient_scale: float = 1.0, natural_steps: bool = False
) -> torch.optim.Optimizer:
    """Rescale the parameters of activations for an optimizer, by hooks on its ``step``; returns the optimizer.

    With ``natural_steps``, the optimizer updates u = c / s with the gradient s * dL/dc, where s is from
    ``LearnableActivation.natural_units``, such as sqrt(k!) for the coefficient c_k of a Hermite series. A step of Adam
    in u then changes f by about the same amount for all k, and its epsilon has the same effect on all of them.
    ``gradient_scale`` multiplies the gradients after clipping. This affects SGD but not Adam.

    Saved optimizer states are in these units, so call this with the same values to resume. Parameters may be replaced
    by sharded ones in their groups, as by Accelerate for FSDP2, but not flattened, as by DeepSpeed. ``step`` cannot
    take a closure.

    Raises:
        ConfigError: ``gradient_scale`` is negative or not finite.

    Example:
        >>> act = hf_ortho.activations.build("hermite_3")
        >>> before = act.coefficients.detach().clone()
        >>> optimizer = torch.optim.Adam(act.parameters(), lr=0.01)
        >>> optimizer = hf_ortho.scale_steps(optimizer, act, natural_steps=True)
        >>> act(torch.linspace(-1, 2, 9)).sum().backward()
        >>> optimizer.step()
        >>> [round(abs(step) / 0.01, 2) for step in (act.coefficients - before).tolist()]  # sqrt(k!)
        [1.0, 1.0, 1.41, 2.45]
    """
    _check(gradient_scale=gradient_scale)
    if gradient_scale == 1.0 and not natural_steps:
        return optimizer
    units: dict[int, Tensor | None] = {}
    for module in activations_by_path(model).values():
        natural = module.natural_units() if natural_steps else {}
        for name, parameter in module.named_parameters(recurse=False):
            units[id(parameter)] = torch.tensor(natural[name]).expand(parameter.shape) if name in natural else None
    # Remember places in the groups, not tensors: Accelerate may replace the tensors.
    places = [
        (group, i, units[id(parameter)])
        for group, entries in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(entries["params"])
        if id(parameter) in units
    ]
    placed: dict[tuple[int, int], Tensor] = {}  # the units on the devices of the parameters
    # ``step`` runs on u: before it, the parameter becomes u = c / s and its gradient s * dL/dc. After it, the change of
    # u is applied to the saved c, so rounding of c / s * s cannot accumulate.
    scaled_parameters: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def prepare(optimizer, args, kwargs) -> None:
        for group, i, unit in places:
            parameter = optimizer.param_groups[group]["params"][i]
            if parameter.grad is None:
                continue
            if gradient_scale != 1.0:
                parameter.grad *= gradient_scale
            if unit is not None:
                s = placed.get((group, i))
                if s is None or s.device != parameter.device:
                    s = placed[group, i] = _placed(unit, parameter)
                old, scaled = parameter.clone(), parameter / s
                parameter.grad *= s
                parameter.copy_(scaled)
                scaled_parameters.append((parameter, old, scaled, s))

    @torch.no_grad()
    def finish(optimizer, args, kwargs) -> None:
        for parameter, old, scaled, s in scaled_parameters:
            parameter.copy_(old + s * (parameter - scaled))
        scaled_parameters.clear()

    optimizer.register_step_pre_hook(prepare)
    optimizer.register_step_post_hook(finish)
    return optimizer


def _placed(unit: Tensor, parameter: Tensor) -> Tensor:
    """``unit`` on the device of ``parameter``, and sharded like it."""
    if not hasattr(parameter, "placements"):
        return unit.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    mesh = sharded.device_mesh
    return distribute_tensor(unit.to(mesh.device_type), mesh, sharded.placements, src_data_rank=None)


def _check(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and (not isinstance(value, (int, float)) or not 0.0 <= value < math.inf):
            raise ConfigError(f"{name} {value!r}: must be a finite number and at least 0")
