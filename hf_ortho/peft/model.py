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
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..activations import LearnableActivation, build, parse
from ..checkpoints.adapter import fixed_tensors
from ..conversion import ConversionReport, Histogram, Site, collect, find_sites
from ..conversion.convert import describe_layer, driving_values, provenance
from ..conversion.fit_sites import Fitted, device_of, fit_site
from ..conversion.sites import set_field
from ..errors import AdapterError, SiteError
from .config import OrthoConfig
from .layer import OrthoLayer


class OrthoModel(BaseTuner):
    """Puts learnable activations in the place of those that the config of ``model`` drives; made by
    ``peft.get_peft_model(model, OrthoConfig(...))``.

    Args:
        model: a transformers model; what is not an activation of the adapter gets frozen.
        config: the adapter's ``OrthoConfig``.
        adapter_name: its name.

    Raises:
        SiteError: the config drives no activation, or ``target_modules`` names something else; the model is as before.
        FitError: an activation of the model cannot be followed; the model is as before.
        AdapterError: a saved adapter is for other activations than the model has; the model is as before.
    """

    prefix = "hf_ortho_"
    tuner_layer_cls = OrthoLayer

    def inject_adapter(self, model, adapter_name, *args, **kwargs) -> None:
        # A copy: the caller's config may serve another model.
        config = cast(OrthoConfig, copy.deepcopy(self.peft_config[adapter_name]))
        with unwrapped(model):
            sites = targeted_sites(model, config)
            if config.layers is None:
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
        known = next(entry for entry in peft_config.layers if entry["module"] == current_key)
        device = device_of(self.model, current_key)
        fixed = {name: value.to(device) for name, value in fixed_tensors(known).items()}
        layer.update_layer(adapter_name, self._new[current_key], fixed)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        setattr(parent, child_name, new_module)  # on the right device already, and without a weight to share

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if not merge:
            return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        names = adapter_names or self.active_adapters
        if len(names) != 1:
            raise AdapterError(f"adapters {', '.join(names) or 'none'} cannot be merged: merge exactly one of them")
        config = cast(OrthoConfig, self.peft_config[names[0]])
        model: Any = self.model
        with unwrapped(model):
            sites, _ = find_sites(model, list(config.source_activations or ()))
        layers = [{k: v for k, v in layer.items() if k != "tail_slopes"} for layer in config.layers or ()]
        chosen = {layer["module"] for layer in layers}
        if left := [path for site in sites for path in site.modules if path not in chosen]:
            raise AdapterError(
                f"adapter {names[0]} leaves {left[0]} as it is, but the config drives it together with the others, so "
                "a merged model would not reload: use the adapter unmerged"
            )
        for module in model.modules():
            if isinstance(module, OrthoLayer):
                module.check_merge(names, safe_merge)  # all of them, before the first is gone
        model = super()._unload_and_optionally_merge(True, progressbar, safe_merge, names)
        model.config.hf_ortho = provenance(
            model, config.activation, driving_values(sites), layers, config.calibrated, tails=True
        )
        model.config.hf_ortho["source_revision"] = model.config.hf_ortho["source_revision"] or config.base_commit
        for site in sites:
            set_field(model.config, site.field, site.prefix + config.activation)
        return model


@contextlib.contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """The activations of the base model in the place of all ``OrthoLayer``."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, OrthoLayer)}
    try:
        for path, layer in layers.items():
            model.set_submodule(path, layer.base_layer)
        yield
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)


def targeted_sites(model: PreTrainedModel, config: OrthoConfig) -> list[Site]:
    """The driving fields of ``model`` with those of their modules that ``config`` selects."""
    sites, _ = find_sites(model, config.fields)
    driven = {path for site in sites for path in site.modules}
    targets = sorted(driven) if config.target_modules is None else config.target_modules
    matcher = dataclasses.replace(config, target_modules=targets)
    chosen = {path for path, _ in model.named_modules() if path and check_target_module_exists(matcher, path)}
    if stray := sorted(chosen - driven):
        raise SiteError(
            f"target_modules {config.target_modules!r} selects {stray[0]}, which is no activation that the config of "
            f"{type(model).__name__} drives; these are {_some(driven)}"
        )
    if not chosen:
        raise SiteError(
            f"target_modules {config.target_modules!r} selects nothing; the config of {type(model).__name__} drives "
            f"{_some(driven)}"
        )
    narrowed = (dataclasses.replace(s, modules=tuple(p for p in s.modules if p in chosen)) for s in sites)
    return [site for site in narrowed if site.modules]


def _some(paths: Iterable[str]) -> str:
    first, *rest = sorted(paths)
    return f"{first} and {len(rest)} more" if rest else first


def _fit(
    model: PreTrainedModel, sites: list[Site], config: OrthoConfig, histograms: dict[str, Histogram]
) -> dict[str, LearnableActivation]:
    """New activations by path, fitted to those of ``model``; ``config`` gets what is known of them."""
    family, degree = parse(config.activation)
    if next(family(degree).parameters()).is_meta:
        raise AdapterError("low_cpu_mem_usage is for loading a saved adapter: a new one is fitted, which takes memory")
    start = time.perf_counter()
    fitted: Fitted = {}
    for site in sites:
        fitted |= fit_site(model, site, family, degree, histograms, config.options)
    config.report = ConversionReport.of(model, fitted, histograms, time.perf_counter() - start)
    config.layers = [describe_layer(v) | {"tail_slopes": list(v.fit.tail_slopes)} for v in config.report.layers]
    config.source_activations = driving_values(sites)
    config.calibrated = bool(histograms)
    config.base_commit = _commit(model, config)
    config.hf_ortho_version = version("hf_ortho")
    return {path: module for path, (module, _) in fitted.items()}


def _commit(model: PreTrainedModel, config: OrthoConfig) -> str | None:
    """The commit of the base model: as noted on loading, else that of its config in the cache, if only one is there."""
    name = model.name_or_path or ""
    if (known := getattr(model.config, "_commit_hash", None)) or Path(name).exists():
        return known
    with contextlib.suppress(HFValidationError):  # a name that cannot be on the Hub
        file = try_to_load_from_cache(name, CONFIG_NAME, revision=config.revision)
        if isinstance(file, str) and (config.revision or len(list(Path(file).parents[1].iterdir())) == 1):
            return Path(file).parent.name
    return None


def _empty(model: PreTrainedModel, sites: list[Site], config: OrthoConfig) -> dict[str, LearnableActivation]:
    """The activations that ``config`` describes by path, their parameters NaN: the adapter's weights are to come."""
    known = {layer["module"] for layer in config.layers or []}
    made_for = f"the adapter was made for {config.base_model_name_or_path or 'another model'}"
    if (found := driving_values(sites)) != config.source_activations:
        raise AdapterError(
            f"the config of {type(model).__name__} has {found}, but {made_for} with {config.source_activations}"
        )
    if odd := known ^ {path for site in sites for path in site.modules}:
        raise AdapterError(f"{made_for}: its activations and those of {type(model).__name__} differ at {min(odd)}")
    modules = {}
    for path in known:
        modules[path] = new = build(config.activation).train(model.get_submodule(path).training)
        if not new.domain.is_meta:
            with torch.no_grad():
                for parameter in new.to(device_of(model, path)).parameters():
                    parameter.fill_(torch.nan)
    return modules


def calibrate(
    model: PeftModel | PreTrainedModel, batches: Iterable, adapter_name: str | None = None
) -> ConversionReport:
    """Fit an adapter anew, each activation weighted by the pre-activations of its layer over ``batches``.

    What the adapter had learned is lost, so this comes before training.

    Args:
        model: a model with an ``OrthoConfig`` adapter, from ``get_peft_model`` or ``model.add_adapter``.
        batches: model inputs, as for ``hf_ortho.convert``.
        adapter_name: the adapter; the active one by default.

    Raises:
        AdapterError: the model has no such adapter.
        CalibrationError: the batches are empty, of the wrong kind or not finite.
        In both cases the adapter is as before.
    """
    configs = getattr(model, "peft_config", {})
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if adapter_name is None and configs:
        active = model.active_adapters if isinstance(model, PeftModel) else model.active_adapters()
        adapter_name = next((name for name in active if isinstance(configs[name], OrthoConfig)), None)
    config = configs.get(adapter_name)
    if not isinstance(config, OrthoConfig):
        known = ", ".join(name for name, c in configs.items() if isinstance(c, OrthoConfig)) or "none"
        what = (
            f"{type(base).__name__} has no active adapter"
            if adapter_name is None
            else f"{adapter_name!r} is no adapter"
        )
        raise AdapterError(f"{what} of activations; it has: {known}; add one with get_peft_model(model, OrthoConfig())")
    with unwrapped(base):
        sites = targeted_sites(base, config)
        histograms, _ = collect(base, [path for site in sites for path in site.modules], batches)
        fitted = _fit(base, sites, config, histograms)
    report = cast(ConversionReport, config.report)
    for path, new in fitted.items():
        learned = base.get_submodule(path).hf_ortho_act[adapter_name]
        with torch.no_grad():
            for name, value in new.state_dict().items():  # in place, an optimizer may have them
                getattr(learned, name).copy_(value)
        report.modules[path] = learned, *report.modules[path][1:]
    return report
