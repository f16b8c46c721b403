"""Remote code: one source file, written from this package's own, that loads a converted model without the package."""

from __future__ import annotations

import json
import sys
import tempfile
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.generation import GenerationMixin
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _get_model_class

from ..activations import base, parse
from ..activations.registry import is_learnable
from ..checkpoints.load import check_place
from ..conversion.sites import activation_fields
from ..errors import CheckpointError, ConfigError
from ..files import explain
from ..kernels import cpu, dispatch
from .standalone import DOCSTRING, Standalone

MODULE = "modeling_hf_ortho"
FILE = f"{MODULE}.py"
IMPORTS = (
    ("copy", ""),
    ("functools", ""),
    ("torch", ""),
    ("transformers", ""),
    ("transformers.activations", "ACT2CLS"),
    ("transformers.activations", "ACT2FN"),
)

HEADER = '''\
# SPDX-License-Identifier: Apache-2.0
"""{activations}: learnable activations of a transformers model.

Written by hf_ortho {version} from its own source, for users who do not have it: load the model with
``trust_remote_code=True``. Where hf_ortho is installed, that is used instead. Tested with transformers {transformers}.
Formulas: Polynomial, trigonometric, and tropical activations, https://arxiv.org/abs/2502.01247
"""

from __future__ import annotations

{imports}

try:
    from hf_ortho import activations  # registers the names
except ImportError:
    activations = None

INITIAL_PARAMETERS = {initial}


'''

LEARNABLE_ACTIVATION = '''\
    r"""f(x) = S(clamp(x, lo, hi)) + s_lo min(x - lo, 0) + s_hi max(x - hi, 0), S the series of the family.

    ``domain`` = [lo, hi], ``tail_slopes`` = [s_lo, s_hi]. The input may have any shape and floating dtype, the output
    has the same. Arithmetic and parameters are at least float32.
    """

    def __init__(self, degree: int):
        super().__init__()
        self.degree, self.init = degree, "paper"
        self._create(INITIAL_PARAMETERS[self.name])

    def forward(self, x: Tensor) -> Tensor:
        tensors = (x, *self._tensors())
        plain = torch.compiler.is_compiling() or x.device.type != "cpu" or self.cpu_series is None
        if plain or _transformed(tensors):
            return self.formula(*tensors)
        return Evaluated.apply(type(self), *tensors)

'''

EVALUATED = '''

class Evaluated(torch.autograd.Function):
    """f(x) with the operations of hf_ortho's CPU kernel, so that all bits agree, and the gradient of the formula."""

    @staticmethod
    def forward(ctx, family, x, domain, tail_slopes, *parameters):
        ctx.family = family
        ctx.save_for_backward(x, domain, tail_slopes, *parameters)
        activation = _prepare(family.cpu_series, x, parameters, domain, tail_slopes)
        if x.numel() <= GRAIN:
            return activation.value(x.to(activation.dtype), None, activation.no_scratch).to(x.dtype)
        y = torch.empty_like(x)
        for source, out in zip(_flat(x, y.stride()).split(CHUNK), _flat(y, y.stride()).split(CHUNK)):
            source = source.to(activation.dtype)
            out.copy_(activation.value(source, torch.empty_like(source), activation.no_scratch))
        return y

    @staticmethod
    def backward(ctx, g):
        return None, *_formula_gradients(ctx.family.formula, ctx.saved_tensors, ctx.needs_input_grad[1:], g)


if activations is None:
    for name, build in {builds}.items():
        ACT2FN[name] = ACT2CLS[name] = build


class FromPretrained:
    """Loads the model; with hf_ortho installed in the class of transformers itself, which saves no code."""

    @classmethod
    def is_custom_code(cls):
        return False  # the model is transformers' own, and so are the names that its tensors have in files

    @classmethod
    def from_pretrained(cls, *args, config=None, **kwargs):
        if activations is None:
            return super().from_pretrained(*args, config=config, **kwargs)
        return getattr(transformers, cls.__name__).from_pretrained(*args, config=without_code(config), **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        if activations is None:
            return super()._from_config(config, **kwargs)
        return getattr(transformers, cls.__name__)._from_config(without_code(config), **kwargs)


def without_code(config):
    config = copy.deepcopy(config)
    getattr(config, "__dict__", {{}}).pop("auto_map", None)
    return config


{models}
'''


def add_remote_code(folder: str | Path) -> dict[str, bytes]:
    """The files that let a saved converted model load by ``trust_remote_code=True`` without hf_ortho.

    Args:
        folder: a model with its config.json; nothing is written to it.

    Returns:
        Name and content of each file to add or to replace: ``modeling_hf_ortho.py``, which needs torch and
        transformers only and holds the families in use, and ``config.json`` with ``auto_map``. On the CPU the
        model computes the same bits as with hf_ortho, elsewhere and under ``torch.compile`` the same formula.

    Raises:
        CheckpointError: there is no config.json, or no ``AutoModel...`` class loads the model.
        ConfigError: the model has no learnable activations.
    """
    check_place(str(Path(folder).absolute()))  # never a name on the Hub
    try:
        config = AutoConfig.from_pretrained(folder)
        stored = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {explain(error)}") from error
    architecture = (config.architectures or ["none"])[0]
    source, auto_map = _remote_code(config, architecture, str(folder))
    text = json.dumps(stored | {"auto_map": auto_map}, indent=2, sort_keys=True) + "\n"
    return {FILE: source.encode(), "config.json": text.encode()}


def enable_remote_code(model: PreTrainedModel) -> None:
    """Let ``save_pretrained`` and ``push_to_hub`` of a converted model also write the files of ``add_remote_code``.

    The class of ``model`` becomes a subclass of the same name. Call it after ``hf_ortho.convert``, and again if the
    model is converted to other activations.

    Raises:
        CheckpointError: no ``AutoModel...`` class loads the model.
        ConfigError: the model has no learnable activations.
    """
    architecture = type(model).__name__
    source, auto_map = _remote_code(model.config, architecture, architecture)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "hf_ortho"
        place.mkdir()
        (place / FILE).write_text(source, encoding="utf-8")
        subclass: Any = get_class_from_dynamic_module(f"{MODULE}.{architecture}", place)
    subclass.register_for_auto_class(
        next(auto for auto, name in auto_map.items() if name == f"{MODULE}.{architecture}")
    )
    model.__class__ = subclass
    model.config.auto_map = auto_map


def _remote_code(config: PreTrainedConfig, architecture: str, where: str) -> tuple[str, dict[str, str]]:
    """The source file and ``auto_map``."""
    names = sorted({source for _, _, source in activation_fields(config) if is_learnable(source)})
    if not names:
        raise ConfigError(f"{where} has no learnable activations; convert it first with hf-ortho convert")
    classes = _auto_classes(config)
    if architecture not in (cls.__name__ for cls in classes.values()):
        raise CheckpointError(
            f"no AutoModel class of transformers {transformers.__version__} loads the class {architecture!r} of "
            f"{where}, so it cannot carry remote code; push it without"
        )
    auto_map = {auto: f"{MODULE}.{cls.__name__}" for auto, cls in classes.items()}
    return _source(names, list(dict.fromkeys(classes.values()))), auto_map


def _auto_classes(config: PreTrainedConfig) -> dict[str, type[PreTrainedModel]]:
    """The classes that load this config, by the name of their ``AutoModel...`` class."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        is_auto = isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass) and auto._model_mapping is not None
        if is_auto and not name.startswith("_") and type(config) in auto._model_mapping:
            cls = _get_model_class(config, auto._model_mapping)
            if cls.config_class is type(config):  # and not a part of it, such as the text model
                found[name] = cls
    return found


def _source(names: list[str], classes: list[type[PreTrainedModel]]) -> str:
    parts = Standalone()
    for place, name in IMPORTS:
        parts.need(place, name)
    if any(issubclass(cls, GenerationMixin) for cls in classes):
        parts.need("transformers.generation", "GenerationMixin")
    parts.add(
        base,
        "LearnableActivation",
        members=("_create", "formula", "_tensors", "_apply", "_is_hf_initialized", "extra_repr"),
        without=(DOCSTRING, "__init__", "forward"),
        own=LEARNABLE_ACTIVATION,
    )
    for helper in ("_transformed", "_formula_gradients"):
        parts.add(dispatch, helper)
    for helper in ("_prepare", "_flat", "GRAIN", "CHUNK", "LARGE"):
        parts.add(cpu, helper)
    builds, initial = [], {}
    for name in names:
        family, degree = parse(name)
        parts.add(sys.modules[family.__module__], family.__name__)
        builds.append(f'"{name}": functools.partial({family.__name__}, {degree})')
        initial[f"{family.family}_{degree}"] = family.initial_parameters(degree, "paper")
    header = HEADER.format(
        activations=", ".join(names),
        version=version("hf_ortho"),
        transformers=transformers.__version__,
        imports=parts.imports,
        initial=textwrap.fill(json.dumps(initial), 118),
    )
    models = (f"class {cls.__name__}(FromPretrained, {_bases(cls)}): ..." for cls in classes)
    rest = EVALUATED.format(builds="{" + ", ".join(builds) + "}", models="\n".join(models))
    return f"{header}{parts.definitions}\n{rest}"


def _bases(cls: type[PreTrainedModel]) -> str:
    """transformers wants to see its GenerationMixin among the direct bases of code that is not its own."""
    return f"transformers.{cls.__name__}" + (", GenerationMixin" if issubclass(cls, GenerationMixin) else "")
