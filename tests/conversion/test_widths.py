"""Which numbers of groups the activations of a model can have, against the shapes of its forward pass."""

import math
from collections import OrderedDict

import pytest
import torch
import transformers as hf
from torch import nn

import hf_ortho
from hf_ortho.activations import LearnableActivation
from hf_ortho.conversion import find_sites
from hf_ortho.conversion.widths import check_groups, width_of
from hf_ortho.errors import SiteError, WidthError

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"input_ids": torch.arange(9)[None]}
IMAGE = {"pixel_values": torch.zeros(1, 3, 32, 32)}
SOUND = {"input_values": torch.linspace(-1, 1, 400)[None]}


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, intermediate_size=88))


def bert():  # as wide inside as half of its hidden size: the dense layer is no gate
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, intermediate_size=64))


def modernbert():  # a gate and values in one linear layer
    tokens = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    return hf.ModernBertForMaskedLM(hf.ModernBertConfig(**SMALL, intermediate_size=48, **tokens))


def albert():
    return hf.AlbertForMaskedLM(hf.AlbertConfig(**SMALL, embedding_size=12, intermediate_size=40))


def t5():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 56, "num_layers": 1, "num_heads": 2}
    return hf.T5EncoderModel(hf.T5Config(vocab_size=97, **sizes, feed_forward_proj="gated-gelu"))


def mixtral():
    sizes = {"intermediate_size": 40, "num_local_experts": 2, "num_key_value_heads": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, **sizes))


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return hf.ResNetModel(hf.ResNetConfig(**sizes))


def bit():
    return hf.BitModel(hf.BitConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_groups=4))


def wav2vec2():
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    groups = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return hf.Wav2Vec2Model(hf.Wav2Vec2Config(**SMALL, **convolutions, **groups, intermediate_size=64))


BUILT = [llama, bert, modernbert, albert, t5, mixtral, resnet, bit, wav2vec2]
NAMES = ["gpt2", "convnext", *(build.__name__ for build in BUILT)]
UNKNOWN = {"mixtral"}  # its experts are tensors without a module
MOVED = {"resnet", "bit", "wav2vec2"}


@pytest.fixture
def build(gpt2, convnext):
    builders = {"gpt2": gpt2, "convnext": convnext} | {build.__name__: build for build in BUILT}
    return lambda name: builders[name]().eval()


def inputs(name):
    return IMAGE if name in ("convnext", "resnet", "bit") else SOUND if name == "wav2vec2" else TEXT


def activations(model, fields=None):
    return [path for site in find_sites(model, fields)[0] for path in site.modules]


@torch.no_grad()
def shapes(model, paths, batch):
    """The shape of the input of each module."""
    found = {}

    def note(path):
        def hook(module, args):
            found[path] = args[0].shape

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(note(path)) for path in paths]
    model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_width_is_that_of_the_forward_pass(build, name):
    model = build(name)
    paths = activations(model)
    channels_first = 0
    for path, shape in shapes(model, paths, inputs(name)).items():
        if name in MOVED and ".feed_forward." not in path:
            with pytest.raises(WidthError, match=f"^{path} belongs to a convolution"):
                width_of(model, path)
            assert shape[1] in {p.shape[0] for p in model.parameters()}  # the channels of a convolution
            channels_first += 1
        else:
            assert width_of(model, path) == (None if name in UNKNOWN else shape[-1])
    assert (channels_first > 0) == (name in MOVED)


@pytest.mark.parametrize("name", sorted(set(NAMES) - UNKNOWN - MOVED))
def test_a_refused_conversion_leaves_the_model_alone(build, name, state_of):
    model = build(name)
    before = state_of(model)
    widths = {shape[-1] for shape in shapes(model, activations(model), inputs(name)).values()}
    with pytest.raises(WidthError) as error:
        hf_ortho.convert(model, "hermite_2", groups=9, calibration=[{"wrong": 0}])  # before any batch
    path, words = str(error.value).split(" ", 1)
    assert path in dict(model.named_modules())
    assert "cannot be divided into 9 groups" in words
    assert words.endswith(f"the number must divide {math.gcd(*widths)}")
    assert state_of(model) == before


def test_the_groups_must_divide_all_widths(gpt2):
    model = gpt2(n_inner=120)
    with pytest.raises(WidthError, match=r"h\.0\.mlp\.act has 120 channels, .* 16 groups: the number must divide 120$"):
        check_groups(model, activations(model), 16)
    model.transformer.h[1].mlp.c_fc.nf = 100
    with pytest.raises(WidthError, match=r"h\.1\.mlp\.act has 100 channels, .* 12 groups: the number must divide 20$"):
        check_groups(model, activations(model), 12)


def test_a_sequence_with_names_and_a_repeated_module():
    act = nn.GELU()
    layers = {"one": nn.Linear(3, 10), "act": act, "two": nn.Linear(10, 6), "again": act, "three": nn.Linear(6, 2)}
    model = nn.Sequential(OrderedDict(layers))
    assert (width_of(model, "act"), width_of(model, "again")) == (10, 6)


@pytest.mark.parametrize("name", sorted(MOVED))
def test_channels_that_are_not_last_cannot_be_grouped(build, name, state_of):
    model = build(name)
    before = state_of(model)
    with pytest.raises(WidthError, match="its last dimension is not the channels"):
        hf_ortho.convert(model, "hermite_2_g4")
    assert state_of(model) == before
    assert hf_ortho.convert(model, "hermite_2").activation == "hermite_2"


def test_other_fields_of_a_model_with_convolutions_can_be_grouped(build):
    model = build("wav2vec2")
    report = hf_ortho.convert(model, "hermite_2_g4", fields=["hidden_act"])
    assert {layer.field for layer in report.layers} == {"hidden_act"}
    assert torch.isfinite(model(**SOUND).last_hidden_state).all()


def test_a_width_that_no_module_tells_is_refused_at_the_first_batch(build, state_of):
    model = build("mixtral")
    before = state_of(model)
    with pytest.raises(WidthError, match=r"^model\.layers\.0\.mlp\.experts\.act_fn: .* 3 groups"):
        hf_ortho.convert(model, "hermite_2_g3", calibration=[TEXT])
    assert state_of(model) == before
    hf_ortho.convert(model, "hermite_2_g3")
    with pytest.raises(WidthError, match="3 groups"):
        model(**TEXT)


def test_in_a_sequence_the_layer_before_counts(gpt2):
    model = gpt2()
    model.head = nn.Sequential(
        nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 10), nn.LayerNorm(10), nn.GELU(), nn.Linear(10, 2)
    )
    assert (width_of(model, "head.1"), width_of(model, "head.4")) == (6, 10)


def test_more_groups_from_the_old_ones(gpt2):
    model = gpt2()
    hf_ortho.convert(model, "hermite_3_g4")
    before = {path: m.state_dict() for path, m in model.named_modules() if isinstance(m, LearnableActivation)}
    for groups in (6, 2, 1):
        with pytest.raises(SiteError, match=f"hermite_3_g4 has 4 groups.* not with {groups}: revert the model first"):
            hf_ortho.convert(model, "hermite_3", groups=groups)
    assert model.config.activation_function == "hermite_3_g4"
    for path, state in before.items():
        assert all(torch.equal(model.get_submodule(path).state_dict()[k], v) for k, v in state.items())
