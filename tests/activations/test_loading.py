"""Through transformers: from scratch, every way of loading, and what a model does with its activations."""

import logging
import math
import pickle
from copy import deepcopy
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_ortho.activations import FAMILIES, build

LOADS = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "auto-dtype": {"dtype": "auto"},
    "device-map": {"device_map": "auto"},
    "both": {"dtype": torch.bfloat16, "device_map": "auto"},
}


@pytest.fixture(params=LOADS.values(), ids=LOADS)
def load(request):
    """``from_pretrained`` in one of the ways that users call it."""

    def from_pretrained(path, **options):
        return AutoModelForCausalLM.from_pretrained(path, **request.param, **options)

    return from_pretrained


@pytest.fixture(autouse=True)
def poison():
    """Uninitialized memory reads as NaN, so that a value nobody wrote cannot pass by luck."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def warnings_seen(caplog):
    """The messages of hf_ortho's logger; warning_once starts afresh."""
    logging.Logger.warning_once.cache_clear()
    return lambda: [r.getMessage() for r in caplog.records if r.name == "hf_ortho" and r.levelno >= logging.WARNING]


def tiny(activation, seed=0):
    config = GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=32,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function=activation,
    )
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config)


def tuned(activation):
    """A tiny model whose activations differ from their initial values, tails included."""
    model = tiny(activation)
    with torch.no_grad():
        for i, act in enumerate(activations(model)):
            for name, p in act.named_parameters():
                p.copy_(torch.tensor([-2.0 - i, 2.5 + i]) if name == "domain" else p + 0.1 * torch.randn(p.shape))
            act.tail_slopes.copy_(torch.tensor([0.125, 1.0 + i]))
    return model


def activations(model):
    found = [block.mlp.act for block in model.transformer.h]
    assert len(found) == 2
    return found


def assert_same(module, expected):
    state = module.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == torch.float32, key
        assert torch.equal(state[key].cpu(), value), key
    trainable = {key: p.requires_grad for key, p in module.named_parameters()}
    assert trainable == {key: key not in ("domain", "tail_slopes") for key in trainable}


@pytest.fixture
def ids():
    return torch.randint(1, 32, (2, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_from_scratch_has_the_paper_values(family, ids):
    model = tiny(f"{family}_6")
    for act in activations(model):
        assert_same(act, build(f"{family}_6").state_dict())
    assert torch.isfinite(model(ids).logits).all()


def test_from_scratch_in_the_paper_numbers():
    for act in activations(tiny("fourier_6")):
        assert act.coefficients.tolist() == pytest.approx([0.66233] * 6, abs=5e-6)
        assert act.frequencies.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        assert act.phases.tolist() == pytest.approx([math.pi / 4] * 6)
        assert act.domain.tolist() == [-math.inf, math.inf]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_complete_checkpoint_loads_bit_for_bit(family, tmp_path, ids, warnings_seen):
    model = tuned(f"{family}_6")
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert warnings_seen() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_loading_a_complete_checkpoint(family, load, tmp_path):
    model = tuned(f"{family}_6")
    model.save_pretrained(tmp_path)
    for act, original in zip(activations(load(tmp_path)), activations(model), strict=True):
        assert_same(act, original.state_dict())


def test_a_bfloat16_model_saves_its_activations_in_float32(load, tmp_path):
    model = tuned("hermite_8")
    expected = [deepcopy(act.state_dict()) for act in activations(model)]
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    for act, state in zip(activations(load(tmp_path)), expected, strict=True):
        assert_same(act, state)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_without_activations_gives_the_paper_values(family, load, tmp_path, ids, warnings_seen):
    tiny("gelu_new").save_pretrained(tmp_path)
    model = load(tmp_path, activation_function=f"{family}_6")
    for act in activations(model):
        assert_same(act, build(f"{family}_6").state_dict())
    assert torch.isfinite(model(ids).logits).all()
    (message,) = warnings_seen()
    assert f"{family}_6" in message
    assert "hf_ortho.convert" in message


def test_one_warning_for_each_name(tmp_path, warnings_seen):
    tiny("gelu_new").save_pretrained(tmp_path)
    for name in ("hermite_3", "hermite_3", "fourier_6", "hermite_3"):
        GPT2LMHeadModel.from_pretrained(tmp_path, activation_function=name)
    assert [("hermite_3" in m, "fourier_6" in m) for m in warnings_seen()] == [(True, False), (False, True)]


@pytest.mark.parametrize("missing", ["tail_slopes", "domain", "coefficients"])
def test_a_checkpoint_that_lacks_one_tensor_keeps_the_others(missing, tmp_path, warnings_seen):
    model = tuned("hermite_4")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.endswith(missing)}, file, metadata={"format": "pt"})
    for act, original in zip(activations(GPT2LMHeadModel.from_pretrained(tmp_path)), activations(model), strict=True):
        assert_same(act, original.state_dict() | {missing: build("hermite_4").state_dict()[missing]})
    assert len(warnings_seen()) == 1


def test_a_later_initialization_keeps_trained_values():
    model = tuned("hermite_8")
    expected = [deepcopy(act.state_dict()) for act in activations(model)]
    model.init_weights()
    model.resize_token_embeddings(40, mean_resizing=False)
    for act, state in zip(activations(model), expected, strict=True):
        assert_same(act, state)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_meta_to_empty_gives_the_initial_values(family):
    for init in ("paper", "unit"):
        with torch.device("meta"):
            module = build(f"{family}_6", init=init)
        assert all(v.is_meta for v in module.state_dict().values())
        assert "degree=6" in repr(module)
        assert_same(module.to_empty(device="cpu"), build(f"{family}_6", init=init).state_dict())


def test_a_whole_model_from_meta():
    with torch.device("meta"):
        model = tiny("fourier_6")
    for act in activations(model.to_empty(device="cpu")):
        assert_same(act, build("fourier_6").state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family, ids):
    grads = []
    for checkpointing in (False, True):
        model = tuned(f"{family}_6").train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert sum("mlp.act" in name for name in grads[0]) == 2 * (len(list(build(family).parameters())) - 2)
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_and_without_the_cache(family, ids):
    model = tuned(f"{family}_6").eval()
    options = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    options |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, "output_logits": True}
    with_cache, without = (model.generate(ids, use_cache=cache, **options) for cache in (True, False))
    assert with_cache.sequences.shape == (2, 16)
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(with_cache.logits, without.logits)


class Activated(Dataset):
    """A dataset that carries an activation into the worker."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return self.module(torch.linspace(-4.0, 4.0, 9) + i).detach()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
def test_an_activation_in_a_dataloader_worker():
    data = Activated(tuned("tropical_rational_6").transformer.h[1].mlp.act)
    expected = torch.stack([data[i] for i in range(3)])
    sent = pickle.loads(ForkingPickler.dumps(data))  # what a worker gets under spawn, without the import's seconds
    assert_same(sent.module, data.module.state_dict())
    (batch,) = DataLoader(sent, batch_size=3, num_workers=1, multiprocessing_context="fork")
    torch.testing.assert_close(batch, expected)
