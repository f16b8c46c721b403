"""Instruction data read for evaluation and calibration: which tokens have labels, and what is refused."""

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import processors
from torch.nn.functional import cross_entropy

import hf_ortho
from hf_ortho.checkpoints.load import Checkpoint
from hf_ortho.errors import ConfigError, DataError
from hf_ortho.tasks.arguments import DataArguments
from hf_ortho.tasks.causal_lm import CAUSAL_LM
from hf_ortho.tasks.conversations import conversations
from hf_ortho.tasks.tokenizer import bpe_tokenizer, byte_tokenizer

END = "<|endoftext|>"
PLAIN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}" + END + "{% endfor %}"
ASKING = PLAIN + "{% if add_generation_prompt %}[assistant]{% endif %}"
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    + END
    + "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
THINKING = ASKING.replace("[assistant]{% endif %}", "[assistant]<think>{% endif %}")  # as DeepSeek-R1
LAST_ONLY = (  # as Qwen3: earlier turns are shortened
    "{% for m in messages %}[{{ m['role'] }}]{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
    + "{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, é."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def tokenizer_of(template, kind="bytes"):
    tokenizer = byte_tokenizer() if kind == "bytes" else bpe_tokenizer(["[user]Hi[assistant]Hello, " * 9], 280)
    tokenizer.chat_template = template
    return tokenizer


def completions(tokenizer, rows, block_size=200, **options):
    """The text of each sample, with the labeled parts in braces."""
    texts = []
    for row in conversations(Dataset.from_list(rows), tokenizer, block_size, "chats", **options):
        text, inside = "", False
        for token, label in zip(row["input_ids"].tolist(), row["labels"].tolist(), strict=True):
            assert label in (token, -100)
            text += "}" * (inside and label == -100) + "{" * (not inside and label != -100)
            inside = label != -100
            text += tokenizer.convert_ids_to_tokens(token)
        whole = tokenizer.convert_tokens_to_string([text]) + "}" * inside
        texts.append(whole)
    return texts


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize(
    ("template", "text"),
    [
        (ASKING, f"[user]Hi{END}[assistant]{{Hello, é.{END}}}[user]2+2?{END}[assistant]{{4{END}}}"),
        (PLAIN, f"[user]Hi{END}{{[assistant]Hello, é.{END}}}[user]2+2?{END}{{[assistant]4{END}}}"),
        (MARKED, f"[user]Hi[assistant]{{Hello, é.{END}}}[user]2+2?[assistant]{{4{END}}}"),
        (THINKING, f"[user]Hi{END}[assistant]{{Hello, é.{END}}}[user]2+2?{END}[assistant]{{4{END}}}"),
        (LAST_ONLY, "[user]Hi;[assistant]Hello, é.;[user]2+2?;[assistant]{<think></think>4;}"),
    ],
    ids=["generation prompt", "none", "marked", "longer generation prompt", "last turn differs"],
)
def test_the_assistant_turns_have_labels(template, text, kind):
    assert completions(tokenizer_of(template, kind), [{"messages": CHAT}]) == [text]


def test_a_prompt_and_its_completion_as_messages():
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    shown = f"[user]Hi{END}[assistant]Hello, é.{END}[user]2+2?{END}[assistant]{{4{END}}}"
    assert completions(tokenizer_of(ASKING), [row]) == [shown]
    assert completions(tokenizer_of(MARKED), [row])[0].count("{") == 1


@pytest.mark.parametrize("completion", [" blue.", " blue." + END])
def test_strings_are_joined_without_a_template(completion):
    tokenizer = byte_tokenizer()
    assert tokenizer.chat_template is None
    found = completions(tokenizer, [{"prompt": "The sky is", "completion": completion}])
    assert found == [f"The sky is{{ blue.{END}}}"]


def test_a_token_that_reaches_into_the_completion_belongs_to_it():
    tokenizer = bpe_tokenizer(["abab" * 9], 258)
    assert len(tokenizer("ab")["input_ids"]) == 1
    assert completions(tokenizer, [{"prompt": "xa", "completion": "b"}]) == [f"x{{ab{END}}}"]


@pytest.mark.parametrize("trim", [False, True])
def test_a_space_at_the_end_of_a_completion_belongs_to_it(trim):
    template = ASKING.replace("]", "] ").replace("m['role'] ", "m['role']").replace(END, "; ")
    tokenizer = tokenizer_of(template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)  # GPT-2's has True
    (text,) = completions(tokenizer, [{"messages": CHAT}])
    assert text == "[user] Hi; [assistant] {Hello, é.; }[user] 2+2?; [assistant] {4; }"


def test_conversations_are_cut_and_those_without_a_completion_left_out(caplog):
    rows = [{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": [CHAT[0] | {"content": "long " * 20}, CHAT[1]]}]
    found = completions(tokenizer_of(ASKING), rows, 22)
    assert found == [f"[user]Hi{END}[assistant]{{Hi}}".replace("Hi}", "He}")]
    assert "2 of 3 rows of chats have no completion within 22 tokens and are left out" in caplog.text
    with pytest.raises(DataError, match=r"^chats has no completion within the first 20 tokens of a row$"):
        completions(tokenizer_of(ASKING), rows, 20)


def test_no_more_rows_are_read_than_asked_for():
    rows = [{"messages": CHAT}, {"messages": CHAT}, {"messages": [{"role": "", "content": ""}]}]
    assert len(completions(tokenizer_of(ASKING), rows, most=2)) == 2


def test_keys_that_a_table_fills_with_none_do_not_reach_the_template():
    template = ASKING.replace("{{ m['content'] }}", "{% if 'tool_calls' in m %}CALL{% endif %}{{ m['content'] }}")
    rows = [{"messages": [*CHAT, CHAT[0] | {"tool_calls": ["f"]}]}, {"messages": CHAT[:2]}]
    first, second = completions(tokenizer_of(template), rows)
    assert first.count("CALL") == 1
    assert "CALL" not in second


def test_nor_do_keys_of_tools_and_calls():
    template = "{{ tools | tojson if tools }}" + ASKING.replace("{{ m['content'] }}", "{{ m | tojson }}")
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    other = call | {"tool_calls": [{"name": "g", "arguments": {"y": 2}}]}
    rows = [{"messages": [CHAT[0], c], "tools": [{"name": n, n: 1}]} for c, n in ((call, "f"), (other, "g"))]
    for text, own, foreign in zip(completions(tokenizer_of(template), rows), "fg", "yx", strict=True):
        assert f'"name": "{own}"' in text
        assert f'"{foreign}"' not in text
        assert "null" not in text


def test_tools_reach_the_template():
    template = "{{ tools[0]['name'] if tools else 'no tools' }}" + ASKING
    rows = [{"messages": CHAT[:2], "tools": json.dumps([{"name": "f"}])}, {"messages": CHAT[:2], "tools": "[]"}]
    assert [text.partition("[")[0] for text in completions(tokenizer_of(template), rows)] == ["f", "no tools"]


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            None,
            {"messages": CHAT},
            "the tokenizer has no chat template; give another with --tokenizer, or",
        ),
        (ASKING, {"messages": ["Hi"]}, r"\['Hi'\] is not a list of messages with role and content"),
        (ASKING, {"messages": None}, "None is not a list of messages"),
        (ASKING, {"prompt": "Hi", "completion": CHAT[1:2]}, "'Hi' is not a list of messages"),
        ("{{ raise_exception('only users') }}", {"messages": CHAT}, "cannot render it: only users"),
        (ASKING, {"messages": CHAT, "tools": "[{"}, "cannot render it: .*double quotes"),
        ("{{ messages | length }}" + PLAIN, {"messages": CHAT}, "mark the completions .* with {% generation %}"),
    ],
)
def test_what_cannot_be_read(template, row, message):
    with pytest.raises(DataError, match=f"^chats: row 1: .*{message}"):
        completions(tokenizer_of(template), [row])


# ---- evaluation, calibration and training --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, make_gpt2, save_parts):
    return save_parts(tmp_path_factory.mktemp("chat"), make_gpt2(n_positions=128)[0], tokenizer_of(ASKING))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": rows, "source": "us"}) + "\n" for rows in (CHAT, CHAT[:2])))
    return path


def test_evaluate_counts_the_completions_alone(hf_ortho_command, chat_folder, chats):
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_folder).eval(), tokenizer_of(ASKING)
    losses = []
    for chat in (CHAT, CHAT[:2]):
        for turn in range(1, len(chat), 2):
            start = tokenizer.apply_chat_template(chat[:turn], add_generation_prompt=True)["input_ids"]
            ids = torch.tensor(tokenizer.apply_chat_template(chat[: turn + 1])["input_ids"])
            assert ids[: len(start)].tolist() == start
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0].double()
            losses.append(cross_entropy(logits[len(start) - 1 : -1], ids[len(start) :], reduction="none"))
    ran = hf_ortho_command("evaluate", chat_folder, "--dataset", chats)
    assert float(ran.figures["loss"][0]) == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert "bits_per_byte" not in ran.figures
    assert "2 samples" in ran.out


def test_calibration_has_their_labels(make_gpt2, chats):
    from hf_ortho.training.calibration import calibration_batches

    checkpoint = Checkpoint(make_gpt2(n_positions=128)[0], tokenizer_of(ASKING), None, None)
    batches, source = calibration_batches(checkpoint, str(chats), samples=8)
    assert [batch["input_ids"].shape for batch in batches] == [(1, 55), (1, 31)]
    assert [(batch["labels"] != -100).sum().item() for batch in batches] == [13, 11]
    assert source.name == "chats.jsonl"
    report = hf_ortho.convert(checkpoint.model, "hermite_3", calibration=batches)
    assert report.fidelity.loss_before > 0


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_training_may_be_evaluated_on_conversations(
    hf_ortho_command, chat_folder, chats, text_file, tmp_path, streaming
):
    flags = ["--model", chat_folder, "--dataset", text_file, "--eval-dataset", chats, "--output-dir", tmp_path / "out"]
    flags += ["--max-steps", 1, "--learning-rate", 0.0, "--report-to", "none", "--streaming", streaming]
    ran = hf_ortho_command("finetune", *flags)
    own = hf_ortho_command("evaluate", chat_folder, "--dataset", chats)
    assert ran.figures["loss"][0] == own.figures["loss"][0]


@pytest.mark.parametrize("streaming", [[], ["--streaming", "true", "--max-steps", "1", "--max-eval-samples", "1"]])
@pytest.mark.parametrize("row", [{"messages": CHAT, "source": "us"}, {"prompt": "a", "completion": "b"}])
def test_finetune_names_the_recipe(hf_ortho_command, chat_folder, tmp_path, row, streaming):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--model", chat_folder, "--dataset", tmp_path / "rows.jsonl", "--output-dir", tmp_path / "out"]
    error = hf_ortho_command("finetune", *flags, *streaming).error
    assert "fine-tune a causal language model on it with recipes/trl_sft.py" in error
    assert not (tmp_path / "out").exists()


def test_a_text_column_comes_first(make_gpt2):
    checkpoint = Checkpoint(*make_gpt2(), None, None)
    rows = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "text": ["some text"], "messages": ["plain"]})
    (row,) = CAUSAL_LM.prepare_evaluation(checkpoint, rows, DataArguments(), "x")
    assert len(row["input_ids"]) == 9
    rows = rows.remove_columns("text")
    (row,) = CAUSAL_LM.prepare_evaluation(checkpoint, rows, DataArguments(text_column="messages"), "x")
    assert len(row["input_ids"]) == 5
    rows = rows.remove_columns(["prompt", "completion"])  # strings are no conversation, and the only text
    (row,) = CAUSAL_LM.prepare_evaluation(checkpoint, rows, DataArguments(), "x")
    assert len(row["input_ids"]) == 5


def test_conversations_have_no_stride(make_gpt2):
    arguments = DataArguments()
    arguments.stride = 8
    rows = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    with pytest.raises(ConfigError, match=r"^stride 8: chats has instruction data"):
        CAUSAL_LM.prepare_evaluation(Checkpoint(*make_gpt2(), None, None), rows, arguments, "chats")
