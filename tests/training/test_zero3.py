"""DeepSpeed ZeRO-3 with all parameters in parts, in two processes on the CPU: the bare engine, and reading values."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

import hf_ortho

pytestmark = [
    pytest.mark.slow,  # ranks are forked
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

TRAIN = r"""
import torch
import hf_ortho

def steps(model, batch, update, penalized):
    ids = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(1))
    if penalized:
        hf_ortho.DomainPenalty(model, 1.0)
    hf_ortho.fuse_mlp(model)
    return [update(ids[batch]) for _ in range(3)]

def optimizer_of(model):
    groups = [{"pattern": r"^transformer\.h\.0\.", "learning_rate": 0.05}]
    return torch.optim.SGD(hf_ortho.param_groups(model, lr=0.1, groups=groups))
"""

WORKER = """
import gc, json, sys
from types import SimpleNamespace
import deepspeed
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import save_file
from transformers import GPT2LMHeadModel
from transformers.integrations import HfDeepSpeedConfig
import hf_ortho.plotting
from hf_ortho.training.guard import check_parameters
from hf_ortho.training import set_trainable
from train import optimizer_of, steps

torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it would be compiled
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
rank = dist.get_rank()
zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
ds = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}
ds["gradient_clipping"] = 0.0  # the default is 1
keep = HfDeepSpeedConfig(ds)
said = {}

def refused(call):
    try:
        call()
    except hf_ortho.errors.HfOrthoError as error:
        return f"{type(error).__name__}: {error}"

for name, options in {"converted": {}, "gelu": {"activation_function": "hermite_4"}}.items():
    model = GPT2LMHeadModel.from_pretrained(f"{sys.argv[1]}/{name}", **options).train()
    act = model.transformer.h[0].mlp.act
    said[f"{name} repr"] = repr(act)
    said[f"{name} whole"] = repr(act.whole())
    said[f"{name} number"] = set_trainable(model, "all")
    if name == "converted":
        said["refused"] = [
            refused(call)
            for call in (
                lambda: hf_ortho.convert(model, "hermite_3"),
                act.gain,
                lambda: act.fit("gelu"),
                lambda: act.measure("gelu"),
                lambda: hf_ortho.polynomials(model),
                lambda: hf_ortho.plotting.draw_activations([hf_ortho.plotting.Panel("act", act)]),
            )
        ]
        adapted = GPT2LMHeadModel.from_pretrained(f"{sys.argv[1]}/gelu")
        said["calibrate"] = refused(
            lambda: hf_ortho.peft.calibrate(
                PeftModel.from_pretrained(adapted, f"{sys.argv[1]}/adapter"), [torch.ones(1, 4, dtype=torch.long)]
            )
        )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=ds)

    def update(ids):
        loss = engine(ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        loss = loss.detach() / 2
        dist.all_reduce(loss)
        return loss.item()

    said[f"{name} losses"] = steps(model, slice(2 * rank, 2 * rank + 2), update, name == "converted")
    said[f"{name} parts"] = list(act.coefficients.shape), list(act.coefficients.ds_tensor.shape)
    state = engine._zero3_consolidated_16bit_state_dict()
    if rank == 0:
        save_file({k: v.clone() for k, v in state.items() if k != "lm_head.weight"}, f"{sys.argv[1]}/{name}.trained")
    arguments = SimpleNamespace(device=torch.device("cpu"), output_dir="none")
    check_parameters(model, arguments, 3)
    part = act.coefficients.ds_tensor  # 5 values in parts of 3: the last is padding
    if rank:
        part[2] = torch.nan
    said[f"{name} padding"] = refused(lambda: check_parameters(model, arguments, 3))
    if rank:
        part[1] = torch.nan
    said[f"{name} damaged"] = refused(lambda: check_parameters(model, arguments, 3))
    del engine, model, act
    gc.collect()

print("SAID", rank, json.dumps(said))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_gpt2):
    """A GPT-2, converted with domains that its pre-activations leave, and not; and an adapter."""
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("zero3")
    sizes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2}
    model, _ = make_gpt2(**sizes)
    hf_ortho.convert(model, "hermite_4", domain=(-0.5, 0.5))
    model.save_pretrained(folder / "converted")
    make_gpt2(**sizes)[0].save_pretrained(folder / "gelu")
    adapter = hf_ortho.peft.OrthoConfig(activation="hermite_4")
    get_peft_model(make_gpt2(**sizes)[0], adapter).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def said(folder, forked):
    (folder / "train.py").write_text(TRAIN)
    (folder / "worker.py").write_text(WORKER)
    printed = forked(2, folder / "worker.py", folder, DS_ACCELERATOR="cpu", TRANSFORMERS_VERBOSITY="error")
    lines = [line.split(maxsplit=2)[1:] for line in printed.splitlines() if line.startswith("SAID")]
    first, second = (json.loads(line) for _, line in sorted(lines))
    assert first == second
    return first


@pytest.mark.parametrize("name", ["converted", "gelu"])
def test_losses_and_weights_are_those_of_one_process(said, folder, name):
    """Also of an original checkpoint whose activation the config overrides: it starts from its initialization."""
    names: dict = {}
    exec(TRAIN, names)
    options = {"activation_function": "hermite_4"} if name == "gelu" else {}
    model = GPT2LMHeadModel.from_pretrained(folder / name, **options).train()
    assert said[f"{name} number"] == hf_ortho.training.set_trainable(model, "all")
    assert said[f"{name} whole"] == repr(model.transformer.h[0].mlp.act)
    optimizer = names["optimizer_of"](model)

    def update(ids):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = names["steps"](model, slice(4), update, name == "converted")
    # Sums in another order; float32 has 6e-8, and three steps pass on what the first one rounds.
    assert said[f"{name} losses"] == pytest.approx(losses, rel=1e-5)
    found = load_file(folder / f"{name}.trained")
    expected = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert losses[2] < losses[0]


def test_the_penalty_counts(folder):
    """Otherwise the losses above would not show that it reads the domain."""
    model = GPT2LMHeadModel.from_pretrained(folder / "converted").train()
    ids = torch.arange(16)[None]
    without = model(ids, labels=ids).loss.item()
    hf_ortho.DomainPenalty(model, 1.0)
    assert model(ids, labels=ids).loss.item() > without + 1e-3


def test_between_the_steps_a_process_holds_three_of_five_coefficients(said):
    assert said["converted parts"] == [[0], [3]]
    assert said["converted repr"] == said["gelu repr"] == "Hermite(degree=4)"


def test_what_needs_all_values_says_so(said):
    convert, *others = said["refused"]
    assert convert.startswith(
        "SiteError: GPT2LMHeadModel is partitioned by DeepSpeed ZeRO-3: convert and save it before"
    )
    assert set(others) == {
        "ProcessError: hermite_4: DeepSpeed ZeRO-3 spreads its parameters over the processes; use a copy from whole(), "
        "called in all of them"
    }
    assert said["calibrate"] == convert


@pytest.mark.parametrize("name", ["converted", "gelu"])
def test_the_guard_looks_at_all_parts_but_not_at_padding(said, name):
    assert said[f"{name} padding"] is None
    assert "1 of 30 trained parameters are not finite; first activation: transformer.h.0.mlp" in said[f"{name} damaged"]
