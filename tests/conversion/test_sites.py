"""Which modules a config drives, found by rebuilding the model around a sentinel."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPVisionConfig,
    CTRLConfig,
    CTRLModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.activations import ACT2CLS, ACT2FN

import hf_ortho
from hf_ortho.conversion import find_sites
from hf_ortho.errors import HfOrthoError, SiteError

BERT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
LLAMA = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}


def t5(projection):
    config = T5Config(**T5, feed_forward_proj=projection, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def bert():
    return BertForMaskedLM(BertConfig(**BERT))


def t5_gated():
    return t5("gated-gelu")


def llava():
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**LLAMA)))


@pytest.fixture(autouse=True)
def _registry_is_unchanged():
    before = set(ACT2FN), set(ACT2CLS)
    yield
    assert (set(ACT2FN), set(ACT2CLS)) == before


@pytest.mark.parametrize(
    ("cls", "root"),
    [(GPT2LMHeadModel, "transformer."), (GPT2Model, ""), (GPT2ForSequenceClassification, "transformer.")],
)
def test_gpt2(gpt2, cls, root):
    (site,), left = find_sites(gpt2(cls))
    assert (site.field, site.prefix, site.source) == ("activation_function", "", "gelu_new")
    assert site.modules == (f"{root}h.0.mlp.act", f"{root}h.1.mlp.act")
    assert left == []


def test_convnext(convnext):
    (site,), _ = find_sites(convnext())
    assert (site.field, site.source) == ("hidden_act", "gelu")
    assert site.modules == tuple(f"convnext.encoder.stages.{i}.layers.0.act" for i in range(2))


def test_bert_intermediate_and_prediction_head():
    (site,), _ = find_sites(bert())
    assert site.modules == (
        "bert.encoder.layer.0.intermediate.intermediate_act_fn",
        "bert.encoder.layer.1.intermediate.intermediate_act_fn",
        "cls.predictions.transform.transform_act_fn",
    )


def test_llama():
    (site,), _ = find_sites(LlamaForCausalLM(LlamaConfig(**LLAMA)))
    assert (site.field, site.source) == ("hidden_act", "silu")
    assert site.modules == ("model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn")


@pytest.mark.parametrize(
    ("projection", "source"), [("gated-gelu", "gelu_new"), ("gated-silu", "silu"), ("relu", "relu")]
)
def test_t5_is_driven_by_dense_act_fn(projection, source):
    (site,), left = find_sites(t5(projection))
    assert (site.field, site.prefix, site.source) == ("dense_act_fn", "", source)
    assert site.modules == ("encoder.block.0.layer.1.DenseReluDense.act", "decoder.block.0.layer.2.DenseReluDense.act")
    assert [field for field, _ in left] == ["feed_forward_proj"]


def test_nested_configs():
    sites, _ = find_sites(llava())
    assert {(site.field, site.source): site.modules for site in sites} == {
        ("vision_config.hidden_act", "quick_gelu"): ("model.vision_tower.encoder.layers.0.mlp.activation_fn",),
        ("text_config.hidden_act", "silu"): tuple(f"model.language_model.layers.{i}.mlp.act_fn" for i in range(2)),
        ("projector_hidden_act", "gelu"): ("model.multi_modal_projector.act",),
    }


def test_fields_select():
    model = llava()
    sites, left = find_sites(model, ["text_config.hidden_act"])
    assert [site.field for site in sites] == ["text_config.hidden_act"]
    assert sorted(field for field, _ in left) == ["projector_hidden_act", "vision_config.hidden_act"]
    report = hf_ortho.convert(model, "hermite_4", fields=["text_config.hidden_act"])
    assert model.config.text_config.hidden_act == "hermite_4"
    assert (model.config.vision_config.hidden_act, model.config.projector_hidden_act) == ("quick_gelu", "gelu")
    assert {layer.field for layer in report.layers} == {"text_config.hidden_act"}
    x = torch.linspace(-5, 5, 50)
    assert torch.equal(model.model.multi_modal_projector.act(x), nn.functional.gelu(x))
    assert torch.equal(model.model.vision_tower.encoder.layers[0].mlp.activation_fn(x), x * torch.sigmoid(1.702 * x))


def test_unknown_field_lists_the_known_ones(gpt2):
    with pytest.raises(SiteError, match=r"hidden_act.*has: activation_function"):
        find_sites(gpt2(), ["hidden_act"])


def test_fixed_activations_are_untouched():
    model = BertModel(BertConfig(**BERT))
    pooler = model.pooler.activation
    hf_ortho.convert(model, "hermite_4")
    assert model.pooler.activation is pooler
    assert torch.equal(pooler(torch.ones(1)), torch.ones(1).tanh())


# ---- models that a conversion would break --------------------------------------------------------------------------


class Config(PreTrainedConfig):
    model_type = "hf_ortho_test"

    def __init__(self, hidden_act="gelu", **kwargs):
        super().__init__(**kwargs)
        self.hidden_act = hidden_act


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(3, 3)
        self.build(config)
        self.post_init()

    def forward(self, x):
        return self.first(x)


class Fixed(Model):
    """A projector whose GELU the config knows nothing of."""

    def build(self, config):
        self.projector = nn.Sequential(nn.Linear(3, 3), nn.GELU())


class Shared(Model):
    def build(self, config):
        self.act = ACT2FN[config.hidden_act]
        self.other = self.act


class LookedUp(Model):
    def build(self, config):
        self.size = len(list(ACT2FN[config.hidden_act].parameters()))


class Picky(Model):
    def build(self, config):
        if config.hidden_act not in ("gelu", "relu"):
            raise KeyError(f"{config.hidden_act} has no integer version\nand more")
        self.act = ACT2FN[config.hidden_act]


class Used(Model):
    """The activation is a module and is called, as it should be; the other models add to this."""

    def build(self, config):
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.act(self.first(x))


class StoredName(Used):
    def build(self, config):
        super().build(config)
        self.activation = config.hidden_act

    def forward(self, x):
        return ACT2FN[self.activation](super().forward(x))


class NameInConfig(Used):
    def forward(self, x):
        config = self.config
        return ACT2FN[config.hidden_act](super().forward(x))


class NameByGetattr(Used):
    def forward(self, x):
        return self.gate(super().forward(x))

    def gate(self, x):
        return ACT2FN[getattr(self.config, "hidden_act")](x)  # noqa: B009


class Branch(Used):
    """Like the models that hand the name to a fused kernel if it is one that the kernel knows."""

    def build(self, config):
        super().build(config)
        self.options = {"activation": config.hidden_act}

    def forward(self, x):
        return nn.functional.gelu(self.first(x)) if self.options["activation"] == "gelu" else super().forward(x)


class InList(Used):
    def build(self, config):
        super().build(config)
        self.hidden = [ACT2FN[config.hidden_act]]


class Beside(Used):
    """The module is built, the forward does without."""

    def forward(self, x):
        return nn.functional.gelu(self.first(x))


class OtherShape(Used):
    def build(self, config):
        super().build(config)
        self.second = nn.Linear(3, 3 if config.hidden_act == "gelu" else 6)


class OtherSetting(Used):
    def build(self, config):
        super().build(config)
        self.scale = 1.0 if config.hidden_act == "gelu" else 2.0


class OtherModule(Used):
    def build(self, config):
        super().build(config)
        self.norm = nn.Identity() if config.hidden_act == "gelu" else nn.Tanh()


class Forgetful(Config):
    """Computes the field anew whenever it is loaded."""

    def __init__(self, **kwargs):
        super().__init__(**(kwargs | {"hidden_act": "gelu"}))


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Fixed, "creates no module"),
        (Shared, "several paths"),
        (LookedUp, "not kept as a module"),
        (Picky, "KeyError with another name.*no integer version"),
        (StoredName, "StoredName reads the name"),
        (NameInConfig, "NameInConfig reads the name"),
        (NameByGetattr, "NameByGetattr reads the name"),
        (Branch, "Branch reads the name"),
        (InList, "1 of the 2 activations .* not kept as modules"),
        (Beside, "no method uses its module"),
        (OtherShape, "changes more than the activation: second"),
        (OtherSetting, "changes more than the activation: OtherSetting"),
        (OtherModule, "changes more than the activation: norm"),
    ],
)
def test_refused_with_the_reason(cls, why, state_of):
    model = cls(Config())
    before = state_of(model)
    with pytest.raises(SiteError, match=rf"hidden_act: .*{why}") as error:
        hf_ortho.convert(model, "hermite_8")
    assert "\n" not in str(error.value)
    assert isinstance(error.value, HfOrthoError)
    assert isinstance(error.value, ValueError)
    assert state_of(model) == before


def test_refused_if_the_config_computes_the_field_anew():
    with pytest.raises(SiteError, match="hidden_act: it creates no module"):
        find_sites(Used(Forgetful()))


def test_refused_if_the_model_holds_another_activation_than_its_config_builds():
    model = Used(Config())
    model.act = nn.ReLU()
    with pytest.raises(SiteError, match="act of the model is ReLU, but its config builds GELUActivation"):
        find_sites(model)


def test_a_method_that_builds_may_read_the_name():
    (site,), _ = find_sites(Used(Config()))  # ``build`` reads config.hidden_act and is called by the constructor
    assert site.modules == ("act",)


class TwoFields(Config):
    def __init__(self, head_act="relu", **kwargs):
        super().__init__(**kwargs)
        self.head_act = head_act


class Two(Used):
    def build(self, config):
        super().build(config)
        self.head = ACT2FN[config.head_act]

    def forward(self, x):
        return self.head(super().forward(x))


class Quarrelsome(Two):
    def build(self, config):
        if config.hidden_act != "gelu" and config.head_act != "relu":
            raise ValueError("one kernel only")
        super().build(config)


class Overlapping(Two):
    """The first field stands in for the second when it has been changed."""

    def build(self, config):
        self.act = ACT2FN[config.hidden_act]
        self.head = ACT2FN[config.head_act if config.hidden_act == "gelu" else config.hidden_act]


def test_two_fields():
    model = Two(TwoFields())
    sites, left = find_sites(model)
    assert {site.field: site.modules for site in sites} == {"hidden_act": ("act",), "head_act": ("head",)}
    assert left == []
    hf_ortho.convert(model, "tropical_rational_2", fields=["head_act"])
    x = torch.linspace(-5, 5, 50)
    assert torch.equal(model.act(x), nn.functional.gelu(x))
    torch.testing.assert_close(model.head(x), torch.relu(x))


def test_fields_that_fail_together_are_refused_and_work_apart():
    model = Quarrelsome(TwoFields())
    with pytest.raises(SiteError, match=r"hidden_act, head_act together raise ValueError: one kernel only; select one"):
        find_sites(model)
    assert [site.field for site in find_sites(model, ["head_act"])[0]] == ["head_act"]


def test_of_two_fields_that_drive_the_same_module_one_converts():
    (site,), left = find_sites(Overlapping(TwoFields()))
    assert (site.field, site.modules) == ("hidden_act", ("act", "head"))
    assert left == [("head_act", "hidden_act drives the same modules")]


def test_refused_without_a_field():
    model = CTRLModel(CTRLConfig(vocab_size=97, n_positions=32, n_embd=32, dff=64, n_layer=1, n_head=2))
    with pytest.raises(SiteError, match=r"CTRLModel.*no field names an activation"):
        find_sites(model)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.GELU()), None])
def test_refused_unless_a_transformers_model(model):
    with pytest.raises(SiteError, match=rf"^{type(model).__name__} is not a transformers PreTrainedModel"):
        hf_ortho.convert(model, "hermite_8")


@pytest.mark.slow
@pytest.mark.parametrize("build", [llava, t5_gated, bert])
def test_many_kinds_reload_bit_equal(build, tmp_path):
    model = build()
    hf_ortho.convert(model, "fourier_3")
    model.save_pretrained(tmp_path)
    reloaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path)
    assert reloaded.config.hf_ortho == model.config.hf_ortho
    expected, found = model.state_dict(), reloaded.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert find_sites(copy.deepcopy(reloaded))[0] == find_sites(model)[0]
