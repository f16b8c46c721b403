"""PEFT in training: LoRA alongside trained activations, merged at the end, or an adapter that is saved separately."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from peft import LNTuningConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from ..activations import LearnableActivation
from ..checkpoints.load import Checkpoint
from ..conversion.sites import norm_layers, rebuild
from ..errors import ConfigError
from ..files import explain
from ..peft import OrthoConfig, calibrate
from ..tasks import head_of
from .arguments import LoraArguments, ModelArguments
from .distributed import fits_agree
from .policies import NO_ACTIVATIONS, freeze_domains

ADAPTERS = ("activations", "activations+norms", "norms", "lora", "lora+activations")
FITTED = ADAPTERS[:2]  # with new activations, so that the model is not converted


def add_lora(
    model: PreTrainedModel, arguments: LoraArguments, seed: int, policy: str = "lora+activations", **options
) -> PeftModel:
    """Wrap ``model`` with LoRA on its linear layers. Activations are trained too (``modules_to_save``).

    ``policy`` is ``lora`` or ``lora+activations``. ``options`` are passed to ``LoraConfig``.

    Raises:
        ConfigError: a value is invalid, or no layer matches a target name.

    Example:
        >>> from hf_ortho.training import LoraArguments, add_lora
        >>> _ = hf_ortho.convert(model, "hermite_3")
        >>> wrapped = add_lora(model, LoraArguments(lora_r=2, lora_target_modules=["c_fc"]), seed=0)
        >>> wrapped.get_nb_trainable_parameters()[0]  # 2 layers: 160 of LoRA, 4 of the activation
        328
    """
    saved = [path for path, module in model.named_modules() if isinstance(module, LearnableActivation)]
    if policy == "lora+activations" and not saved:
        raise ConfigError(NO_ACTIVATIONS.format(policy))
    saved = [*(saved if policy == "lora+activations" else []), *options.pop("modules_to_save", [])]
    targets = arguments.lora_target_modules
    everything = not targets or targets == ["all-linear"]  # peft's word for it, which it takes outside a list only
    set_seed(seed)  # the same initial adapters in all processes
    try:
        config = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules="all-linear" if everything else targets,
            modules_to_save=saved or None,
            **options,
        )
        return _wrap(model, config)
    except ValueError as error:
        values = f"lora_r {arguments.lora_r}, lora_target_modules {targets or 'all-linear'}"
        raise ConfigError(f"train {policy!r}, {values}: {explain(error)}") from error


def add_adapter(
    checkpoint: Checkpoint,
    arguments: ModelArguments,
    lora: LoraArguments,
    seed: int,
    calibration: list[dict] | None = None,
    resume: str | None = None,
) -> PeftModel:
    """Wrap the model with an adapter for the policy ``arguments.train``. The base model is not changed.

    A new head for the classes of the dataset is trained and saved with the adapter. ``calibration`` weights the fit of
    activations, which all processes fit together. With a checkpoint ``resume``, the activations are not refitted.

    Raises:
        HfOrthoError: a value does not fit the model.

    Example:
        >>> from hf_ortho.checkpoints.load import Checkpoint
        >>> from hf_ortho.training import LoraArguments, ModelArguments, add_adapter
        >>> arguments = ModelArguments(train="activations", activation="hermite_3", adapter=True)
        >>> wrapped = add_adapter(Checkpoint(model, None, None, None), arguments, LoraArguments(), seed=0)
        >>> type(wrapped).__name__
        'PeftModelForCausalLM'
    """
    if checkpoint.merged:
        raise ConfigError(
            f"adapter: {arguments.model} is itself an adapter and was merged on loading; save the merged model with "
            "merge_and_unload().save_pretrained(...) and give it as model"
        )
    head, kind = list(checkpoint.new_modules), head_of(checkpoint.model).peft_type
    # With this type, peft also trains and saves the head: all of it, and even one that is not new.
    if kind == "SEQ_CLS":
        head = list(dict.fromkeys(_outside_base(checkpoint.model, path) for path in head))
        kind = kind if head else None
    options: dict[str, Any] = {
        "task_type": kind,
        "modules_to_save": head,
        "revision": checkpoint.commit,
    }
    model, policy = checkpoint.model, arguments.train
    if policy.startswith("lora"):
        return add_lora(model, lora, seed, policy, **options)
    options["modules_to_save"] = head or None
    if policy == "norms":
        return _wrap(model, LNTuningConfig(target_modules=norm_layers(model), **options))
    config = OrthoConfig(activation=str(arguments.activation), norms=policy == "activations+norms", **options)
    if resume is not None:
        fitted = OrthoConfig.from_pretrained(resume)
        for key in ("layers", "source_activations", "calibrated", "base_commit", "hf_ortho_version"):
            setattr(config, key, getattr(fitted, key))
    with fits_agree():
        wrapped = _wrap(model, config)
        if calibration is not None and resume is None:
            calibrate(wrapped, calibration)
    return wrapped


def _outside_base(model: PreTrainedModel, path: str) -> str:
    """The child of the model that contains the module at ``path``, or the path of a module in the base model."""
    return path if path.startswith(f"{model.base_model_prefix}.") else path.partition(".")[0]


def check_adapter(arguments: ModelArguments) -> None:
    """Raise ConfigError if an adapter does not support the policy ``train``."""
    if arguments.train not in ADAPTERS:
        raise ConfigError(
            f"adapter: train {arguments.train!r} has no adapter; use {', '.join(ADAPTERS)} (a new head for the classes "
            "of the dataset is added automatically), or omit adapter"
        )
    if arguments.init == "scratch":
        raise ConfigError("adapter: requires a pretrained model, not init scratch")
    if arguments.train in FITTED and not arguments.activation:
        raise ConfigError(f"adapter: train {arguments.train!r} requires --activation, such as hermite_8")


def _wrap(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    with warnings.catch_warnings():  # peft warns about the orientation of GPT-2's layers, and corrects it
        warnings.simplefilter("ignore")
        wrapped = cast(PeftModel, get_peft_model(model, config))
    freeze_domains(wrapped)  # peft makes all of modules_to_save trainable
    return wrapped


def merge_lora(model: PeftModel, state_dict: dict[str, Tensor] | None = None) -> PreTrainedModel:
    """Merge the adapters into the weights of the base model. ``state_dict`` holds the full tensors of a sharded model.

    Example:
        >>> from hf_ortho.training import LoraArguments, add_lora, merge_lora
        >>> arguments = LoraArguments(lora_target_modules=["c_fc"])
        >>> type(merge_lora(add_lora(model, arguments, seed=0, policy="lora"))).__name__
        'GPT2LMHeadModel'
    """
    whole = model
    if state_dict is not None:
        base = rebuild(cast(PreTrainedModel, model.get_base_model()), model.config)
        with torch.device("meta"):
            whole = _wrap(base, model.peft_config["default"])
        whole.load_state_dict(state_dict, strict=False, assign=True)
        whole.tie_weights()
    return cast(PreTrainedModel, whole.merge_and_unload())
