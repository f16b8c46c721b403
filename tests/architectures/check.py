"""Convert one tiny model, save it, reload it and compare; each model type in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import multiprocessing
import resource
import tempfile
import warnings

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import hf_ortho
from hf_ortho.activations import LearnableActivation
from hf_ortho.conversion.sites import find_sites, get_field
from hf_ortho.errors import HfOrthoError

from .build import CannotBuild, candidate_inputs, tiny_models

SMOOTH, KINKED = "hermite_16", "tropical_rational_4"  # follow GELU to 1e-4, and ReLU exactly
TOLERANCE = 0.1  # relative, of the outputs
SMALLEST = 0.05  # root mean square; an offset of 1e-4 per activation hides what is below
SECONDS = 90
MEMORY = 8 * 2**30

OK = "ok, outputs bit-equal"
UNDRIVEN = "ok (forward not driven)"
REFUSED = "refused"
NOT_BUILT = "could not build"
WRONG = "WRONG"


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a model type: one of the results above, and the reason or what is odd."""

    model_type: str
    outcome: str
    cls: str = ""
    sites: int = 0
    detail: str = ""


class WrongState(AssertionError):
    """A conversion that succeeded and left a model that is not right."""


def tensors(output) -> list[Tensor]:
    """All tensors in a nested model output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for item in output for tensor in tensors(item)]
    return []


@torch.no_grad()
def run(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(0)  # some models draw noise or permutations in their forward
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return tensors(model(**inputs, **options))


def driving_inputs(model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, str]:
    """The first inputs that the model takes and maps to finite outputs, else why there are none."""
    reasons = []
    for inputs in candidate_inputs(model):
        try:
            found = run(model, inputs)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}")
            continue
        if found and all(torch.isfinite(v.float()).all() for v in found if v.is_floating_point()):
            return inputs, ""
        reasons.append("its outputs are not finite" if found else "it returns no tensors")
    return None, reasons[0] if reasons else f"no input is known for {model.main_input_name}"


def settle(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Let batch normalization take its statistics from ``inputs``: random weights make signals vanish otherwise."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with contextlib.suppress(ValueError):  # one value per channel has no variance
        run(model, inputs)
    for norm in norms:
        norm.eval()


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error over the outputs, those below SMALLEST counted as that; infinite if shapes differ."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.is_floating_point() and b.numel():
            a, b = a.double().flatten(), b.double().flatten()
            worst = max(worst, float((a - b).norm() / b.norm().clamp(min=SMALLEST * b.numel() ** 0.5)))
    return worst


def sensitivity(model: PreTrainedModel, paths: list[str], inputs: dict[str, Tensor]) -> float:
    """How far the outputs go if every activation gives 1e-4 more, as a fit may."""
    before = run(model, inputs)
    modules = [model.get_submodule(path) for path in paths]
    handles = [module.register_forward_hook(lambda module, args, output: output + 1e-4) for module in modules]
    moved = run(model, inputs)
    for handle in handles:
        handle.remove()
    return distance(moved, before) if len(moved) == len(before) else float("inf")


def convert_and_compare(model: PreTrainedModel, inputs: dict[str, Tensor] | None) -> tuple[str, int, str]:
    """Outcome, number of converted modules and remarks; without ``inputs`` the forward is left out.

    Raises:
        HfOrthoError: the conversion is refused.
        WrongState: the reloaded model differs from the converted one, or that from the original.
    """
    sites, _ = find_sites(model)
    before = run(model, inputs) if inputs else []
    shaky = bool(inputs) and sensitivity(model, [name for site in sites for name in site.modules], inputs) > TOLERANCE
    kinked = any("relu" in site.source for site in sites)
    report = hf_ortho.convert(model, KINKED if kinked else SMOOTH)
    paths = {layer.module for layer in report.layers}
    remarks = [f"left alone: {field}: {reason}" for field, reason in report.left_alone]

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reloaded = type(model).from_pretrained(folder).eval()
        for tensor in (*reloaded.parameters(), *reloaded.buffers()):
            tensor.data = tensor.data.clone()  # a mapped file is aligned otherwise, and sums round otherwise then
    compare_states(model, reloaded, {layer.field for layer in report.layers}, paths)
    if not inputs:
        return UNDRIVEN, len(paths), "; ".join(remarks)

    called: set[str] = set()
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.add(path))
    after, again = run(model, inputs), run(reloaded, inputs)
    if len(after) != len(again) or not all(torch.equal(a, b) for a, b in zip(after, again, strict=True)):
        raise WrongState("the reloaded model gives other outputs than the converted one")
    if len(after) != len(before):
        raise WrongState("the converted model gives another number of outputs than the original")
    if shaky:
        remarks.append("not compared with the original, which an offset of 1e-4 per activation moves as far")
    elif (error := distance(after, before)) > TOLERANCE:
        raise WrongState(f"the converted model is far from the original: relative error {error:.2g}")
    if uncalled := sorted(paths - called):
        remarks.insert(0, f"{len(uncalled)} of {len(paths)} not called by {', '.join(inputs)}: {uncalled[0]}")
    return OK, len(paths), "; ".join(remarks)


def compare_states(model: PreTrainedModel, reloaded: PreTrainedModel, fields: set[str], paths: set[str]) -> None:
    """Raise WrongState unless tensors, driving fields and activations of the two models are the same."""
    expected, found = model.state_dict(), reloaded.state_dict()
    if expected.keys() != found.keys():
        raise WrongState(f"other tensors after the reload: {min(expected.keys() ^ found.keys())}")
    for key in expected:
        if expected[key].dtype != found[key].dtype or not torch.equal(expected[key], found[key]):
            raise WrongState(f"{key} is not bit-equal after the reload")
    for field in fields:
        if get_field(reloaded.config, field) != get_field(model.config, field):
            raise WrongState(f"{field} is {get_field(reloaded.config, field)!r} after the reload")
    places = {name for name, module in reloaded.named_modules() if isinstance(module, LearnableActivation)}
    if places != paths:
        raise WrongState(f"learnable activations at other places after the reload: {min(places ^ paths)}")


def drivable(model_type: str) -> tuple[PreTrainedModel, dict[str, Tensor] | None, str]:
    """The smallest model whose forward can be driven with its inputs, else the smallest one and why it cannot."""
    first = None
    for model in tiny_models(model_type):
        inputs, why = driving_inputs(model)
        if inputs is not None:
            settle(model, inputs)
            return model, inputs, ""
        first = first or (model, None, why)
    assert first is not None
    return first


def reloads_unconverted(model_type: str) -> bool:
    """Whether transformers saves and loads the tiny model as it is, bit-equal."""
    model = next(tiny_models(model_type))
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            compare_states(model, type(model).from_pretrained(folder), set(), set())
    except Exception:
        return False
    return True


def check(model_type: str) -> Result:
    """Build, convert and compare one model type in this process."""
    try:
        model, inputs, why = drivable(model_type)
    except CannotBuild as error:
        return Result(model_type, NOT_BUILT, detail=str(error))
    cls = type(model).__name__
    try:
        outcome, sites, detail = convert_and_compare(model, inputs)
    except HfOrthoError as error:
        return Result(model_type, REFUSED, cls, detail=str(error))
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not reloads_unconverted(model_type):
            return Result(model_type, NOT_BUILT, cls, detail=f"does not reload without a conversion either: {why}")
        return Result(model_type, WRONG, cls, detail=why)
    return Result(model_type, outcome, cls, sites, "; ".join(filter(None, (why, detail))))


def _child(model_type: str, pipe) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    pipe.send(check(model_type))


def check_apart(model_type: str) -> Result:
    """``check`` in a process of its own, with limits on its memory and time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(model_type, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(SECONDS):
            return ours.recv()
        return Result(model_type, NOT_BUILT, detail=f"no result within {SECONDS} s")
    except EOFError:
        process.join()
        return Result(model_type, NOT_BUILT, detail=f"its process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
