"""Fit each family to several sources and save what was found: ``python fit_everywhere.py file.npz``.

The environment of the process says which vector units torch, numpy and OpenBLAS may use; each reads it when imported.
"""

import sys

import numpy as np
import torch

from hf_ortho.activations import FAMILIES, build
from hf_ortho.conversion import Histogram

FITS = {
    "free": ("gelu", {}),
    "data": ("silu", {"histogram": 1}),
    "groups": ("gelu", {"histogram": 2}),
    "slope": ("tanh", {"derivative_weight": 0.1, "domain": (-3.0, 3.0)}),
    "no tails": ("gelu", {"tails": False, "domain": (-4.0, 5.0)}),
}


def histogram(groups):
    """Pre-activations in the middle of their bins, where no other arcsinh moves them to the next one."""
    width = 2 * np.arcsinh(2.0**16) / 1024
    bins = np.random.default_rng(0).normal(-0.7, 0.9, (20_000, 1)) // width + 60 * np.arange(groups)
    found = Histogram(groups)
    found.update(torch.from_numpy(np.sinh((bins + 0.5) * width)))
    return found


def fit_everywhere(degrees):
    """{family_degree/fit/parameter: values in natural units}, and f itself on [-12, 12] or the domain of the fit."""
    found = {}
    for name in (f"{family}_{n}" for family in FAMILIES for n in degrees[family]):
        for fit, (source, options) in FITS.items():
            groups = options.get("histogram", 1)
            module = build(f"{name}_g{groups}" if groups > 1 else name).double()
            options = options | ({"histogram": histogram(groups)} if "histogram" in options else {})
            module.fit(source, **options)
            units = module.natural_units()
            for key, value in module.state_dict().items():
                found[f"{name}/{fit}/{key}"] = value.numpy() / units.get(key, 1.0)
            lo, hi = options["domain"] if fit == "no tails" else (-12.0, 12.0)
            with torch.no_grad():
                x = torch.linspace(lo, hi, 501, dtype=torch.float64).unsqueeze(1).expand(-1, groups)
                found[f"{name}/{fit}/f"] = module(x).numpy()
    return found


DEGREES = dict.fromkeys(FAMILIES, (3,)) | {"hermite": (3, 8, 16)}

if __name__ == "__main__":
    np.savez(sys.argv[1], **fit_everywhere(DEGREES))
