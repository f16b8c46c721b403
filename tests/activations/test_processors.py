"""A fit is the same whatever the vector units of the processor are: they only change roundings."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fit_everywhere import DEGREES, fit_everywhere

from hf_ortho.activations import FAMILIES
from hf_ortho.fitting.source import Source

SCRIPT = Path(__file__).with_name("fit_everywhere.py")
OTHER = {
    "ATEN_CPU_CAPABILITY": "default",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_CORETYPE": "Nehalem",  # SSE alone, which every x86-64 has
    "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
}


@pytest.fixture(scope="module")
def here():
    return fit_everywhere(DEGREES)


def assert_same(found, expected):
    # Parameters in their natural units and f are of order 1; what the searches find is rounded to 1e-3, and the linear
    # fits that follow turn 1e-15 into 1e-10 at the most.
    assert found.keys() == expected.keys()
    assert {key.split("/")[0].rpartition("_")[0] for key in found} == set(FAMILIES)
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-6, atol=1e-6, err_msg=key)


@pytest.mark.slow
def test_other_vector_units(here, tmp_path):
    command = [sys.executable, "-W", "ignore", SCRIPT, tmp_path / "found.npz"]  # numpy warns of what it cannot disable
    subprocess.run(command, check=True, env=os.environ | OTHER)
    with np.load(tmp_path / "found.npz") as found:
        assert_same(dict(found), here)


@pytest.mark.slow
def test_noise_in_the_source(here, monkeypatch):
    generator = np.random.default_rng(1)
    for method in ("value", "derivative"):
        exact = getattr(Source, method)

        def noisy(self, x, exact=exact):
            y = exact(self, x)
            return y * (1 + 1e-15 * generator.standard_normal(y.shape))

        monkeypatch.setattr(Source, method, noisy)
    assert_same(fit_everywhere(DEGREES), here)
