"""A fit for the web page: errors, parameters, and code to reproduce it."""

from __future__ import annotations

import dataclasses
import json

from transformers.activations import ACT2FN

from ..activations import FitReport, LearnableActivation, build, named
from ..activations.base import SHARED
from ..activations.registry import is_learnable
from ..errors import FitError
from ..fitting.density import DATA_FREE
from ..fitting.source import Source

USUAL = ("gelu", "gelu_new", "silu", "relu", "quick_gelu", "mish", "tanh", "sigmoid")
EXAMPLE = "openai-community/gpt2"
MOST = 100.0  # maximum absolute value of the ends of a domain
NARROWEST = 0.01


def sources() -> list[str]:
    """The names in ``ACT2FN`` that can be fitted, common ones first, without learnable activations."""
    others = (name for name in ACT2FN if name not in USUAL and not is_learnable(name))
    return [*USUAL, *filter(_has_tails, others)]


def _has_tails(name: str) -> bool:
    try:
        Source.of(name)
    except FitError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted activation.

    Attributes:
        domain: the requested domain; None if it was searched for.
        tails: False for a pure series.
    """

    module: LearnableActivation
    source: Source
    report: FitReport
    domain: tuple[float, float] | None
    tails: bool

    def figures(self) -> list[tuple[str, ...]]:
        """Rows of (label, value for f, value for f'), as text."""
        report = self.report
        value, slope = self.module.gain()
        where = "the real line" if self.tails else "the domain"
        return [
            (f"largest error on {where}", f"{report.sup_error:.3e}", f"{report.sup_derivative_error:.3e}"),
            (f"rms error under {DATA_FREE}", f"{report.rms_error:.3e}", f"{report.rms_derivative_error:.3e}"),
            ("gain: mean square under N(0, 1)", f"{value:.4g}", f"{slope:.4g}"),
            ("domain [lo, hi]", *(f"{end:.4f}" for end in report.domain)),
            ("slopes of the tails", *(f"{s:.4g}" if self.tails else "none" for s in report.tail_slopes)),
        ]

    def parameters(self) -> str:
        """All parameters as JSON, one per line, in the shortest decimals that round-trip in float32."""
        lines = (
            f"  {json.dumps(k)}: {json.dumps([float(str(n)) for n in v.detach().numpy()])}"
            for k, v in self.module.named_parameters()
            if self.tails or k not in SHARED
        )
        return "{\n" + ",\n".join(lines) + "\n}"

    def python(self) -> str:
        """Python code for this fit, and for a conversion with the same settings."""
        options = "" if self.domain is None else f", domain=({self.domain[0]!r}, {self.domain[1]!r})"
        options += "" if self.tails else ", tails=False"
        return f'''import hf_ortho
from transformers import AutoModelForCausalLM

act = hf_ortho.activations.build("{self.module.name}")
act.fit("{self.source.name}"{options})

model = AutoModelForCausalLM.from_pretrained("{EXAMPLE}")
hf_ortho.convert(model, "{self.module.name}"{options})'''

    def command(self) -> str:
        """The command to convert a checkpoint with the same settings."""
        family, folder = self.module.family, f"gpt2-{self.module.family.replace('_', '-')}"
        options = "" if self.domain is None else f" --domain {self.domain[0]!r} {self.domain[1]!r}"
        options += "" if self.tails else " --no-tails"
        return f"hf-ortho convert {EXAMPLE} -o {folder} --family {family} --degree {self.module.degree}{options}"


def fit(
    source: str,
    family: str,
    degree: float | None,
    tails: bool = True,
    ends: tuple[float | None, float | None] | None = None,
) -> Fit:
    """Fit ``family`` of ``degree`` to a name in ``ACT2FN`` on the domain ``ends`` (None: search for it).

    Raises:
        ActivationNameError: unknown family or degree.
        FitError: the source cannot be fitted, or the domain is invalid.
    """
    name = named(family, "none" if degree is None else f"{degree:g}")
    domain = None if ends is None else _domain(*ends)
    if domain is None and not tails:
        raise FitError(f"{name} without tails is inaccurate outside its domain; give the domain as two numbers")
    module, examined = build(name), Source.of(source)
    report = module.fit(source, domain=domain, tails=tails)
    return Fit(module, examined, report, domain, tails)


def _domain(lo: float | None, hi: float | None) -> tuple[float, float]:
    if lo is None or hi is None:
        raise FitError("the domain requires two numbers, lo and hi")
    if not (lo >= -MOST and hi <= MOST and hi - lo >= NARROWEST):
        raise FitError(
            f"domain from {lo:g} to {hi:g}: lo must be at least {NARROWEST:g} below hi, and both between {-MOST:g} and "
            f"{MOST:g}"
        )
    return float(lo), float(hi)
