"""F1, Matthews, Pearson and Spearman against counts by hand, scikit-learn and scipy."""

import warnings

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from hf_ortho.tasks.metrics import compute, f1, matthews_correlation, pearsonr, spearmanr
from hf_ortho.training import F1, MatthewsCorrelation, Pearson, Spearman


@pytest.fixture(params=[2, 5])
def classes(request):
    """600 predictions, of which about half are right, and labels; (predictions, labels, number of classes)."""
    rng = np.random.default_rng(0)
    labels = rng.choice(request.param, 600, p=np.arange(1, request.param + 1) / sum(range(request.param + 1)))
    return np.where(rng.random(600) < 0.5, labels, rng.integers(request.param, size=600)), labels, request.param


@pytest.fixture(params=["distinct", "ties"])
def numbers(request):
    rng = np.random.default_rng(0)
    labels = rng.normal(size=300)
    predictions = labels**3 + rng.normal(size=300)
    return (predictions, labels) if request.param == "distinct" else (predictions.round(), labels.round())


def value(metric, predictions, references):
    (found,) = metric.compute(predictions=predictions, references=references).values()
    return found


def test_f1_and_matthews_from_the_counts_of_a_table():
    """TP 3, FP 1, FN 2, TN 4."""
    guess, label = [1] * 4 + [0] * 6, [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    assert value(F1(), guess, label) == pytest.approx(6 / 9, rel=1e-12)
    macro = (6 / 9 + 8 / 11) / 2
    assert value(F1(average="macro"), guess, label) == pytest.approx(macro, rel=1e-12)
    expected = (3 * 4 - 1 * 2) / np.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert value(MatthewsCorrelation(), guess, label) == pytest.approx(expected, rel=1e-12)


def test_classes_as_scikit_learn(classes):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    guess, label, count = classes
    average = "binary" if count == 2 else "macro"
    expected = sklearn_metrics.f1_score(label, guess, average=average)
    assert value(F1(average=average), guess, label) == pytest.approx(expected, rel=1e-12)
    expected = sklearn_metrics.matthews_corrcoef(label, guess)
    assert 0.1 < expected < 0.9
    assert value(MatthewsCorrelation(), guess, label) == pytest.approx(expected, rel=1e-12)


def test_matthews_is_the_correlation_of_indicators(classes):
    """Gorodkin: covariance summed over the columns of the one-hot matrices, by the root of both variances."""
    guess, label, count = classes
    x, y = (np.eye(count)[v] - np.eye(count)[v].mean(0) for v in (guess, label))
    expected = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    assert value(MatthewsCorrelation(), guess, label) == pytest.approx(expected, rel=1e-12)


def test_numbers_as_numpy_and_scipy(numbers):
    stats = pytest.importorskip("scipy.stats")
    assert value(Pearson(), *numbers) == pytest.approx(np.corrcoef(*numbers)[0, 1], rel=1e-12)
    assert value(Spearman(), *numbers) == pytest.approx(stats.spearmanr(*numbers)[0], rel=1e-12)


def test_equal_numbers_share_their_ranks():
    """Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5."""
    assert value(Spearman(), [3.0, 7.0, 7.0, 9.0], [0, 1, 2, 3]) == pytest.approx(4.5 / np.sqrt(4.5 * 5), rel=1e-12)


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "expected"),
    [
        (F1(), [0, 0], [1, 0], 0.0),
        (F1(), [0, 0], [0, 0], 0.0),
        (F1(average="macro"), [0, 0], [1, 0], 1 / 3),
        (MatthewsCorrelation(), [1, 1], [1, 0], 0.0),
        (MatthewsCorrelation(), [1, 0], [1, 1], 0.0),
        (MatthewsCorrelation(), [1], [1], 0.0),
        (Pearson(), [0.1, 0.1, 0.1], [1.0, 2.0, 3.0], 0.0),
        (Pearson(), [1.0], [2.0], 0.0),
        (Pearson(), [np.nan, 1.0], [1.0, 2.0], np.nan),
        (Spearman(), [1.0, 2.0], [5.0, 5.0], 0.0),
        (Spearman(), [np.inf, 2.0], [5.0, 6.0], np.nan),
    ],
)
def test_undefined_values_have_a_rule_and_no_warning(metric, predictions, references, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value(metric, predictions, references) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("module", [f1, matthews_correlation, pearsonr, spearmanr], ids=lambda m: m.__name__[-8:])
def test_loaded_from_its_file_and_in_batches(module):
    """Under the name in the ``evaluate`` library, which is also the key of the value."""
    rng = np.random.default_rng(0)
    guess, label = rng.integers(2, size=(2, 50))
    metric = evaluate.load(module.__file__)
    metric.add_batch(predictions=guess[:30], references=label[:30])
    metric.add_batch(predictions=guess[30:], references=label[30:])
    key = module.__name__.rpartition(".")[2]
    cls = {"f1": F1, "matthews_correlation": MatthewsCorrelation, "pearsonr": Pearson, "spearmanr": Spearman}[key]
    assert metric.compute() == {key: value(cls(), guess, label)}


def test_averages_of_f1():
    with pytest.raises(ValueError, match="average 'micro': must be binary or macro"):
        F1(average="micro")


def test_logits_that_are_not_numbers():
    """A NaN is never the largest; a row of them is no class at all."""
    logits = np.array([[np.nan, -1.0], [2.0, np.nan], [np.nan, np.nan], [0.0, 1.0]], np.float32)
    found = compute.classification(EvalPrediction(logits, np.array([1, 0, 0, 1])))
    assert np.isnan(found.pop("loss"))
    assert found["accuracy"] == 0.75
    assert found["f1"] == 1.0  # of class 1: both found, and nothing else


def test_a_constant_regression():
    found = compute.regression(EvalPrediction(np.full((3, 1), 2.0, np.float32), np.array([1.0, 2.0, 4.0])))
    assert found == {"loss": pytest.approx(5 / 3), "pearsonr": 0.0, "spearmanr": 0.0}


def test_hidden_states_beside_the_logits_are_ignored():
    logits, labels = np.array([[3.0, 0.0], [0.0, 3.0]], np.float32), np.array([0, 1])
    found = compute.classification(EvalPrediction((logits, np.zeros((2, 7))), labels))
    assert found == {"loss": pytest.approx(np.log1p(np.exp(-3))), "accuracy": 1, "f1": 1, "matthews_correlation": 1}
