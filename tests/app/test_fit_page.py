"""What the page computes, in this process."""

import json
import math
import re

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from hf_ortho import activations
from hf_ortho.activations import FAMILIES
from hf_ortho.app.fit import fit, sources
from hf_ortho.cli.convert import parser
from hf_ortho.errors import HfOrthoError
from hf_ortho.plotting import draw_fit


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def test_sources():
    names = sources()
    assert names[:3] == ["gelu", "gelu_new", "silu"]
    assert len(set(names)) == len(names)
    assert {"relu", "tanh", "leaky_relu", "quick_gelu", "sigmoid"} <= set(names) <= set(ACT2FN)
    assert not {"relu2", "xielu", "sqrtsoftplus", "hermite", "hermite_8", "tropical_rational_6"} & set(names)


def test_figures_of_hermite():
    """Against numpy: the shown parameters, read back, give the shown errors and gains."""
    found = fit("gelu", "hermite", 6)
    stored = json.loads(found.parameters())
    (lo, hi), (below, above) = stored["domain"], stored["tail_slopes"]
    series = np.polynomial.HermiteE([c / math.factorial(k) for k, c in enumerate(stored["coefficients"])])
    assert [below, above] == [0.0, 1.0]

    def f(x):
        return series(np.clip(x, lo, hi)) + below * np.minimum(x - lo, 0) + above * np.maximum(x - hi, 0)

    def slope(x):
        return np.where(x < lo, below, np.where(x > hi, above, series.deriv()(x)))

    x = np.linspace(-20, 20, 200001)
    shown = {what: cells for what, *cells in found.figures()}
    assert float(shown["largest error on the real line"][0]) == pytest.approx(np.abs(f(x) - gelu(x)).max(), rel=1e-3)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    for shown_as, g in zip(shown["gain: mean square under N(0, 1)"], (f, slope), strict=True):
        assert float(shown_as) == pytest.approx((density * g(x) ** 2).sum(), rel=1e-3)
    weight = np.exp(-(((x + 0.5) / 1.5) ** 2) / 2)
    rms = math.sqrt((weight * (f(x) - gelu(x)) ** 2).sum() / weight.sum())
    assert float(shown["rms error under N(-0.5, 1.5^2)"][0]) == pytest.approx(rms, rel=0.05)
    assert [float(end) for end in shown["domain [lo, hi]"]] == pytest.approx([lo, hi], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tails", "ends"), [(True, None), (False, (-3, 2.5))])
def test_the_shown_code_makes_the_shown_fit(family, tails, ends):
    found = fit("silu", family, 3, tails, ends)
    code = found.python().split("\n\n")[1]
    scope = {"hf_ortho": type("package", (), {"activations": activations})}
    exec(code, scope)
    for key, value in found.module.state_dict().items():
        assert torch.equal(value, scope["act"].state_dict()[key])
    for key, value in json.loads(found.parameters()).items():
        assert np.array_equal(np.float32(value), found.module.state_dict()[key].numpy())
    command = found.command().split()
    assert command[:2] == ["hf-ortho", "convert"]
    args = parser().parse_args(command[2:])
    assert (args.family, args.degree, args.no_tails, args.domain) == (
        family,
        "3",
        not tails,
        ends and [*map(float, ends)],
    )
    call = found.python().rpartition("\n")[2]
    options = "" if tails else ", domain=(-3.0, 2.5), tails=False"
    assert call == f'hf_ortho.convert(model, "{family}_3"{options})'


def test_picture():
    found = fit("tanh", "tropical_rational", 4)
    value, slope = draw_fit(found.module, found.source)
    for figure, f in ((value, np.tanh), (slope, lambda x: 1 / np.cosh(x) ** 2)):
        top, below = figure.axes
        learned, source = (line.get_xydata() for line in top.lines[:2])
        assert np.allclose(source[:, 1], f(source[:, 0]), atol=1e-6)
        difference = below.lines[1].get_xydata()
        assert np.allclose(difference[:, 1], learned[:, 1] - f(learned[:, 0]), atol=1e-6)
        assert (learned[0, 0], learned[-1, 0]) == top.get_xlim()
        assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"tropical_rational_4", "tanh"}


def test_without_tails_the_picture_ends_with_the_domain():
    found = fit("gelu", "hermite", 8, False, (-3, 2))
    assert draw_fit(found.module, found.source, found.domain)[0].axes[0].get_xlim() == (-3, 2)
    assert [cells for what, *cells in found.figures() if "error on the domain" in what]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gelu", "hermite", 40), "degree '40' of hermite: must be an integer from 1 to 32"),
        (("gelu", "hermite", 2.5), "degree '2.5' of hermite: must be an integer from 1 to 32"),
        (("gelu", "hermite", None), "must be an integer from 1 to 32"),
        (("gelu", "spline", 3), "unknown activation 'spline'"),
        (("relu2", "hermite", 8), "relu2 has no asymptotic slope"),
        (("gelut", "hermite", 8), "unknown source activation 'gelut'"),
        (("gelu", "fourier", 8, False), "fourier_8 without tails is inaccurate outside its domain"),
        (("gelu", "hermite", 8, True, (2, -2)), "domain from 2 to -2: lo must be at least 0.01 below hi"),
        (("gelu", "hermite", 8, True, (1, 1)), "domain from 1 to 1: lo must be at least 0.01 below hi"),
        (("gelu", "hermite", 8, True, (-1e30, 1)), "domain from -1e+30 to 1: "),
        (("gelu", "hermite", 8, True, (math.nan, 1)), "domain from nan to 1: "),
        (("gelu", "hermite", 8, True, (None, 1)), "the domain requires two numbers"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(HfOrthoError, match=re.escape(message)) as caught:
        fit(*arguments)
    assert "\n" not in str(caught.value)
