"""README.md and the guides in recipes/: their blocks run as they stand, their links lead somewhere, they are short.

They run in a folder with small models under the names of those on the Hub, and small files under the names that the
documents use for the reader's own data.
"""

import json
import os
import re

import documents
import pytest
import torch
from documents import REPOSITORY
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_ortho.tasks.tokenizer import byte_tokenizer

README = REPOSITORY / "README.md"
GUIDES = sorted(file for file in (REPOSITORY / "recipes").glob("*.md") if file.name != "README.md")
PAGES = [README, *sorted(REPOSITORY.glob("recipes/**/*.md")), REPOSITORY / "model_cards" / "README.md"]
SLOW = {"onnx.md"}  # torch.onnx takes seconds for any model
LONGEST = {README: 160} | dict.fromkeys(GUIDES, 100)  # lines
TEXT = "a model reads one text after another and learns what follows which word then it writes some of its own"
WORDS = re.findall(r"\w+", TEXT)
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"


def named(files, slow=()):
    marks = {name: pytest.mark.slow for name in slow}
    return [pytest.param(file, id=str(file.relative_to(REPOSITORY)), marks=marks.get(file.name, ())) for file in files]


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_gpt2, make_convnext, save_parts):
    """A folder with small models under the names that the documents use."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_parts(folder / "openai-community/gpt2", *make_gpt2(n_layer=1, n_positions=256))
    save_parts(folder / "facebook/convnext-tiny-224", *make_convnext())
    words = folder / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(WORDS))]))
    wordpiece = BertTokenizerFast(str(words), model_max_length=128)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    bert = BertConfig(vocab_size=len(wordpiece), max_position_embeddings=128, **sizes)
    save_parts(folder / "google-bert/bert-base-uncased", BertForMaskedLM(bert), wordpiece)
    save_parts(folder / "sentence-transformers/all-MiniLM-L6-v2", BertModel(bert), wordpiece)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    llama = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, num_key_value_heads=2, **sizes)
    save_parts(folder / "HuggingFaceTB/SmolLM2-135M-Instruct", LlamaForCausalLM(llama), tokenizer)
    return folder


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    """The folder in which a document runs."""
    monkeypatch.chdir(tmp_path)
    for maker in models.iterdir():
        (tmp_path / maker.name).symlink_to(maker)
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    text = "\n".join(" ".join(WORDS[i * k % len(WORDS)] for k in range(1, 12)) for i in range(1, 200))
    (tmp_path / "my_text.txt").write_text(text)
    (tmp_path / "test.txt").write_text(text[:2000])
    rows = [f"{' '.join(WORDS[i : i + 4])},{('neg', 'pos')[i % 2]}" for i in range(16)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows, ""]))
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "a model"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(16)))
    pairs = [{"anchor": " ".join(WORDS[i : i + 3]), "positive": " ".join(WORDS[i + 1 : i + 4])} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.setitem(os.environ, "MPLBACKEND", "agg")
    monkeypatch.setattr("matplotlib.figure.Figure.draw", lambda *args: None)  # other tests look at the pictures
    return tmp_path


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # transformers' second adapter
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # TRL's
@pytest.mark.parametrize("file", named([README, *GUIDES], SLOW))
def test_the_blocks_run(file, place, hf_ortho_command):
    documents.run(file, place, hf_ortho_command)


@pytest.mark.parametrize("file", named(PAGES))
def test_the_links_lead_somewhere(file):
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"""(?:\]\(|src=")([^)\s"]+)""", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path).resolve() if path else file
        assert linked.exists(), f"{file.name}: {target}"
        if anchor:
            assert anchor in anchors(linked), f"{file.name}: {target}"


def anchors(file):
    """The anchors that GitHub gives the headings of a document."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", named(LONGEST))
def test_the_documents_are_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST[file]


@pytest.mark.parametrize("file", named(GUIDES))
def test_a_guide_starts_with_a_command(file):
    """At most a sentence stands before it."""
    first = documents.blocks(file)[0]
    assert first.line <= 9


def test_a_block_that_fails_is_named(tmp_path, hf_ortho_command, monkeypatch):
    document = tmp_path / "guide.md"
    document.write_text("Text\n\n```bash\npip install '.[onnx]' && hf-ortho inspect absent\n```\n")
    with pytest.raises(AssertionError, match=r"guide\.md, line 4: exit code 2\n(.*\n)*hf-ortho: error: absent"):
        documents.run(document, tmp_path, hf_ortho_command)
    monkeypatch.setitem(documents.DOES, "hf-ortho", {}.__getitem__)
    with pytest.raises(TypeError):  # a mistake of the runner does not leave bash waiting
        documents.run(document, tmp_path, hf_ortho_command)
    assert [path.name for path in tmp_path.iterdir()] == ["guide.md"]
