import pytest
import transformers
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, TaskType, get_peft_model
from transformers.modelcard import TASK_MAPPING

from hf_ortho.errors import ConfigError
from hf_ortho.tasks import METRICS, TASKS, UNTRAINED, head_of, of
from hf_ortho.tasks.causal_lm import CAUSAL_LM
from hf_ortho.tasks.image_classification import IMAGE_CLASSIFICATION
from hf_ortho.tasks.masked_lm import MASKED_LM
from hf_ortho.tasks.text_classification import TEXT_CLASSIFICATION


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("GPT2LMHeadModel", CAUSAL_LM),
        ("LlamaForCausalLM", CAUSAL_LM),
        ("FSDPLlamaForCausalLM", CAUSAL_LM),
        ("CAUSAL_LM", CAUSAL_LM),
        ("ConvNextForImageClassification", IMAGE_CLASSIFICATION),
        ("BertForMaskedLM", MASKED_LM),
        ("BertForSequenceClassification", TEXT_CLASSIFICATION),
        ("SEQ_CLS", TEXT_CLASSIFICATION),
    ],
)
def test_a_name_tells_the_head(name, head):
    assert head_of(name) is head


@pytest.mark.parametrize("name", ["BertModel", "", "None"])
def test_a_name_that_says_nothing(name):
    head = head_of(name)
    assert (head.auto_class, head.pipeline_tag, head.peft_type) == ("AutoModel", None, None)


def test_the_task_of_a_model_and_of_the_one_behind_an_adapter(make_gpt2, make_convnext):
    model = make_gpt2()[0]
    assert of(model) is CAUSAL_LM
    assert of(get_peft_model(model, LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True))) is CAUSAL_LM
    assert of(make_convnext()[0]) is IMAGE_CLASSIFICATION


def test_a_model_without_a_task_is_told_which_ones_there_are():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = transformers.BertModel(transformers.BertConfig(**sizes))
    said = f"^BertModel cannot be trained or evaluated; supported tasks: .*{CAUSAL_LM.title}"
    with pytest.raises(ConfigError, match=said):
        of(model)


@pytest.mark.parametrize("head", [*TASKS, *UNTRAINED], ids=lambda head: head.auto_class)
def test_the_names_are_those_of_the_libraries(head):
    """transformers' own table of pipeline tags by class, and peft's of task types."""
    assert hasattr(transformers, head.auto_class)
    if head.endings:
        assert head.pipeline_tag in TASK_MAPPING
        known = [name for name in TASK_MAPPING[head.pipeline_tag].values() if isinstance(name, str)]
        assert any(name.endswith(head.endings) for name in known)
    if head.peft_type:
        assert head.peft_type in MODEL_TYPE_TO_PEFT_MODEL_MAPPING
        assert TaskType(head.peft_type)


def test_the_class_for_a_config():
    assert CAUSAL_LM.model_class(transformers.GPT2Config()) is transformers.GPT2LMHeadModel
    assert IMAGE_CLASSIFICATION.model_class(transformers.GPT2Config()) is None
    # transformers lists two classes for it, the plain one first
    assert IMAGE_CLASSIFICATION.model_class(transformers.DeiTConfig()) is transformers.DeiTForImageClassification


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.title)
def test_metrics_are_known_by_their_keys(task):
    assert task.compared in task.metrics
    assert [METRICS[metric.key] for metric in task.metrics] == list(task.metrics)
