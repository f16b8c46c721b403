"""Benchmarks of standalone activations: on two large tensors, over elements and degree, and on one token."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping

import psutil
import torch
from torch import Tensor, nn

from ..activations import FAMILIES, build
from ..activations.base import MAX_DEGREE
from ..files import explain
from ..profiling.memory import measure_each, peak_bytes, saved_bytes
from ..profiling.timing import Call, computing, host, interleave
from .competitors import REFERENCE, compiled, fixed, learnable, third_party
from .floors import FLOORS, Floor
from .results import BenchResults, NotRun
from .settings import Settings
from .targets import floor_of

Modules = Mapping[str, nn.Module]
Makers = Mapping[str, Callable[[], nn.Module]]
HERMITE_DEGREES = (1, 2, 3, 4, 6, 8, 9, 12, 16, 24, MAX_DEGREE)
DEGREES = (3, 8, MAX_DEGREE)
GROUPS = (16, 64)
ROOM = 128  # assumed bytes per element until measured at a smaller size
UNCACHED = 4  # the inputs take this many times the L2 cache


def l2_bytes() -> int:
    """Size of the L2 cache of the current GPU."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


class Load:
    """An input x ~ N(0, 1) and a random upstream gradient, with the calls to measure on them.

    Args:
        sets: number of copies of both, which the calls take in turn.
    """

    def __init__(self, shape: tuple[int, ...], settings: Settings, sets: int = 1):
        generator = torch.Generator(settings.device).manual_seed(settings.seed)
        self.x, self.gradient = (
            torch.randn(shape, generator=generator, device=settings.device, dtype=settings.dtype) for _ in range(2)
        )
        self.leaf = self.x.detach().requires_grad_()
        copies = [(self.leaf.detach().clone().requires_grad_(), self.gradient.clone()) for _ in range(sets - 1)]
        self.turns = itertools.cycle([(self.leaf, self.gradient), *copies])

    @classmethod
    def uncached(cls, shape: tuple[int, ...], settings: Settings) -> Load:
        """On CUDA with enough copies that no call finds its input in the L2 cache of the GPU."""
        size = math.prod(shape) * settings.dtype.itemsize
        return cls(shape, settings, math.ceil(UNCACHED * l2_bytes() / size) if settings.device == "cuda" else 1)

    def forward(self, module: nn.Module) -> Tensor:
        x, _ = next(self.turns)
        with torch.no_grad():
            return module(x)

    def forward_backward(self, module: nn.Module) -> None:
        x, gradient = next(self.turns)
        inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
        torch.autograd.grad(module(x), inputs, gradient, allow_unused=True)

    def forwards(self, modules: Modules) -> dict[str, Call]:
        return {name: functools.partial(self.forward, module) for name, module in modules.items()}

    def steps(self, modules: Modules) -> dict[str, Call]:
        return {name: functools.partial(self.forward_backward, module) for name, module in modules.items()}

    def saved(self, module: nn.Module) -> float:
        """Saved bytes per element."""
        return saved_bytes(lambda: module(self.leaf), module.parameters()) / self.x.numel()


def _add_times(
    results: BenchResults, case: str, modules: Modules, load: Load, settings: Settings, sample: float = 0.0
) -> None:
    if settings.device == "cuda":
        sample = settings.sample  # no call is long for a GPU
    for measure, calls in (("forward", load.forwards(modules)), ("forward + backward", load.steps(modules))):
        times = interleave(
            calls,
            rounds=settings.rounds,
            seconds=settings.seconds,
            sample=sample,
            device=settings.device,
            clock=computing,
        )
        results.add_times(case, measure, times)


def _add_saved(results: BenchResults, case: str, modules: Modules, load: Load) -> None:
    saved = {name: load.saved(module) for name, module in modules.items()}
    results.add_memory(case, "saved", saved, load.x.element_size())


def _add_peak(results: BenchResults, case: str, modules: Modules, load: Load, device: str) -> None:
    """Peak bytes per element of a forward and backward pass, excluding x and the upstream gradient."""
    peaks = measure_each(peak_bytes, load.steps(modules), device)
    results.add_memory(case, "peak", {name: peak / load.x.numel() for name, peak in peaks.items()})


def _ready(
    results: BenchResults, case: str, makers: Makers, load: Load, *, optional: bool = False
) -> dict[str, nn.Module]:
    """The competitors that run on ``load``. The others are recorded, as failures unless they are optional."""
    modules: dict[str, nn.Module] = {}
    for name, make in makers.items():
        try:
            module = make().to(load.x.device)
            load.forward(module)
            load.forward_backward(module)
            load.saved(module)
        except Exception as error:  # any failure, in a compiler or another library: continue with the rest
            if name.startswith(REFERENCE):
                raise  # nothing to compare with
            reason = explain(error)
            if isinstance(error, ModuleNotFoundError):
                reason = f"{error.name} is not installed"
            results.not_run.append(NotRun(case, name, reason, failed=not optional))
        else:
            modules[name] = module
    return modules


def _large(results: BenchResults, settings: Settings, case: str, shape: tuple[int, ...]) -> None:
    load = Load.uncached(shape, settings)
    modules = _ready(results, case, fixed() | learnable(), load)
    if settings.device == "cpu":
        modules |= {floor_of(row): Floor(*operations) for row, operations in FLOORS.items()}
    if settings.compiled:
        torch.compiler.reset()  # all activations share one forward, with a limited number of variants
        modules |= _ready(results, case, compiled(), load)
    else:
        results.not_run += [NotRun(case, name, "skipped by --quick") for name in compiled()]
    _add_times(results, case, modules, load, settings)
    _add_saved(results, case, modules, load)
    _add_peak(results, case, modules, load, settings.device)


def sequence(results: BenchResults, settings: Settings) -> None:
    """Fixed, learnable and compiled activations on the pre-activation shape of a transformer."""
    _large(results, settings, "sequence", settings.sequence)


def image(results: BenchResults, settings: Settings) -> None:
    """The same on the pre-activation shape of a ConvNeXt."""
    _large(results, settings, "image", settings.image)


def libraries(results: BenchResults, settings: Settings) -> None:
    """Other installed libraries, next to their counterparts in this package."""
    load = Load.uncached(settings.libraries, settings)
    counterparts = ("hermite_3", "fourier_6", "tropical_6", "tropical_rational_6")
    makers = {REFERENCE: fixed()[REFERENCE]} | {name: learnable()[name] for name in counterparts}
    modules = _ready(results, "libraries", makers, load)
    modules |= _ready(results, "libraries", third_party(settings.device), load, optional=True)
    _add_times(results, "libraries", modules, load, settings)
    _add_saved(results, "libraries", modules, load)
    _add_peak(results, "libraries", modules, load, settings.device)


def elements(results: BenchResults, settings: Settings) -> None:
    """``hermite_8`` over the number of elements, in rows such as ``hermite_8 10000``, next to ``F.gelu 10000``."""
    makers = {REFERENCE: fixed()[REFERENCE], "hermite_8": learnable()["hermite_8"]}
    room = float(ROOM)
    for n in settings.elements:
        if n * room > _free_memory(settings.device):
            results.not_run.append(NotRun("elements", f"hermite_8 {n}", "too little free memory"))
            continue
        load = Load.uncached((n,), settings)
        modules = _ready(results, "elements", {f"{name} {n}": make for name, make in makers.items()}, load)
        _add_times(results, "elements", modules, load, settings, settings.sample)
        _add_saved(results, "elements", modules, load)
        peaks = measure_each(peak_bytes, load.steps(modules), settings.device)
        room = 2 * load.x.element_size() + max(peaks.values(), default=ROOM * n) / n


def _free_memory(device: str) -> int:
    if device != "cuda":
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def degree(results: BenchResults, settings: Settings) -> None:
    """The Hermite family from degree 1 to 32, and the other families at three degrees."""
    makers = {REFERENCE: fixed()[REFERENCE]}
    for family, cls in FAMILIES.items():
        degrees = HERMITE_DEGREES if family == "hermite" else DEGREES
        makers |= {f"{family}_{n}": functools.partial(cls, n, init="unit") for n in degrees}
    load = Load.uncached((settings.degree_elements,), settings)
    modules = _ready(results, "degree", makers, load)
    _add_times(results, "degree", modules, load, settings, settings.sample)
    _add_saved(results, "degree", modules, load)


def groups(results: BenchResults, settings: Settings) -> None:
    """Activations with groups of channels over the same without groups, in rows such as ``hermite_3_g16 2048x1536``."""
    names = dict.fromkeys(["hermite_3", *(f"{family}_{cls.default_degree}" for family, cls in FAMILIES.items())])
    for shape in settings.groups:
        load = Load.uncached(shape, settings)
        for name in names:
            rows = {f"{row} {shape[0]}x{shape[1]}": row for row in (name, *(f"{name}_g{n}" for n in GROUPS))}
            makers = {row: functools.partial(build, made, init="unit") for row, made in rows.items()}
            modules = _ready(results, "groups", makers, load)
            _add_times(results, "groups", modules, load, settings, settings.sample)
            _add_saved(results, "groups", modules, load)


def decode(results: BenchResults, settings: Settings) -> None:
    """One token, without and with gradients: the overhead of calling the module."""
    load = Load(settings.decode, settings)
    makers = {name: make for name, make in (fixed() | learnable()).items() if name not in ("copy", "torch.cos")}
    modules = _ready(results, "decode", makers, load)
    sample = 10 * settings.sample
    for measure, calls in (("call", load.forwards(modules)), ("call + backward", load.steps(modules))):
        times = interleave(calls, rounds=settings.rounds, sample=sample, device=settings.device, clock=host)
        results.add_times("decode", measure, times)
