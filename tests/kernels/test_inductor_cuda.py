"""What inductor makes of the activations for a GPU."""

import concurrent.futures
import multiprocessing

import inductor_cuda
import pytest
import torch

from hf_ortho.activations import FAMILIES

pytestmark = pytest.mark.slow  # starts a process, and inductor
COMPILED = [f"{family}_3" for family, cls in FAMILIES.items() if cls.compiled]


@pytest.fixture(scope="module")
def pretended():
    """``pretended(function, ...)`` calls a function of ``inductor_cuda`` in a process that pretends to have a GPU."""
    pytest.importorskip("triton")  # on Linux only
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as process:
        yield lambda function, *args, **options: process.submit(function, *args, **options).result()


@pytest.mark.parametrize("name", COMPILED)
def test_nothing_but_the_gradient_of_x_has_its_size(pretended, name):
    buffers = pretended(inductor_cuda.buffers, name)
    rows = inductor_cuda.SHAPE[0] * inductor_cuda.SHAPE[1]
    assert [dtype for shape, dtype in buffers if torch.Size(shape).numel() > 20 * rows] == ["bfloat16"]


@pytest.mark.parametrize("groups", ["", "_g16"])
@pytest.mark.parametrize("name", [name for name in COMPILED if FAMILIES[name.rpartition("_")[0]].triton])
def test_with_triton_the_backward_pass_is_one_operator(pretended, name, groups):
    program = pretended(inductor_cuda.program, name + groups, triton=True)
    assert program.count("torch.ops.hf_ortho.activation_backward.default(") == 1
    assert "@triton" not in program
