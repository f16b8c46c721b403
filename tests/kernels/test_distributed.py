"""Under DDP and FSDP2 the kernels give the gradients of a single process with the whole batch."""

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # ranks are forked

MODEL = """
import torch
from torch import nn
from hf_ortho.activations import FAMILIES, build

def make():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 8), build(f"{family}_3", init="unit"), nn.Linear(8, 6)) for family in FAMILIES]
    return nn.Sequential(*layers)

def loss(model, x):
    return model(x).square().mean()

x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
"""

WORKER = """
import sys
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from model import loss, make, torch, x

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank = dist.get_rank()
found = {}
for engine in ("ddp", "fsdp2"):
    model = make()
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (2,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    loss(wrapped, x[8 * rank : 8 * rank + 8]).backward()
    for key, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if engine == "fsdp2" else p.grad
            found[f"{engine}.{key}"] = grad.contiguous()
save_file(found, f"{sys.argv[1]}/{rank}.safetensors")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, forked):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "model.py").write_text(MODEL)
    (folder / "worker.py").write_text(WORKER)
    forked(2, folder / "worker.py", folder)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_gradients_are_those_of_one_process(ranks, engine):
    names: dict = {}
    exec(MODEL, names)
    model = names["make"]()
    names["loss"](model, names["x"]).backward()
    learned = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert learned.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    for key, gradient in learned.items():
        first, second = (found[f"{engine}.{key}"] for found in ranks)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, gradient, rtol=1e-5, atol=1e-6, msg=key)
