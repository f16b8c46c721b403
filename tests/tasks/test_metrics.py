import copy

import evaluate
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_ortho.tasks import of
from hf_ortho.tasks.built_in import digits
from hf_ortho.tasks.data import text_blocks
from hf_ortho.tasks.images import images
from hf_ortho.tasks.metrics import perplexity, top_k_accuracy
from hf_ortho.tasks.metrics.compute import token_losses
from hf_ortho.training import Perplexity, TopKAccuracy


@pytest.fixture
def nll():
    """1,000 negative log-likelihoods and their labels, a third of which do not count."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50, 1000)
    labels[rng.random(1000) < 1 / 3] = -100
    return rng.gamma(2.0, size=1000), labels


@pytest.fixture
def logits():
    """500 samples of 12 classes without ties, and labels of which every class occurs."""
    rng = np.random.default_rng(1)
    return rng.normal(size=(500, 12)).astype(np.float32), rng.permutation(np.arange(500) % 12)


def top_k_share(logits, labels, k):
    return np.mean([label in np.argpartition(row, -k)[-k:] for row, label in zip(logits, labels, strict=True)])


def test_perplexity_is_exp_of_the_mean_over_the_labels_that_count(nll):
    losses, labels = nll
    expected = losses[labels != -100].sum() / (labels != -100).sum()
    found = Perplexity().compute(predictions=losses, references=labels)
    assert found == pytest.approx({"loss": expected, "perplexity": np.exp(expected)}, rel=1e-12)


@pytest.mark.parametrize("module", [perplexity, None], ids=["loaded from its file", "imported"])
def test_perplexity_in_batches_combined_and_loaded(nll, module):
    losses, labels = nll
    expected = losses[labels != -100].mean()
    metric = evaluate.load(module.__file__) if module else Perplexity()
    both = evaluate.combine([metric])
    for start in range(0, 1000, 333):
        both.add_batch(predictions=losses[start : start + 333], references=labels[start : start + 333])
    assert both.compute() == pytest.approx({"loss": expected, "perplexity": np.exp(expected)}, rel=1e-12)


def test_perplexity_of_a_hopeless_model_is_infinite():
    assert Perplexity().compute(predictions=[2000.0], references=[1]) == {"loss": 2000.0, "perplexity": np.inf}


def test_perplexity_needs_a_label_that_counts():
    with pytest.raises(ValueError, match="every reference is -100"):
        Perplexity().compute(predictions=[1.0, 2.0], references=[-100, -100])


@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_top_k_accuracy_is_that_of_scikit_learn(logits, k):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    scores, labels = logits
    expected = sklearn_metrics.top_k_accuracy_score(labels, scores, k=k)
    found = TopKAccuracy(k=k).compute(predictions=scores, references=labels)
    assert 0 < expected < 1
    assert found == pytest.approx({f"top{k}": expected})


@pytest.mark.parametrize("module", [top_k_accuracy, None], ids=["loaded from its file", "imported"])
def test_top_k_accuracy_in_batches_combined_and_loaded(logits, module):
    scores, labels = logits
    parts = [evaluate.load(module.__file__, k=k) if module else TopKAccuracy(k=k) for k in (1, 3)]
    both = evaluate.combine(parts)
    for start in range(0, 500, 70):
        both.add_batch(predictions=scores[start : start + 70], references=labels[start : start + 70])
    assert both.compute() == pytest.approx({f"top{k}": top_k_share(scores, labels, k) for k in (1, 3)})


@pytest.mark.parametrize(("k", "label", "hit"), [(1, 0, 1.0), (1, 1, 0.0), (2, 1, 1.0), (2, 2, 0.0), (3, 2, 1.0)])
def test_equal_logits_are_ordered_by_class(k, label, hit):
    found = TopKAccuracy(k=k).compute(predictions=[[1.0, 1.0, 1.0]], references=[label])
    assert found == {f"top{k}": hit}


def test_many_equal_logits_are_ordered_by_class():
    """More than numpy's unstable sort leaves in order by accident."""
    rows, first = [[i % 3 for i in range(200)]] * 7, range(2, 23, 3)
    assert TopKAccuracy(k=7).compute(predictions=rows, references=first) == {"top7": 1.0}


@pytest.mark.parametrize(
    ("row", "k", "label", "hit"),
    [
        ([np.nan, 1.0, 0.0], 1, 0, 0.0),
        ([np.nan, 1.0, 0.0], 1, 1, 1.0),
        ([np.nan, 1.0, 0.0], 2, 2, 1.0),
        ([np.nan, 1.0, 0.0], 3, 0, 0.0),  # k reaches it, but it has no rank
        ([np.nan, 1.0, np.nan], 2, 0, 0.0),
        ([np.nan, np.nan, np.nan], 1, 0, 0.0),
        ([np.nan, np.nan, np.nan], 5, 2, 0.0),
        ([np.inf, 1.0, -np.inf], 1, 0, 1.0),
        ([np.nan, np.inf, -np.inf], 2, 2, 1.0),
    ],
)
def test_a_nan_logit_is_a_miss(row, k, label, hit):
    assert TopKAccuracy(k=k).compute(predictions=[row], references=[label]) == {f"top{k}": hit}


def test_k_beyond_the_classes_counts_every_sample(logits):
    scores, labels = logits
    assert TopKAccuracy(k=13).compute(predictions=scores, references=labels) == {"top13": 1.0}


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(k):
    with pytest.raises(ValueError, match=f"k {k}"):
        TopKAccuracy(k=k)


class Sizes(TorchDispatchMode):
    """The operations that write a tensor of ``size`` elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.written = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.size and not func.is_view:
            self.written.append(func.overloadpacket.__name__)
        return out


def test_token_losses_copy_no_logits():
    """At 30 x 1024 tokens of GPT-2 they take 6 GB."""
    logits, labels = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    with Sizes(logits.numel()) as sizes:
        token_losses(logits, labels)
    assert sizes.written == ["_log_softmax"]


def test_token_losses_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=generator) * 3
    labels = torch.randint(0, 11, (3, 6), generator=generator)
    labels[0, 3] = labels[2, 1] = labels[2, 5] = -100
    expected = np.zeros((3, 5))
    for row in range(3):
        for position in range(5):
            label = int(labels[row, position + 1])
            if label != -100:
                scores = logits[row, position].double().numpy()
                expected[row, position] = np.log(np.exp(scores).sum()) - scores[label]
    found = token_losses(logits, labels)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert torch.equal(token_losses((logits, "past"), labels), found)
    halves = logits.bfloat16()
    assert torch.equal(token_losses(halves, labels), token_losses(halves.float(), labels))


def trainer_metrics(model, dataset, folder, batch_size):
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_eval_batch_size=batch_size,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return Trainer(
        model=model,
        args=arguments,
        eval_dataset=dataset,
        data_collator=default_data_collator,
        compute_metrics=of(model).compute_metrics,
        preprocess_logits_for_metrics=of(model).preprocess_logits_for_metrics,
    ).evaluate()


def test_in_a_trainer_the_loss_is_the_language_model_own(make_gpt2, tmp_path):
    model, tokenizer = make_gpt2()
    model.eval()
    blocks = text_blocks(datasets_of(["spam and eggs " * 30]), tokenizer, 32)
    inputs = {"input_ids": blocks["input_ids"][:], "labels": blocks["labels"][:].clone()}
    # Unequal numbers of labels per batch, so that a mean of batch means is another number.
    inputs["labels"][0, 4:] = -100
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(len(blocks))]
    with torch.no_grad():
        own = model(**inputs).loss.item()
        mean_of_means = np.mean([model(**default_data_collator(rows[i : i + 2])).loss for i in range(0, len(rows), 2)])
    found = trainer_metrics(model, rows, tmp_path, 2)
    assert {f"eval_{metric.key}" for metric in of(model).metrics} == {"eval_loss", "eval_perplexity"} <= found.keys()
    assert abs(mean_of_means - own) > 1e-4
    assert found["eval_loss"] == pytest.approx(own, rel=1e-6)
    assert found["eval_perplexity"] == pytest.approx(np.exp(own), rel=1e-5)


def test_in_a_trainer_the_accuracy_is_that_of_the_classifier_own_logits(make_convnext, tmp_path):
    pytest.importorskip("sklearn")
    model, processor = make_convnext()
    model.eval()
    samples = images(digits()["validation"].select(range(70)), processor)
    pixels, labels = torch.stack([s["pixel_values"] for s in samples]), torch.tensor([s["labels"] for s in samples])
    with torch.no_grad():
        output = copy.deepcopy(model)(pixel_values=pixels, labels=labels)
    found = trainer_metrics(model, samples, tmp_path, 32)
    assert {f"eval_{metric.key}" for metric in of(model).metrics} == {"eval_loss", "eval_top1", "eval_top5"}
    scores = output.logits.numpy()
    assert found["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert found["eval_top1"] == pytest.approx(np.mean(scores.argmax(1) == labels.numpy()))
    assert found["eval_top5"] == pytest.approx(top_k_share(scores, labels.numpy(), 5))
    assert 0 < found["eval_top5"] < 1


def datasets_of(texts):
    from datasets import Dataset

    return Dataset.from_dict({"text": texts})
