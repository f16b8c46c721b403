"""Classification of texts and regression on them: columns, labels, padding, heads, training, adapters, cards."""

import ast
import csv
import json
import logging
import math
import re

import numpy as np
import pytest
import torch
import transformers as T
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy

import hf_ortho
from hf_ortho.checkpoints.load import Checkpoint, load_checkpoint
from hf_ortho.errors import ConfigError, DataError
from hf_ortho.hub import write_card
from hf_ortho.hub.card.loading import adapter_loading
from hf_ortho.tasks.columns import text_columns
from hf_ortho.tasks.samples import batches
from hf_ortho.tasks.text_classification import TEXT_CLASSIFICATION
from hf_ortho.tasks.texts import token_limit, use_padding
from hf_ortho.tasks.tokenizer import byte_tokenizer
from hf_ortho.training import DataArguments, ModelArguments, Recipe, evaluate_model, finetune
from hf_ortho.training.calibration import calibration_batches

GOOD, BAD = ("fine", "great", "superb", "moving", "witty"), ("awful", "dull", "tired", "weak", "messy")
FILLERS = ("a", "the", "film", "plot", "is", "and", "very", "with", "cast", "this")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"max_position_embeddings": 24, "vocab_size": len(SPECIAL + FILLERS + GOOD + BAD)}

NAMED = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}


def reviews(count, seed=0):
    """Texts of 3 to 9 words, whose label is the kind of their one adjective."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for i in range(count):
        words = [str(word) for word in rng.choice(FILLERS, rng.integers(2, 9))]
        words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(GOOD if i % 2 else BAD)))
        texts.append(" ".join(words))
        labels.append(i % 2)
    return texts, labels


@pytest.fixture(scope="session")
def words():
    """A tokenizer with one token per word, [CLS] and [SEP], as of BERT."""

    def make():
        vocabulary = {word: i for i, word in enumerate(SPECIAL + FILLERS + GOOD + BAD)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
        return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)

    return make


@pytest.fixture(scope="session")
def make_bert(words):
    """``make_bert(num_labels=3)``: a seeded BERT classifier and its tokenizer."""

    def make(cls=T.BertForSequenceClassification, **options):
        torch.manual_seed(0)
        config = cls.config_class(**{**SIZES, "pad_token_id": 0, "initializer_range": 0.3, **options})
        return cls(config), words()

    return make


@pytest.fixture(scope="session")
def make_gpt2_classifier(make_gpt2):
    def make(**options):
        config = make_gpt2(initializer_range=0.3)[0].config.to_dict()
        torch.manual_seed(0)
        return T.GPT2ForSequenceClassification(T.GPT2Config.from_dict({**config, **options})), byte_tokenizer()

    return make


@pytest.fixture(scope="session")
def write(tmp_path_factory):
    """Write columns as a CSV file, in which labels may be names."""

    def write(**columns):
        path = tmp_path_factory.mktemp("data") / "data.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
        return path

    return write


@pytest.fixture(scope="session")
def review_file(write):
    texts, labels = reviews(160)
    return write(sentence=texts, label=[("neg", "pos")[label] for label in labels])


@pytest.fixture(scope="session")
def score_file(write):
    """The label is how many of the words are good, by the number of words."""
    texts, labels = reviews(160)
    scores = [(2 * label - 1) * 3 / len(text.split()) for text, label in zip(texts, labels, strict=True)]
    return write(text=texts, label=scores)


@pytest.fixture
def train(tmp_path):
    def train(model, dataset, out="out", training=(), data=(), **options):
        defaults = {"max_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 8, "save_strategy": "no"}
        defaults |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "output_dir": str(tmp_path / out)}
        arguments = ModelArguments(model=str(model), task="text-classification", **options)
        data = DataArguments(dataset=str(dataset), **dict(data))
        return finetune(Recipe(arguments, data, T.TrainingArguments(**(defaults | dict(training))))), tmp_path / out

    return train


def logits_of(folder, texts, cls=T.AutoModelForSequenceClassification):
    """One text at a time, without padding."""
    model, tokenizer = cls.from_pretrained(folder).eval(), T.AutoTokenizer.from_pretrained(folder)
    return alone(model, tokenizer, texts)


def alone(model, tokenizer, texts):
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


# ---- columns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "given", "expected"),
    [
        (["idx", "text", "title"], (None, None), ("text",)),
        (["sentence"], (None, None), ("sentence",)),
        (["sentence1", "sentence2"], (None, None), ("sentence1", "sentence2")),
        (["premise", "hypothesis"], (None, None), ("premise", "hypothesis")),
        (["question1", "question2"], (None, None), ("question1", "question2")),
        (["question", "sentence"], (None, None), ("question", "sentence")),  # although a sentence alone would do
        (["review", "label"], (None, None), ("review",)),
        (["question", "sentence"], ("sentence", None), ("sentence",)),
        (["text", "reply"], (None, "reply"), ("text", "reply")),
        (["review", "reply"], (None, "reply"), ("review", "reply")),
        (["a", "b", "c"], ("c", "a"), ("c", "a")),
    ],
)
def test_text_columns(columns, given, expected):
    assert text_columns(Dataset.from_dict({c: ["x"] for c in columns}), *given, "d") == expected


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        (
            ["a", "b"],
            (None, None),
            r"^d has no unambiguous text columns \(columns: a, b\); name one with --text-column",
        ),
        (["text", "premise", "hypothesis"], (None, None), "--text-column and --text-pair-column$"),
        (["a"], ("b", None), "d has no column 'b'; it has: a; name one with --text-column$"),
        (["a"], ("a", "b"), "d has no column 'b'; it has: a; name one with --text-pair-column$"),
    ],
)
def test_text_columns_that_are_not_clear(columns, given, message):
    with pytest.raises(DataError, match=message):
        text_columns(Dataset.from_dict({c: ["x"] for c in columns}), *given, "d")


def test_a_pair_of_which_one_is_no_text():
    with pytest.raises(DataError, match="column 'b' does not contain text: row 1 is 1"):
        text_columns(Dataset.from_dict({"a": ["x"], "b": [1]}), "a", "b", "d")


# ---- samples -------------------------------------------------------------------------------------------------------


def prepared(parts, rows, **arguments):
    checkpoint = Checkpoint(*parts, None, None)
    return TEXT_CLASSIFICATION.prepare(checkpoint, Dataset.from_dict(rows), DataArguments(**arguments), "d")


def test_samples_are_what_the_tokenizer_makes(make_bert):
    parts = make_bert()
    rows = {"sentence1": ["a film", "the plot is"], "sentence2": ["very dull", "fine"], "label": [1, 0]}
    samples = prepared(parts, rows)
    expected = parts[1](rows["sentence1"], rows["sentence2"])
    assert samples[:] == {**expected, "labels": [1, 0]}
    assert samples[1]["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1]
    batch = TEXT_CLASSIFICATION.collator(Checkpoint(*parts, None, None))(list(samples))
    padded = parts[1](rows["sentence1"], rows["sentence2"], padding=True, return_tensors="pt")
    assert batch.keys() == {*padded, "labels"}
    assert all(torch.equal(batch[key], padded[key]) for key in padded)
    assert batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize(("block_size", "length"), [(None, 24), (7, 7)])
def test_texts_are_truncated(make_bert, block_size, length):
    samples = prepared(make_bert(), {"text": ["fine " * 99, "a film"], "label": [0, 1]}, block_size=block_size)
    assert [len(sample["input_ids"]) for sample in samples] == [length, 4]
    assert samples[0]["input_ids"][-1] == 3  # the separator is kept


@pytest.mark.parametrize(
    ("rows", "arguments", "error", "message"),
    [
        (
            {"text": ["a"], "label": [0]},
            {"block_size": 25},
            ConfigError,
            "between 2 and the model's context length of 24",
        ),
        ({"text": ["a"], "label": [0]}, {"block_size": 2}, ConfigError, "no room for text beside 2 special tokens"),
        ({"text": ["a"], "label": [0]}, {"tokenize": "once"}, ConfigError, "tokenize once: only for language models"),
        ({"text": ["a", None], "label": [0, 1]}, {}, DataError, "^d: column 'text' has no text in row 2$"),
        ({"text": ["a"] * 2, "label": [0, -1]}, {}, DataError, r"-1 in row 2: .* \(-1 often marks rows without one\)"),
        ({"text": ["a"] * 2, "label": [0.5, None]}, {}, DataError, "contains None in row 2: the label is missing"),
        (
            {"text": ["a"] * 2, "label": [0.5, math.inf]},
            {},
            DataError,
            "inf in row 2: a number to predict must be finite",
        ),
        ({"text": ["a"] * 2, "label": [0, 20240131]}, {}, DataError, "20240131 in row 2: .* at most 1,000,000 of them"),
        ({"text": ["a"], "label": [[0, 1]]}, {}, DataError, "each row must have one label"),
        ({"text": ["a"], "score": [0]}, {}, DataError, "no unambiguous label column .*--label-column"),
        ({"text": ["a"]}, {"label_column": "text", "text_column": "text"}, ConfigError, "is also the text column"),
    ],
)
def test_rows_that_cannot_be_used(make_bert, rows, arguments, error, message):
    with pytest.raises(error, match=message):
        prepared(make_bert(), rows, **arguments)


def test_a_text_without_tokens(make_gpt2_classifier):
    samples = prepared(make_gpt2_classifier(), {"text": ["a", ""], "label": [0, 1]})
    assert samples[0]["input_ids"]
    with pytest.raises(DataError, match=r"^d: the text '' has no tokens; remove its row$"):
        samples[1]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["pos", "neg"], ["neg", "pos"]),
        ([2, 0], ["0", "1", "2"]),
        ([1.0, 0.0], ["LABEL_0", "LABEL_1"]),  # whole numbers, as many as the model has classes
        ([1.5, 0.0], None),
    ],
)
def test_labels_decide_between_classes_and_numbers(make_bert, labels, classes):
    samples = prepared(make_bert(), {"text": ["a", "the"], "label": labels})
    names = [f.names for f in samples.features.values() if isinstance(f, ClassLabel)]
    assert names == ([classes] if classes else [])
    expected = labels if classes is None else [classes.index(str(x)) if str(x) in classes else int(x) for x in labels]
    assert samples[:]["labels"] == expected


def test_a_model_with_one_output_takes_integers_as_numbers(make_bert):
    samples = prepared(make_bert(num_labels=1), {"text": ["a", "the"], "label": [3, 0]})
    assert samples[:]["labels"] == [3.0, 0.0]
    assert isinstance(samples[0]["labels"], float)
    assert not any(isinstance(f, ClassLabel) for f in samples.features.values())


# ---- padding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "roberta"])
def test_a_padded_batch_has_the_logits_of_each_text_alone(make_gpt2_classifier, make_bert, kind):
    """Reference: one text at a time, without padding, on which no pad token has an effect."""
    if kind == "bert":
        parts = make_bert(num_labels=3)
    elif kind == "roberta":
        parts = make_bert(T.RobertaForSequenceClassification, num_labels=3, type_vocab_size=2)
    else:
        model, tokenizer = make_gpt2_classifier(num_labels=3)
        if kind == "llama":
            torch.manual_seed(0)
            sizes = SIZES | {"vocab_size": len(tokenizer), "initializer_range": 0.3, "num_labels": 3}
            model = T.LlamaForSequenceClassification(T.LlamaConfig(**sizes, eos_token_id=tokenizer.eos_token_id))
            tokenizer.padding_side = "left"
        parts = (model, tokenizer)
    texts = ["a", "the film is dull", "fine cast"]
    model, tokenizer = parts[0].eval(), parts[1]
    before = tokenizer.pad_token, model.config.pad_token_id
    expected = alone(model, tokenizer, texts)
    checkpoint = Checkpoint(model, tokenizer, None, None)
    samples = prepared(parts, {"text": texts, "label": [0, 1, 2]})
    (batch,) = batches(samples, 3, size=3, collate=TEXT_CLASSIFICATION.collator(checkpoint))
    assert (batch["attention_mask"].sum(1) < batch["attention_mask"].shape[1]).tolist() == [True, False, True]
    assert batch["attention_mask"][:, 0].tolist() == [1, 1, 1]  # on the right
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    if kind in ("gpt2", "llama"):
        assert before == (None, None)
        assert (tokenizer.pad_token, model.config.pad_token_id) == (tokenizer.eos_token, tokenizer.eos_token_id)
    else:
        assert before == (tokenizer.pad_token, model.config.pad_token_id) == ("[PAD]", 0)


def test_the_pad_token_of_a_decoder_is_that_of_its_tokenizer(make_gpt2_classifier):
    model, tokenizer = make_gpt2_classifier(pad_token_id=5)
    use_padding(Checkpoint(model, tokenizer, None, None))
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_that_cannot_pad(make_gpt2_classifier, make_bert):
    model, tokenizer = make_gpt2_classifier()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a pad token nor an end-of-text token"):
        use_padding(Checkpoint(model, tokenizer, None, None))
    with pytest.raises(DataError, match="has no tokenizer"):
        use_padding(Checkpoint(model, None, None, None))
    roberta, _ = make_bert(T.RobertaForSequenceClassification, pad_token_id=1)
    with pytest.raises(ConfigError, match=r"has the id 0, but the positions of .* depend on 1"):
        use_padding(Checkpoint(roberta, make_bert()[1], None, None))


def test_the_context_of_roberta_begins_after_its_pad_token(make_bert):
    model, tokenizer = make_bert(T.RobertaForSequenceClassification, pad_token_id=1)
    assert token_limit(model, tokenizer, None, False) == 22
    ids = torch.full((1, 22), 5)
    assert model(ids).logits.shape == (1, 2)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 23), 5))


# ---- evaluation ----------------------------------------------------------------------------------------------------


def test_evaluation_of_classes(hf_ortho_command, make_bert, save_parts, write, tmp_path):
    """Against the logits of each text alone, in float64."""
    texts, labels = reviews(41)
    folder = save_parts(tmp_path / "model", *make_bert(**NAMED, initializer_range=1.0))
    logits, y = logits_of(folder, texts).double(), np.array(labels)
    guess = logits.argmax(1).numpy()
    tp, fp, fn = (((guess == a) & (y == b)).sum() for a, b in ((1, 1), (1, 0), (0, 1)))
    assert 0 < tp < 20
    expected = {
        "loss": cross_entropy(logits, torch.tensor(labels)).item(),
        "accuracy": (guess == y).mean(),
        "f1": 2 * tp / (2 * tp + fp + fn),
        "matthews_correlation": np.corrcoef(guess, y)[0, 1],  # of two classes, it is Pearson's
    }
    data = write(review=texts, label=[("neg", "pos")[label] for label in labels])
    ran = hf_ortho_command("evaluate", folder, "--dataset", data, "--batch-size", 7)
    assert {key: float(ran.figures[key][0]) for key in expected} == pytest.approx(expected, abs=1e-5)
    ran = hf_ortho_command("evaluate", folder, "--against", folder, "--dataset", data, "--max-samples", 4)
    assert ran.figures["f1"][2] == "0.00000"


def test_evaluation_of_numbers(hf_ortho_command, make_gpt2_classifier, save_parts, score_file, tmp_path):
    stats = pytest.importorskip("scipy.stats")
    folder = save_parts(tmp_path / "model", *make_gpt2_classifier(num_labels=1))
    with score_file.open() as file:
        rows = [row for row in csv.DictReader(file) if len(row["text"]) < 32]
    outputs, y = (
        logits_of(folder, [row["text"] for row in rows]).double()[:, 0].numpy(),
        np.array([float(row["label"]) for row in rows]),
    )
    data = Dataset.from_dict({"text": [row["text"] for row in rows], "label": y})
    data.to_parquet(tmp_path / "data.parquet")
    expected = {
        "loss": np.square(outputs - y).mean(),
        "pearsonr": stats.pearsonr(outputs, y)[0],
        "spearmanr": stats.spearmanr(outputs, y)[0],
    }
    ran = hf_ortho_command("evaluate", folder, "--dataset", tmp_path / "data.parquet")
    assert {key: float(ran.figures[key][0]) for key in expected} == pytest.approx(expected, abs=1e-5)
    assert "accuracy" not in ran.figures


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (2, [0.5, 1.0], "column 'label' contains numbers such as 0.5, but .* predicts one of 2 classes"),
        (1, ["neg", "pos"], "column 'label' contains classes, but .* predicts a number"),
        (2, [0, 2], "the dataset has 3 classes, .* has 2"),
        (2, [0, -1], "-1 often marks rows without one"),
    ],
)
def test_labels_that_the_model_does_not_predict(
    hf_ortho_command, make_bert, save_parts, write, tmp_path, outputs, labels, message
):
    folder = save_parts(tmp_path / "model", *make_bert(num_labels=outputs))
    ran = hf_ortho_command("evaluate", folder, "--dataset", write(text=["a", "the"], label=labels))
    assert re.search(message, ran.error)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--dataset is required for BertForSequenceClassification"),
        (["--dataset", "digits"], "no unambiguous text columns"),
        (["--text-pair-column", "missing"], "no column 'missing'; .* with --text-pair-column"),
        (["--text-column", "label"], "'label': is also the text column"),
    ],
)
def test_arguments_of_evaluate(hf_ortho_command, make_bert, save_parts, review_file, tmp_path, argv, message):
    folder = save_parts(tmp_path / "model", *make_bert())
    argv = argv if not argv or argv[0] == "--dataset" else ["--dataset", review_file, *argv]
    assert re.search(message, hf_ortho_command("evaluate", folder, *argv).error)


@pytest.mark.parametrize(
    ("problem_type", "what"), [("multi_label_classification", "classes"), ("regression", "numbers")]
)
def test_several_outputs_per_text_are_refused(make_bert, write, caplog, problem_type, what):
    parts = make_bert(problem_type=problem_type)
    checkpoint, message = Checkpoint(*parts, None, None), f"predicts several {what} per text, which is not supported"
    rows = {"text": ["a", "the"], "label": [0, 1]}
    with pytest.raises(DataError, match=message):
        evaluate_model(checkpoint, prepared(parts, rows))
    with pytest.raises(DataError, match=message):
        TEXT_CLASSIFICATION.prepare_evaluation(checkpoint, Dataset.from_dict(rows), DataArguments(), "d")
    inputs, _ = calibration_batches(checkpoint, str(write(**rows)), samples=1)
    assert "labels" not in inputs[0]
    assert message in caplog.text


@pytest.mark.parametrize(
    ("names", "noted"),
    [({0: "positive", 1: "negative"}, True), ({0: "LABEL_0", 1: "LABEL_1"}, False), (NAMED["id2label"], False)],
)
def test_classes_with_other_names_are_noted(make_bert, review_file, caplog, names, noted):
    checkpoint = Checkpoint(*make_bert(id2label=names, label2id={v: k for k, v in names.items()}), None, None)
    rows = Dataset.from_csv(str(review_file))
    evaluate_model(checkpoint, TEXT_CLASSIFICATION.prepare_evaluation(checkpoint, rows, DataArguments(), "d"))
    assert ("(neg, pos) are compared with those of  (positive, negative) in this order" in caplog.text) == noted


# ---- training ------------------------------------------------------------------------------------------------------


def test_training_learns_the_classes(train, make_bert, save_parts, review_file, tmp_path):
    """From an encoder without a head to far above chance: held out are 16 of 160 texts, so 13 by chance in 100 runs."""
    model, tokenizer = make_bert(initializer_range=0.1)
    folder = save_parts(tmp_path / "encoder", model.bert, tokenizer)
    training = {"max_steps": 60, "per_device_train_batch_size": 16}
    result, out = train(folder, review_file, activation="hermite_3", training=training)
    assert result.after["accuracy"] >= 13 / 16 > result.before["accuracy"]
    assert list(result.after) == ["loss", "accuracy", "f1", "matthews_correlation"]
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "neg", "1": "pos"}
    assert config["problem_type"] == "single_label_classification"
    assert config["hidden_act"] == "hermite_3"
    assert evaluate_model(load_checkpoint(str(out)), result.held_back) == pytest.approx(result.after, abs=1e-6)
    answer = T.pipeline("text-classification", str(out), device="cpu")(
        ["this film is superb and moving", "a dull plot"]
    )
    assert [a["label"] for a in answer] == ["pos", "neg"]


@pytest.mark.slow
def test_training_learns_numbers(train, make_bert, save_parts, score_file, tmp_path):
    folder = save_parts(tmp_path / "model", *make_bert(num_labels=3, initializer_range=0.1))
    training = {
        "max_steps": 60,
        "per_device_train_batch_size": 16,
        "metric_for_best_model": "pearsonr",
        "eval_strategy": "steps",
        "eval_steps": 30,
    }
    result, out = train(folder, score_file, training=training)
    assert list(result.after) == ["loss", "pearsonr", "spearmanr"]
    assert result.after["pearsonr"] > 0.9 > result.before["pearsonr"]
    config = T.AutoConfig.from_pretrained(out)
    assert (config.num_labels, config.problem_type) == (1, "regression")
    assert evaluate_model(load_checkpoint(str(out)), result.held_back) == pytest.approx(result.after, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    ("source", "outputs", "kind"), [("single_label_classification", 3, "regression"), ("regression", 1, None)]
)
def test_the_problem_type_is_that_of_the_labels(
    train, make_bert, save_parts, review_file, score_file, tmp_path, source, outputs, kind, adapter
):
    folder = save_parts(tmp_path / "model", *make_bert(problem_type=source, num_labels=outputs))
    options = {"adapter": True, "train": "lora"} if adapter else {}
    result, out = train(folder, score_file if kind == "regression" else review_file, **options)
    loaded = load_checkpoint(str(out))
    assert loaded.model.config.problem_type == (kind or "single_label_classification")
    assert evaluate_model(loaded, result.held_back) == pytest.approx(result.after, rel=1e-4, abs=1e-5)


def test_gpt2_learns_in_batches_and_reloads(train, gpt2_folder, review_file):
    """A language model gets a new head and a pad token, which are saved with it."""
    result, out = train(
        gpt2_folder, review_file, training={"max_steps": 4}, train="activations", activation="hermite_3"
    )
    model, tokenizer = T.AutoModelForSequenceClassification.from_pretrained(out), T.AutoTokenizer.from_pretrained(out)
    assert type(model) is T.GPT2ForSequenceClassification
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    texts = ["a film", "the plot is dull"]
    with torch.no_grad():
        found = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(found, alone(model, tokenizer, texts), rtol=1e-5, atol=1e-6)
    trained = {n for n, p in result.checkpoint.model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"coefficients", "weight"}
    assert "score.weight" in trained


def test_the_head_of_roberta_is_replaced(train, make_bert, save_parts, write, tmp_path):
    parts = make_bert(T.RobertaForSequenceClassification, num_labels=2, type_vocab_size=2)
    data = write(text=["a", "the film", "fine"] * 10, label=["x", "y", "z"] * 10)
    folder = save_parts(tmp_path / "model", *parts)
    result, out = train(folder, data)
    assert result.checkpoint.model.classifier.out_proj.weight.shape == (3, 16)
    assert result.checkpoint.new_modules == ("classifier.out_proj",)
    assert logits_of(out, ["a"]).shape == (1, 3)


def test_two_texts_and_a_stream(train, make_bert, save_parts, tmp_path):
    texts, labels = reviews(60)
    features = Features(
        {"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=["n", "p"])}
    )
    rows = Dataset.from_dict({"premise": ["this is"] * 60, "hypothesis": texts, "label": labels}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    rows.select(range(10)).to_parquet(tmp_path / "valid.parquet")
    folder = save_parts(tmp_path / "model", *make_bert(num_labels=3))
    data = {"streaming": True, "eval_dataset": str(tmp_path / "valid.parquet")}
    result, out = train(folder, tmp_path / "train.parquet", data=data)
    assert T.AutoConfig.from_pretrained(out).id2label == {0: "n", 1: "p"}
    (sample,) = result.train.head(1)
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    assert sample == {**tokenizer("this is", texts[0]), "labels": 0}
    numbers = rows.remove_columns("label").add_column("label", [float(label) for label in labels])
    numbers.to_parquet(tmp_path / "numbers.parquet")
    data["eval_dataset"] = str(tmp_path / "numbers.parquet")
    result, out = train(folder, tmp_path / "numbers.parquet", "numbers", data=data)
    assert "pearsonr" in result.after


def test_streamed_names_are_refused(train, make_bert, save_parts, review_file, tmp_path):
    folder = save_parts(tmp_path / "model", *make_bert())
    with pytest.raises(DataError, match=r"column 'label' of .* is not a ClassLabel"):
        train(folder, review_file, data={"streaming": True, "eval_dataset": str(review_file)})


@pytest.mark.parametrize(
    ("labels", "training", "options", "message"),
    [
        (["x", "x"], {}, {}, "the training data has a single class"),
        ([0.5, 1.5], {"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor 0.1: needs classes"),
        ([0.5, 1.5], {"metric_for_best_model": "f1"}, {}, "'f1': text classification has loss, pearsonr, spearmanr"),
        ([0, 1], {"metric_for_best_model": "pearsonr"}, {}, "has loss, accuracy, f1, matthews_correlation"),
    ],
)
def test_trainings_that_do_not_fit(train, make_bert, save_parts, write, tmp_path, labels, training, options, message):
    folder = save_parts(tmp_path / "model", *make_bert(num_labels=3))
    with pytest.raises((ConfigError, DataError), match=message):
        train(folder, write(text=["a", "the"] * 5, label=labels * 5), training=training, **options)


def test_evaluation_data_with_other_classes(train, make_bert, save_parts, write, tmp_path):
    folder = save_parts(tmp_path / "model", *make_bert())
    other = write(text=["a", "the"], label=["neg", "neutral"])
    data = write(text=["a", "the"] * 5, label=["neg", "pos"] * 5)
    with pytest.raises(DataError, match="has the class 'neutral', which is not among the 2 classes"):
        train(folder, data, data={"eval_dataset": str(other)})


# ---- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unsupported layer type.*LayerNorm")  # peft's, of its own LN-tuning
@pytest.mark.parametrize("kind", ["gpt2", "roberta", "regression"])
@pytest.mark.parametrize("policy", ["activations", "lora", "norms"])
def test_an_adapter_has_its_head(
    train, hf_ortho_command, gpt2_folder, make_bert, save_parts, review_file, score_file, tmp_path, kind, policy
):
    """Reloaded by hf_ortho, by the lines of its card and merged, it gives the logits of the training."""
    if kind == "gpt2":
        base = gpt2_folder
    else:
        cls = T.RobertaForSequenceClassification if kind == "roberta" else T.BertForSequenceClassification
        base = save_parts(tmp_path / "base", *make_bert(cls, num_labels=3, type_vocab_size=2))
    data = score_file if kind == "regression" else review_file
    options = {"activation": "hermite_3"} if policy == "activations" else {}
    result, out = train(base, data, adapter=True, train=policy, **options)
    trained, tokenizer = result.checkpoint.model.eval(), result.checkpoint.tokenizer
    texts = ["a film", "the plot is very dull"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = trained(**inputs).logits
    assert expected.shape == (2, 1 if kind == "regression" else 2)
    names = {0: "LABEL_0"} if kind == "regression" else {0: "neg", 1: "pos"}
    assert json.loads((out / "labels.json").read_text()) == {str(i): name for i, name in names.items()}
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"

    merged = load_checkpoint(str(out))
    assert merged.model.config.id2label == names
    assert merged.new_modules == ()
    assert evaluate_model(merged, result.held_back) == pytest.approx(result.after, rel=1e-4, abs=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(merged.model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)

    write_card(out)
    lines = ModelCard.load(out / "README.md").text.partition("```python")[2].partition("```")[0]
    scope = {}
    exec(lines, scope)
    assert scope["base"].config.id2label == names
    with torch.no_grad():
        torch.testing.assert_close(scope["model"].eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_each_checkpoint_of_an_adapter_has_its_classes(train, gpt2_folder, review_file):
    training = {"save_strategy": "steps", "save_steps": 1}
    result, out = train(gpt2_folder, review_file, training=training, train="lora", adapter=True)
    loaded = load_checkpoint(str(out / "checkpoint-2"))
    assert type(loaded.model) is T.GPT2ForSequenceClassification
    assert loaded.model.config.id2label == {0: "neg", 1: "pos"}
    assert evaluate_model(loaded, result.held_back) == pytest.approx(result.after, rel=1e-4, abs=1e-5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")  # peft's, of the layers of GPT-2
def test_an_adapter_of_the_same_classes_brings_the_pad_token(
    train, make_gpt2_classifier, save_parts, review_file, tmp_path
):
    """A batch through the lines of the card has the logits of each text alone."""
    base = save_parts(tmp_path / "base", *make_gpt2_classifier(**NAMED))
    result, out = train(base, review_file, train="lora", adapter=True)
    assert not (out / "labels.json").exists()
    loaded, end = load_checkpoint(str(out)), result.checkpoint.tokenizer.eos_token_id
    assert (loaded.tokenizer.pad_token_id, loaded.model.config.pad_token_id) == (end, end)
    write_card(out)
    scope = {}
    exec(ModelCard.load(out / "README.md").text.partition("```python")[2].partition("```")[0], scope)
    texts = ["a film", "the plot is very dull"]
    with torch.no_grad():
        found = scope["model"].eval()(**scope["tokenizer"](texts, padding=True, return_tensors="pt")).logits
    expected = alone(loaded.model, loaded.tokenizer, texts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # read by peft
def test_an_adapter_of_peft_alone(make_bert, save_parts, tmp_path):
    """peft saves the head of its task type, and no names."""
    roberta, tokenizer = make_bert(T.RobertaForSequenceClassification, num_labels=3, type_vocab_size=2)
    base = save_parts(tmp_path / "base", roberta.roberta, tokenizer)
    model = T.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    wrapped = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    inputs = tokenizer(["a film"], return_tensors="pt")
    loaded = load_checkpoint(str(tmp_path / "adapter"))
    assert (type(loaded.model), loaded.new_modules) == (T.RobertaForSequenceClassification, ())
    assert torch.equal(loaded.model(**inputs).logits, wrapped.eval()(**inputs).logits)
    write_card(tmp_path / "adapter")
    assert "Trained and saved in full: `classifier`.\n" in ModelCard.load(tmp_path / "adapter" / "README.md").text


def test_names_of_classes_in_the_card_of_an_adapter():
    names = {0: 'a "q"\n```\n<b> {x}', 1: "\u202eé\\ #"}
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "base", "id2label": names}
    line = re.search(r"^classes = (.*)$", adapter_loading(config, "me/x"), re.MULTILINE)[1]
    assert ast.literal_eval(line) == names


def test_an_adapter_of_the_same_classes_leaves_the_head(train, make_bert, save_parts, review_file, tmp_path):
    parts = make_bert(**NAMED)
    base = save_parts(tmp_path / "base", *parts)
    result, out = train(base, review_file, adapter=True, train="activations", activation="hermite_3")
    assert result.trainable == 4
    assert not (out / "labels.json").exists()
    loaded = PeftModel.from_pretrained(T.BertForSequenceClassification.from_pretrained(base), out)
    inputs = parts[1](["a film"], return_tensors="pt")
    with torch.no_grad():
        expected = result.checkpoint.model.eval()(**inputs).logits
        assert torch.equal(loaded.eval()(**inputs).logits, expected)
    assert evaluate_model(load_checkpoint(str(out)), result.held_back) == pytest.approx(result.after, abs=1e-5)


# ---- calibration ---------------------------------------------------------------------------------------------------


def test_calibration_with_the_classes_of_the_model(make_bert, review_file):
    parts = make_bert(**NAMED)
    inputs, _ = calibration_batches(Checkpoint(*parts, None, None), str(review_file), samples=2)
    texts, labels = reviews(16)
    expected = [parts[1](texts[i : i + 8], padding=True, return_tensors="pt") for i in (0, 8)]
    assert [batch["labels"].tolist() for batch in inputs] == [labels[:8], labels[8:]]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(inputs, expected, strict=True))
    report = hf_ortho.convert(parts[0], "hermite_4", calibration=inputs)
    assert report.fidelity.loss_before == pytest.approx(report.fidelity.loss_after, rel=0.05)
    assert report.fidelity.predictions == 8


def test_calibration_without_labels(make_bert, review_file, score_file, write, caplog):
    checkpoint = Checkpoint(*make_bert(num_labels=3), None, None)
    for file, reason in (
        (review_file, "the classes of .* are not those of the model"),
        (score_file, "contains numbers such as"),
        (write(text=["a", "the"], label=[0, -1]), "-1 often marks"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hf_ortho"):
            inputs, _ = calibration_batches(checkpoint, str(file), samples=2)
        assert not any("labels" in batch for batch in inputs)
        assert len(inputs) == 2
        assert re.search(f"^note: calibrating without labels: .*{reason}", caplog.messages[0])
    with pytest.raises(DataError, match="contains numbers such as"):
        calibration_batches(checkpoint, str(score_file), samples=2, label_column="label")


def test_calibration_on_pairs_without_labels(make_bert, write):
    model, tokenizer = make_bert()
    rows = {"premise": ["a", "the film"], "hypothesis": ["is dull", "fine"]}
    (batch,), _ = calibration_batches(Checkpoint(model, tokenizer, None, None), str(write(**rows)), samples=1)
    expected = tokenizer(rows["premise"], rows["hypothesis"], padding=True, return_tensors="pt")
    assert {key: value.tolist() for key, value in batch.items()} == {k: v.tolist() for k, v in expected.items()}


def test_calibration_of_a_regression(make_bert, score_file):
    parts = make_bert(num_labels=1)
    inputs, _ = calibration_batches(Checkpoint(*parts, None, None), str(score_file), samples=2)
    assert inputs[0]["labels"].dtype == torch.float32
    report = hf_ortho.convert(parts[0], "hermite_4", calibration=inputs)
    assert report.fidelity.loss_before is not None


# ---- commands ------------------------------------------------------------------------------------------------------


def test_commands_from_a_conversion_to_a_card(
    hf_ortho_command, make_bert, save_parts, review_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("hf_ortho.plotting.plot_stored", lambda *args: args[1].write_bytes(b"png"))
    monkeypatch.setattr("hf_ortho.conversion.ConversionReport.plot", lambda self, file, title: file.write_bytes(b"png"))
    parts = make_bert(**NAMED)
    source = save_parts(tmp_path / "source", *parts)
    argv = ["-o", tmp_path / "converted", "--calibration-data", review_file, "--degree", 3]
    assert hf_ortho_command("convert", source, *argv).code == 0
    flags = ["--use_cpu", "true", "--max_steps", 30, "--learning_rate", "0.01", "--output_dir", tmp_path / "tuned"]
    ran = hf_ortho_command("finetune", "--model", tmp_path / "converted", "--dataset", review_file, *flags)
    assert ran.code == 0, ran.err
    tuned = ran.figures["accuracy"][1]
    card = ModelCard.load(tmp_path / "tuned" / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.metrics == ["accuracy", "f1", "matthews_correlation"]
    by_type = {entry.metric_type: entry for entry in card.data.eval_results}
    assert by_type["accuracy"].metric_value == float(tuned)
    assert by_type["accuracy"].task_type == "text-classification"
    assert "The classes are neg, pos." in card.text
    assert "AutoModelForSequenceClassification" in card.text


def test_a_classifier_from_a_sentence_encoder_is_one_of_transformers(
    hf_ortho_command, make_bert, save_parts, review_file, tmp_path
):
    model, tokenizer = make_bert()
    folder = save_parts(tmp_path / "encoder", model.bert, tokenizer)
    (folder / "1_Pooling").mkdir()
    for file, text in (
        (
            "modules.json",
            '[{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]',
        ),
        ("1_Pooling/config.json", "{}"),
        ("sentence_bert_config.json", "{}"),
        ("LICENSE", "mine"),
        (
            "README.md",
            "---\nlicense: mit\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n"
            "tags: [sentence-transformers, feature-extraction, legal]\n---\n",
        ),
    ):
        (folder / file).write_text(text)
    argv = ["--task", "text-classification", "--use_cpu", "true", "--max_steps", 1, "--output_dir", tmp_path / "out"]
    ran = hf_ortho_command("finetune", "--model", folder, "--dataset", review_file, *argv)
    assert ran.code == 0, ran.err
    assert "Training on 144 samples for 1 steps" in ran.out
    assert (tmp_path / "out" / "LICENSE").exists()
    assert not [file.name for file in (tmp_path / "out").iterdir() if "sentence" in file.name or "Pooling" in file.name]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-classification")
    assert (card.data.license, card.data.tags[-1]) == ("mit", "legal")
    assert not {"sentence-transformers", "feature-extraction"} & {*card.data.tags}
    assert "sentence_transformers" not in card.text


@pytest.mark.parametrize("flag", [["--random_crop", "0.5"], ["--mixup", "0.2"], ["--horizontal_flip", "true"]])
def test_augmentations_are_for_images(hf_ortho_command, make_bert, save_parts, review_file, tmp_path, flag):
    folder = save_parts(tmp_path / "model", *make_bert())
    argv = ["--use_cpu", "true", "--max_steps", 1, "--output_dir", tmp_path / "out"]
    error = hf_ortho_command("finetune", "--model", folder, "--dataset", review_file, *argv, *flag).error
    assert error == f"{flag[0][2:]}: needs labeled images, which BertForSequenceClassification does not take"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_pretraining_a_classifier(hf_ortho_command, review_file, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("hf_ortho.plotting.plot_stored", lambda *args: args[1].write_bytes(b"png"))
    overrides = json.dumps(SIZES | {"max_position_embeddings": 64})
    argv = ["--task", "text-classification", "--model_type", kind, "--tokenizer", "bpe", "--vocab_size", 300]
    argv += ["--config_overrides", overrides, "--activation", "hermite_3", "--use_cpu", "true", "--max_steps", 2]
    ran = hf_ortho_command("pretrain", *argv, "--dataset", review_file, "--output_dir", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert logits_of(tmp_path / "out", ["a film"]).shape == (1, 2)
    tokenizer = T.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token_id == T.AutoConfig.from_pretrained(tmp_path / "out").pad_token_id
    assert tokenizer.decode(tokenizer("a", "the")["input_ids"]) == "[CLS]a[SEP]the[SEP]"
    assert set(ran.figures) >= {"loss", "accuracy", "f1", "matthews_correlation"}


@pytest.mark.slow
def test_comparison_shows_the_metric_of_the_task(
    hf_ortho_command, make_bert, save_parts, review_file, score_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("hf_ortho.plotting.comparison.plot_comparison", lambda *args: args[-2].write_bytes(b"png"))
    folder = save_parts(tmp_path / "model", *make_bert(num_labels=3))
    for file, metric in ((review_file, "accuracy"), (score_file, "pearsonr")):
        argv = ["--model", folder, "--dataset", file, "--activations", "gelu", "--seeds", 0]
        argv += ["--use_cpu", "true", "--max_steps", 2, "--timing_rounds", 0, "--output_dir", tmp_path / metric]
        assert hf_ortho_command("compare", *argv).code == 0
        assert json.loads((tmp_path / metric / "results.json").read_text())["metric"] == metric
