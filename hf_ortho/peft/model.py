"""The tuner: finds the activations that the config drives, fits learnable ones, and merges them into a conversion."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..activations import LearnableActivation, build, parse
from ..checkpoints.adapter import fixed_tensors
from ..checkpoints.provenance import LayerProvenance, Provenance
from ..conversion import ConversionReport, Histogram, Site, collect, find_sites
from ..conversion.convert import driving_values
from ..conversion.fit_sites import device_of, fit_sites
from ..conversion.sites import norm_layers, set_field
from ..conversion.states import check_not_partitioned
from ..conversion.widths import check_groups
from ..errors import AdapterError, SiteError
from ..processes import together
from .config import OrthoConfig
from .layer import OrthoLayer


class OrthoModel(BaseTuner):
    """Replaces the activations driven by the config of ``model`` with learnable ones. Create it with
    ``peft.get_peft_model(model, OrthoConfig(...))``.

    Args:
        model: a transformers model; everything but the adapter's activations is frozen.
        config: the adapter's ``OrthoConfig``.
        adapter_name: the name of the adapter.

    Raises:
        SiteError: the config drives no activation, or ``target_modules`` selects other modules.
        WidthError: the channels of an activation cannot be divided into the groups.
        FitError: an activation of the model cannot be fitted.
        AdapterError: a saved adapter does not match the activations of the model.
        In every case the model is unchanged.

    Example:
        >>> import peft
        >>> adapted = peft.get_peft_model(model, hf_ortho.peft.OrthoConfig(activation="hermite_4"))
        >>> type(adapted.base_model).__name__
        'OrthoModel'
        >>> adapted.merge_and_unload().config.activation_function  # a converted model
        'hermite_4'
    """

    prefix = "hf_ortho_"
    tuner_layer_cls = OrthoLayer

    def inject_adapter(self, model, adapter_name, *args, **kwargs) -> None:
        # A copy: the caller may use the config for another model.
        config = cast(OrthoConfig, copy.deepcopy(self.peft_config[adapter_name]))
        with unwrapped(model):
            sites = targeted_sites(model, config)
            if config.norms:
                config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *norm_paths(model)]))
            if config.layers is None:
                with together(False, "an OrthoConfig"):  # without data
                    self._new = _fit(model, sites, config, {})
            else:
                self._new = _empty(model, sites, config)
        self.peft_config[adapter_name] = config
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            del self._new

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config, key: str) -> bool:
        return any(layer["module"] == key for layer in peft_config.layers)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        layer = target
        if not isinstance(target, OrthoLayer):
            layer = OrthoLayer(target).train(target.training)
            self._replace_module(parent, target_name, layer, target)
        device = device_of(self.model, current_key)
        fixed = {name: value.to(device) for name, value in fixed_tensors(peft_config.provenance, current_key).items()}
        layer.update_layer(adapter_name, self._new[current_key], fixed)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        setattr(parent, child_name, new_module)  # already on the right device, and without shared weights

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if not merge:
            _choose(self.model, [])
            return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        names = adapter_names or self.active_adapters
        if len(names) != 1:
            raise AdapterError(f"adapters {', '.join(names) or 'none'} cannot be merged: merge exactly one of them")
        config = cast(OrthoConfig, self.peft_config[names[0]])
        model: Any = self.model
        with unwrapped(model):
            sites, _ = find_sites(model, list(config.source_activations or ()))
        layers = [dataclasses.replace(layer, tail_slopes=None) for layer in config.provenance.layers]
        chosen = {layer.module for layer in layers}
        if left := [path for site in sites for path in site.modules if path not in chosen]:
            raise AdapterError(
                f"adapter {names[0]} does not replace {left[0]}, but one config field drives it together with the "
                "others, so a merged model could not be reloaded: use the adapter unmerged"
            )
        for module in model.modules():
            if isinstance(module, OrthoLayer):
                module.check_merge(names, safe_merge)  # check all layers before replacing the first
        _choose(model, names)
        model = super()._unload_and_optionally_merge(True, progressbar, safe_merge, names)
        provenance = Provenance.of_conversion(
            model.config, config.activation, driving_values(sites), layers, calibrated=config.calibrated, tails=True
        )
        commit = provenance.source_revision or config.base_commit
        model.config.hf_ortho = dataclasses.replace(provenance, source_revision=commit).to_dict()
        for site in sites:
            set_field(model.config, site.field, site.prefix + config.activation)
        return model


@contextlib.contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Temporarily replace every ``OrthoLayer`` by the activation of the base model."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, OrthoLayer)}
    try:
        for path, layer in layers.items():
            model.set_submodule(path, layer.base_layer)
        yield
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)


def targeted_sites(model: PreTrainedModel, config: OrthoConfig) -> list[Site]:
    """The driving fields of ``model`` with the modules that ``config`` selects."""
    for key, kinds in (("target_modules", str | list | tuple | set | None), ("fields", list | tuple | None)):
        if not isinstance(value := getattr(config, key), kinds):
            raise AdapterError(f"{key} {value!r} of the OrthoConfig: must be a list of names")
    sites, _ = find_sites(model, config.fields)
    driven = {path for site in sites for path in site.modules}
    if config.target_modules is None:
        chosen = driven
    elif config.layers is not None:  # a saved adapter; matching a regular expression from a file may take forever
        chosen = driven & {layer.module for layer in config.provenance.layers}
    else:
        chosen = {path for path, _ in model.named_modules() if path and check_target_module_exists(config, path)}
    if stray := sorted(chosen - driven):
        raise SiteError(
            f"target_modules {config.target_modules!r} selects {stray[0]}, which is not an activation driven by the "
            f"config of {type(model).__name__}; it drives {_some(driven)}"
        )
    if not chosen and config.layers is None:
        raise SiteError(
            f"target_modules {config.target_modules!r} selects nothing; the config of {type(model).__name__} drives "
            f"{_some(driven)}"
        )
    narrowed = (dataclasses.replace(s, modules=tuple(p for p in s.modules if p in chosen)) for s in sites)
    return [site for site in narrowed if site.modules]


def _choose(model: nn.Module, names: list[str]) -> None:
    """Activate the copies in ``modules_to_save`` of adapters: peft unloads those that are active."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([name for name in names if name in module.modules_to_save])


def norm_paths(model: nn.Module) -> list[str]:
    """The normalization layers of a model, which adapters may have wrapped.

    Raises:
        AdapterError: there are none.
    """
    found = [path.removesuffix(".original_module") for path in norm_layers(model) if ".modules_to_save." not in path]
    if not found:
        raise AdapterError(f"norms of the OrthoConfig: {type(model).__name__} has no normalization layers")
    return found


def _some(paths: Iterable[str]) -> str:
    first, *rest = sorted(paths)
    return f"{first} and {len(rest)} more" if rest else first


def _fit(
    model: PreTrainedModel, sites: list[Site], config: OrthoConfig, histograms: dict[str, Histogram]
) -> dict[str, LearnableActivation]:
    """New activations by path, fitted to the activations of ``model``; records the fits in ``config``."""
    family = parse(config.activation)
    if next(family.build().parameters()).is_meta:
        raise AdapterError("low_cpu_mem_usage works only for a saved adapter: fitting a new one needs real parameters")
    check_groups(model, [path for site in sites for path in site.modules], family.groups)
    start = time.perf_counter()
    fitted = fit_sites(model, sites, family, {site.field: family.degree for site in sites}, histograms, config.options)
    weights = None
    if histograms:
        weights = "fisher" if any(h.importance is not None for h in histograms.values()) else "density"
    config.report = ConversionReport.of(model, fitted, histograms, time.perf_counter() - start, weights=weights)
    config.layers = [
        LayerProvenance.of_fit(layer.module, layer.field, layer.fit, tail_slopes=True).to_dict()
        for layer in config.report.layers
    ]
    config.source_activations = driving_values(sites)
    config.calibrated = bool(histograms)
    config.base_commit = _commit(model, config)
    config.hf_ortho_version = version("hf_ortho")
    return {path: module for path, (module, _) in fitted.items()}


def _commit(model: PreTrainedModel, config: OrthoConfig) -> str | None:
    """The commit of the base model, from its loaded config, or from the cache if it is unambiguous there."""
    name = model.name_or_path or ""
    if (commit := getattr(model.config, "_commit_hash", None)) or Path(name).exists():
        return commit
    with contextlib.suppress(HFValidationError):  # not a valid Hub name
        file = try_to_load_from_cache(name, CONFIG_NAME, revision=config.revision)
        if isinstance(file, str) and (config.revision or len(list(Path(file).parents[1].iterdir())) == 1):
            return Path(file).parent.name
    return None


def _empty(model: PreTrainedModel, sites: list[Site], config: OrthoConfig) -> dict[str, LearnableActivation]:
    """The activations described by ``config``, by path. Parameters are NaN until the adapter's weights are loaded."""
    paths = {layer.module for layer in config.provenance.layers}
    made_for = f"the adapter was made for {config.base_model_name_or_path or 'another model'}"
    if (values := driving_values(sites)) != config.source_activations:
        raise AdapterError(
            f"the config of {type(model).__name__} has {values}, but {made_for} with {config.source_activations}"
        )
    if odd := paths ^ {path for site in sites for path in site.modules}:
        raise AdapterError(f"{made_for}: its activations and those of {type(model).__name__} differ at {min(odd)}")
    modules = {}
    for path in paths:
        modules[path] = new = build(config.activation).train(model.get_submodule(path).training)
        if not new.domain.is_meta:
            with torch.no_grad():
                for parameter in new.to(device_of(model, path)).parameters():
                    parameter.fill_(torch.nan)
    return modules


@torch.inference_mode(False)  # inference tensors could not be trained
def calibrate(
    model: PeftModel | PreTrainedModel,
    batches: Iterable,
    adapter_name: str | None = None,
    *,
    weights: str = "fisher",
    distributed: bool = True,
) -> ConversionReport:
    """Refit an adapter, each activation weighted by the pre-activations of its layer over ``batches`` and by their
    effect on the predictions.

    Overwrites the parameters of the adapter: call it before training.

    Args:
        model: a model with an ``OrthoConfig`` adapter, from ``get_peft_model`` or ``model.add_adapter``.
        batches: model inputs, as for ``hf_ortho.convert``.
        adapter_name: the adapter; the active one by default.
        weights: ``"fisher"`` or ``"density"``, as for ``hf_ortho.convert``.
        distributed: False to fit to the batches of this process alone, as for ``hf_ortho.convert``.

    Returns:
        The report of the fits.

    Raises:
        AdapterError: the model has no such adapter.
        CalibrationError: the batches are empty, of the wrong kind or not finite.
        ProcessError: another process does not call this too.
        SiteError: the model is partitioned by DeepSpeed ZeRO-3.
        In every case the adapter is unchanged.

    Example:
        >>> import peft
        >>> adapted = peft.get_peft_model(model, hf_ortho.peft.OrthoConfig(activation="hermite_4"))
        >>> hf_ortho.peft.calibrate(adapted, [{"input_ids": torch.arange(32)[None]}]).weights
        'fisher'
    """
    configs = getattr(model, "peft_config", {})
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if adapter_name is None and configs:
        active = model.active_adapters if isinstance(model, PeftModel) else model.active_adapters()
        adapter_name = next((name for name in active if isinstance(configs[name], OrthoConfig)), None)
    config = configs.get(adapter_name)
    if not isinstance(config, OrthoConfig):
        known = ", ".join(name for name, c in configs.items() if isinstance(c, OrthoConfig)) or "none"
        name = type(base).__name__
        problem = (
            f"{name} has no active OrthoConfig adapter"
            if adapter_name is None
            else f"{adapter_name!r} is not an OrthoConfig adapter of {name}"
        )
        raise AdapterError(f"{problem}; it has: {known}; add one with get_peft_model(model, OrthoConfig())")
    check_not_partitioned(base)
    with unwrapped(base), together(distributed, "hf_ortho.peft.calibrate"):
        sites = targeted_sites(base, config)
        paths, groups = [path for site in sites for path in site.modules], parse(config.activation).groups
        histograms = collect(base, paths, batches, weights=weights, groups=groups)
        fitted = _fit(base, sites, config, histograms)
    report = cast(ConversionReport, config.report)
    for path, new in fitted.items():
        learned = base.get_submodule(path).activations[adapter_name]
        with torch.no_grad():
            for name, value in new.state_dict().items():  # in place: an optimizer may hold the parameters
                getattr(learned, name).copy_(value)
        report.modules[path] = learned, *report.modules[path][1:]
    return report
