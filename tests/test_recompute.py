"""``fuse_mlp``: the same numbers with less kept, next to everything else that touches what autograd saves."""

import copy
import gc
import os
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import hf_ortho
from hf_ortho.activations import FAMILIES, LearnableActivation, build
from hf_ortho.errors import ConfigError

TEXT = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IDS = torch.randint(0, 97, (5, 32), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def narrowed(model):
    """Give the activations tails, so that both sides of the domain are in use."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LearnableActivation):
                module.domain.copy_(torch.tensor([-1.5, 1.2]))
                module.tail_slopes.copy_(torch.tensor([0.1, 0.9]))
    return model


def gpt2(activation="hermite_3"):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 32}
    return narrowed(GPT2LMHeadModel(GPT2Config(activation_function=activation, **sizes, **TEXT)))


def convnext(activation="hermite_3"):
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [24, 48], "depths": [1, 2], "num_stages": 2, "image_size": 32, "num_labels": 5}
    config = ConvNextConfig(hidden_act=activation, **sizes, layer_scale_init_value=1.0, initializer_range=0.5)
    return narrowed(ConvNextForImageClassification(config))


def bert(activation="hermite_3"):
    torch.manual_seed(0)
    return narrowed(BertForMaskedLM(BertConfig(hidden_act=activation, **SIZES, **TEXT)))


def albert(activation="hermite_3"):
    torch.manual_seed(0)
    return narrowed(AlbertForMaskedLM(AlbertConfig(hidden_act=activation, embedding_size=16, **SIZES, **TEXT)))


def llama(activation="hermite_3"):
    torch.manual_seed(0)
    return narrowed(LlamaForCausalLM(LlamaConfig(hidden_act=activation, **SIZES, **TEXT)))


def mlp(activation="hermite_3"):
    torch.manual_seed(0)
    return narrowed(nn.Sequential(nn.Linear(6, 24), build(activation), nn.Linear(24, 4)))


def loss_of(model):
    torch.manual_seed(3)  # of the dropouts
    if isinstance(model, nn.Sequential):
        return model(PIXELS.view(-1, 6)).square().mean()
    if "pixel_values" in model.main_input_name:
        return model(pixel_values=PIXELS, labels=torch.tensor([1, 4, 0, 1, 2, 3])).loss
    return model(input_ids=IDS, labels=IDS).loss


def step(model, loss_of=loss_of):
    """Loss and gradients, as bytes."""
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    gradients = {n: p.grad.numpy().tobytes() for n, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) > 2
    return gradients | {"loss": loss.item()}


class Storages(TorchDispatchMode):
    """Sees every storage that is made; ``alive`` is the bytes of those that still exist."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in known:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def alive(self):
        return sum(size for storage, size in self.made.values() if not storage.expired())


def kept(model, loss_of=loss_of):
    """Bytes that the graph of a forward keeps."""
    with Storages() as storages:
        loss = loss_of(model)
    assert loss.requires_grad
    return storages.alive


def copies(model):
    """Bytes of the parameters of the activations, which a recomputation keeps a copy of."""
    own = [m for m in model.modules() if isinstance(m, LearnableActivation)]
    return sum(v.nbytes for m in own for v in m.state_dict().values())


# ---- what it is for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [gpt2, convnext])
def test_bit_equal_with_one_tensor_per_mlp_less(make, family):
    model = make(f"{family}_3")
    expected, before = step(model), kept(model)
    widths = []
    paths = hf_ortho.fuse_mlp(model)
    assert len(paths) == (2 if make is gpt2 else 3)
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda _, args, y: widths.append(y.numel()))
    after = kept(model)
    assert len(widths) == len(paths)
    assert max(widths) > 32768  # more than one grain of ATen's
    assert before - after == 4 * sum(widths) - copies(model)
    assert step(model) == expected
    hf_ortho.fuse_mlp(model, enabled=False)
    assert kept(model) == before


@pytest.mark.parametrize("make", [bert, albert])
def test_layers_of_other_modules_and_shared_activations(make):
    """BERT's activation and the layer behind it have different parents; ALBERT's layer runs twice."""
    model = make()
    expected, before = step(model), kept(model)
    hf_ortho.fuse_mlp(model)
    assert step(model) == expected
    # Three calls; that of the prediction head goes into a LayerNorm and is left alone.
    copied = 3 * copies(build("hermite_3"))
    assert before - kept(model) == 2 * 4 * IDS.numel() * 64 - copied


def test_gated_mlps_are_left_alone():
    model = llama()
    expected, before = step(model), kept(model)
    hf_ortho.fuse_mlp(model)
    assert step(model) == expected
    assert kept(model) == before + copies(model)


def test_an_activation_of_several_calls():
    act, first, second = mlp()[1], nn.Linear(24, 24), nn.Linear(24, 4, bias=False)
    model = nn.Sequential(nn.Linear(6, 24), act, first, act, second)
    expected, before = step(model), kept(model)
    assert hf_ortho.fuse_mlp(model) == ["1"]
    assert step(model) == expected
    assert before - kept(model) == 2 * 4 * PIXELS.numel() // 6 * 24 - 2 * copies(act)


# ---- nothing is kept too long --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("make", [gpt2, convnext])
def test_everything_dies_with_the_graph(make, backward):
    model = make()
    hf_ortho.fuse_mlp(model)
    step(model)
    model.zero_grad()
    gc.collect()
    gc.disable()  # reference counts must do
    try:
        with Storages() as storages:
            loss = loss_of(model)
            if backward:
                loss.backward()
        if backward:
            gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            model.zero_grad()
            assert gradients > 0
            assert storages.alive <= 64  # the loss and its like, while it lives
        else:
            assert storages.alive > 100000
        del loss
        assert storages.alive == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_grad(context):
    model = gpt2()
    with context():
        expected = loss_of(model)
        hf_ortho.fuse_mlp(model)
        with Storages() as storages:
            loss = loss_of(model)
        assert storages.alive <= 64
    assert torch.equal(loss, expected)


def test_an_output_that_keeps_no_input_is_kept_itself():
    """Below a frozen layer and a frozen activation autograd keeps y alone: x would be no gain."""
    model = mlp()
    model[:2].requires_grad_(False)
    before = kept(model)
    hf_ortho.fuse_mlp(model)
    assert kept(model) == before


# ---- what changes between forward and backward ---------------------------------------------------------------------


def forward(model):
    x = model[0](PIXELS.view(-1, 6))
    y = model[1](x)
    return x, y, model[2](y)


def test_changing_the_pre_activation_in_place_is_an_error():
    model = mlp()
    hf_ortho.fuse_mlp(model)
    x, _, z = forward(model)
    with torch.no_grad():
        x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(z.sum(), model[2].weight)


def test_an_output_changed_in_place_is_kept():
    model = mlp()
    hf_ortho.fuse_mlp(model)
    x = model[0](PIXELS.view(-1, 6))
    y = model[1](x).mul_(2.0)
    (found,) = torch.autograd.grad(model[2](y).sum(), model[2].weight)
    assert torch.equal(found, torch.ones(len(y), 4).T @ y)
    with torch.no_grad():
        y = model[1](x).mul_(2.0)
    model[2](y).sum().backward()
    assert torch.equal(model[2].weight.grad, found)


def test_a_step_between_forward_and_backward_changes_no_gradient_of_the_layer():
    """Autograd kept the old output, so the gradient is that of the old parameters."""
    model = mlp()
    hf_ortho.fuse_mlp(model)
    _, y, z = forward(model)
    y = y.detach().clone()
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.mul_(1.5)
    model[1].tail_slopes.fill_(7.0)
    model[1].coefficients = nn.Parameter(torch.zeros(4))
    (found,) = torch.autograd.grad(z.sum(), model[2].weight)
    assert torch.equal(found, torch.ones(len(y), 4).T @ y)


def test_two_backward_passes():
    results = []
    for enabled in (False, True):
        model = mlp()
        hf_ortho.fuse_mlp(model, enabled)
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_double_backward():
    results = []
    for enabled in (False, True):
        model = mlp("fourier_2")
        hf_ortho.fuse_mlp(model, enabled)
        wanted = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss_of(model), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), wanted)
        assert all(g.abs().max() > 0 for g in second)
        results.append([*gradients, *second])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_user_hooks_see_the_first_forward_alone():
    model, calls = mlp(), []
    hf_ortho.fuse_mlp(model)
    model[1].register_forward_hook(lambda *_: calls.append(1))
    step(model)
    assert len(calls) == 1


# ---- with other tools ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = gpt2()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    expected = step(model.train())
    hf_ortho.fuse_mlp(model)
    assert step(model) == expected


def test_other_hooks_on_saved_tensors_go_first():
    model, packed = mlp(), []

    def pack(tensor):
        packed.append(tensor)
        return tensor

    def hooked(model):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return loss_of(model)

    expected, count = step(model, hooked), len(packed)
    hf_ortho.fuse_mlp(model)
    assert step(model, hooked) == expected
    assert len(packed) == 2 * count


def test_torch_func():
    model = mlp()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    x = PIXELS.view(-1, 6)
    expected = torch.func.grad(loss)(parameters, x), torch.func.vmap(loss, (None, 0))(parameters, x)
    hf_ortho.fuse_mlp(model)
    found = torch.func.grad(loss)(parameters, x), torch.func.vmap(loss, (None, 0))(parameters, x)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True))


def test_compile_has_no_graph_break():
    model = mlp()
    hf_ortho.fuse_mlp(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = step(model)
    found = step(model, lambda _: compiled(PIXELS.view(-1, 6)).square().mean())
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"loss"}:
        ours, theirs = (torch.frombuffer(bytearray(r[name]), dtype=torch.float32) for r in (found, expected))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of unpacking the domain, with or without fusing
def test_tracing_and_export():
    model = mlp()
    hf_ortho.fuse_mlp(model)
    x = PIXELS.view(-1, 6)
    expected = model(x)
    torch.testing.assert_close(torch.jit.trace(model, (x,))(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


@pytest.mark.parametrize("make", [gpt2, convnext])
def test_autocast(make):
    def autocast(model):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model)

    model = make()
    expected = step(model, autocast)
    hf_ortho.fuse_mlp(model)
    assert step(model, autocast) == expected


def test_a_cast_by_autocast_is_recomputed_too():
    """A float32 pre-activation: what autograd keeps for the layer is the bfloat16 copy of the output."""
    model = nn.Sequential(nn.LayerNorm(6), *mlp()[1:])
    model[2] = nn.Linear(6, 4)

    def autocast(model):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model)

    expected, before = step(model, autocast), kept(model, autocast)
    hf_ortho.fuse_mlp(model)
    assert step(model, autocast) == expected
    assert before - kept(model, autocast) == 2 * PIXELS.numel() - copies(model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # read by peft
def test_lora():
    model = get_peft_model(gpt2(), LoraConfig(target_modules=["mlp.c_proj"], fan_in_fan_out=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    expected, before = step(model), kept(model)
    hf_ortho.fuse_mlp(model)
    assert step(model) == expected
    # Below the adapters of the first block all is frozen, and x is not kept.
    assert before - kept(model) == 4 * IDS.numel() * 256 - copies(model) // 2


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.T @ x


class OwnLinear(nn.Linear):
    def forward(self, input):
        return Product.apply(input, self.weight)


def test_a_linear_layer_with_a_function_of_its_own():
    model = mlp()
    model[2] = OwnLinear(24, 4)
    expected, before = step(model), kept(model)
    hf_ortho.fuse_mlp(model)
    assert step(model) == expected
    assert before - kept(model) == 4 * PIXELS.numel() // 6 * 24 - copies(model)


WORKER = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from safetensors.torch import save_file
import hf_ortho
from hf_ortho import recompute
sys.path.insert(0, sys.argv[1])
import test_recompute as t

def shard(model):
    for block in model.transformer.h:
        fully_shard(block.mlp.act)
        fully_shard(block)
    return fully_shard(model)

def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    compute, recomputed = recompute._Source.output, []
    recompute._Source.output = lambda *args, **kwargs: recomputed.append(1) or compute(*args, **kwargs)
    for kind, wrap in (("ddp", DistributedDataParallel), ("fsdp2", shard)):
        for order in ("never", "before", "after"):
            model = t.gpt2()
            if order == "before":
                hf_ortho.fuse_mlp(model)
            wrapped = wrap(model)
            if order == "after":
                hf_ortho.fuse_mlp(model)
            ids = t.IDS[rank::2]
            torch.manual_seed(rank)
            recomputed.clear()
            wrapped(input_ids=ids, labels=ids).loss.backward()
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            gradients = {n: getattr(g, "full_tensor", lambda g=g: g)().contiguous() for n, g in gradients.items()}
            save_file(gradients, f"{folder}/{kind}.{order}.{rank}.safetensors", {"recomputed": str(len(recomputed))})
    dist.destroy_process_group()

if __name__ == "__main__":
    work(int(os.environ["RANK"]), sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes(tmp_path, forked):
    """DDP, and FSDP2 with the activations as units of their own, whose parameters are sharded in the backward."""
    (tmp_path / "worker.py").write_text(WORKER)
    forked(2, tmp_path / "worker.py", os.path.dirname(__file__), tmp_path)
    for kind in ("ddp", "fsdp2"):
        expected = load_file(tmp_path / f"{kind}.never.0.safetensors")
        assert len(expected) > 20
        for order in ("before", "after"):
            for rank in (0, 1):
                path = tmp_path / f"{kind}.{order}.{rank}.safetensors"
                found = load_file(path)
                assert found.keys() == expected.keys()
                assert [n for n in expected if not torch.equal(found[n], expected[n])] == []
                with safe_open(path, "pt") as file:
                    assert file.metadata()["recomputed"] == "2"


# ---- switching it on and off ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_fused_and_independent(clone):
    model = gpt2()
    before = kept(model)
    hf_ortho.fuse_mlp(model)
    twin = clone(model)
    assert kept(twin) == kept(model) < before
    assert step(twin) == step(model)
    hf_ortho.fuse_mlp(twin, enabled=False)
    assert kept(twin) == before > kept(model)


def test_saved_files_are_the_same(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "before")
    hf_ortho.fuse_mlp(model)
    model.save_pretrained(tmp_path / "after")
    files = [{p.name: p.read_bytes() for p in (tmp_path / place).iterdir()} for place in ("before", "after")]
    assert files[0] == files[1]


def test_twice_is_once():
    model = gpt2()
    before = kept(model)
    assert (
        hf_ortho.fuse_mlp(model) == hf_ortho.fuse_mlp(model) == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    )
    assert before - kept(model) == 2 * 4 * IDS.numel() * 256 - copies(model)
    hf_ortho.fuse_mlp(model, enabled=False)
    assert kept(model) == before


def test_a_conversion_takes_it_off():
    model = gpt2("gelu_new")
    hf_ortho.convert(model, "hermite_3")
    hf_ortho.fuse_mlp(model)
    hf_ortho.convert(model, "hermite_4")
    twin = copy.deepcopy(model)
    hf_ortho.fuse_mlp(twin, enabled=False)
    assert kept(model) == kept(twin)
    hf_ortho.fuse_mlp(model)
    assert kept(model) < kept(twin)
    assert step(model) == step(twin)
    hf_ortho.revert(model)
    plain = gpt2("gelu_new")
    assert kept(model) == kept(plain)
    assert step(model) == step(plain)
    assert hf_ortho.fuse_mlp(model, enabled=False) == []


def test_a_parametrized_activation():
    class Doubled(nn.Module):
        def forward(self, coefficients):
            return 2 * coefficients

    model = mlp()
    torch.nn.utils.parametrize.register_parametrization(model[1], "coefficients", Doubled())
    expected = step(model)
    hf_ortho.fuse_mlp(model)
    assert step(model) == expected


def test_a_model_without_learnable_activations():
    model = gpt2("gelu_new")
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel has no learnable activations .* hf_ortho\.convert"):
        hf_ortho.fuse_mlp(model)
    assert not any(module._forward_hooks for module in model.modules())
