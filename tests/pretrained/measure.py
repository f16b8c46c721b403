"""Convert one model in several ways, and compare each result to its source."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import io
import time
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_ortho
from hf_ortho.activations import parse
from hf_ortho.conversion.fidelity import Fidelity, measure
from hf_ortho.conversion.replace import swapped

from .inputs import Batch, Inputs

WAYS = {"data-free": None, "density": "density", "fisher": "fisher"}
TORCHORTHO = {
    "hermite": "HermiteActivation",
    "fourier": "FourierActivation",
    "tropical": "TropicalActivation",
    "tropical_rational": "TropicalRationalActivation",
}

Modules = Mapping[str, nn.Module]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """New activations by path, the largest error of any of them anywhere, and the time to make them."""

    activation: str
    way: str
    modules: Modules
    seconds: float
    sup_error: float | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Moved:
    """1 - cosine of mean-pooled embeddings with those of the source model: mean and maximum."""

    mean: float
    worst: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One conversion, measured: on the test batches, and by name on other domains.

    ``moved`` and ``others_moved`` are given for a model without classes, see ``Moved``.
    """

    conversion: Conversion
    test: Fidelity
    others: dict[str, Fidelity]
    moved: Moved | None = None
    others_moved: dict[str, Moved] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict:
        plain = dataclasses.asdict(
            dataclasses.replace(self, conversion=dataclasses.replace(self.conversion, modules={}))
        )
        conversion = plain.pop("conversion")
        del conversion["modules"]
        return conversion | plain


def results(
    model: PreTrainedModel, inputs: Inputs, activation: str, ways: list[str], *, baseline: bool, seed: int
) -> list[Result]:
    """Convert copies of ``model`` to ``activation`` in each of ``ways``, and measure them all."""
    made = list(conversions(model, inputs, activation, ways))
    if baseline:
        made += torchortho(model, list(made[0].modules), activation, seed)
    sources = {path: model.get_submodule(path) for path in made[0].modules}
    tests = []
    for one in made:
        with swapped(model, one.modules):
            tests += measure(model, sources, dict(enumerate(inputs.test)), held_out=True)
    first, *rest = [one.modules for one in made]
    others = {}
    for name, batches in inputs.others.items():
        with swapped(model, first):  # one call for all: the source model runs once
            others[name] = measure(model, sources, dict(enumerate(batches)), rest, held_out=True)
    moved: dict[str, list[Moved | None]] = {"": [None] * len(made)}
    if tests[0].kl is None:
        for name, batches in {"": inputs.test, **inputs.others}.items():
            before = embeddings(model, batches)
            moved[name] = [distance(before, model, batches, one.modules) for one in made]
    return [
        Result(
            one,
            tests[i],
            {name: found[i] for name, found in others.items()},
            moved[""][i],
            {name: found[i] for name, found in moved.items() if name},
        )
        for i, one in enumerate(made)
    ]


def conversions(model: PreTrainedModel, inputs: Inputs, activation: str, ways: Iterable[str]) -> Iterator[Conversion]:
    for way in ways:
        weights = WAYS[way]
        options = {"calibration": inputs.calibration, "weights": weights} if weights else {}
        report = hf_ortho.convert(copy.deepcopy(model), activation, **options)
        modules = {path: learned for path, (learned, _, _) in report.modules.items()}
        worst = max(layer.fit.sup_error for layer in report.layers)
        yield Conversion(activation, way, modules, report.seconds, worst, tuple(report.notes))


def torchortho_installed() -> bool:
    return importlib.util.find_spec("torchortho") is not None


def torchortho(model: PreTrainedModel, paths: list[str], activation: str, seed: int) -> list[Conversion]:
    """The activations of the package torchortho, which fits a function given as ``act_init``; each function once."""
    import torchortho

    family, degree, _ = parse(activation)
    modules: dict[str, nn.Module] = {}
    fitted: dict[type, nn.Module] = {}
    start = time.perf_counter()
    for path in paths:
        source = model.get_submodule(path)
        if type(source) not in fitted:
            with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                cls = getattr(torchortho, TORCHORTHO[family.family])
                fitted[type(source)] = cls(degree, act_init=source, load_cached=False)
        modules[path] = copy.deepcopy(fitted[type(source)])
    return [Conversion(activation, "torchortho", modules, time.perf_counter() - start)]


@torch.no_grad()
def embeddings(model: PreTrainedModel, batches: list[Batch]) -> Tensor:
    """Means over the tokens of each text, float64, (texts, features)."""
    found = []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).double().unsqueeze(-1)
        hidden = model(**batch).last_hidden_state.double()
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def distance(before: Tensor, model: PreTrainedModel, batches: list[Batch], modules: Modules) -> Moved:
    with swapped(model, modules):
        after = embeddings(model, batches)
    away = 1 - torch.cosine_similarity(before, after)
    return Moved(float(away.mean()), float(away.max()))
