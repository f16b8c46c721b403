"""The recipe for TRL, run on a tiny chat model: its labels, its optimizer, and what reloads."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

import hf_ortho
from hf_ortho.activations import LearnableActivation
from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.tasks.conversations import conversations
from hf_ortho.training import activation_parameters

SCRIPT = Path(__file__).parents[2] / "recipes" / "trl_sft.py"
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|endoftext|>{% endgeneration %}{% else %}{{ m['content'] }}<|endoftext|>{% endif %}{% endfor %}"
)
TURNS = [("user", "Hi"), ("assistant", "Hello."), ("user", "2+2?"), ("assistant", "4")]
CHAT = [{"role": role, "content": content} for role, content in TURNS]
ROWS = {
    "messages": [{"messages": CHAT, "source": "us"}, {"messages": CHAT[:2], "source": "us"}],
    "prompts": [
        {"prompt": CHAT[:3], "completion": CHAT[3:]},
        {"prompt": CHAT[:1], "completion": CHAT[1:2]},
    ],
    "strings": [{"prompt": "2+2=", "completion": "4"}, {"prompt": "Hi", "completion": ", hello"}],
}

pytest.importorskip("trl")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*(gradient_checkpointing|is_gradient_checkpointing).*:FutureWarning"),  # TRL's
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its device for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def sft(make_gpt2, tmp_path, monkeypatch):
    """Run the recipe on a model, of a family by name or unchanged, and on rows; the names that it defines."""

    def run(activation, rows, *flags, template=TEMPLATE):
        model, tokenizer = make_gpt2(n_positions=128, initializer_range=0.2)
        tokenizer.chat_template = template
        if activation:
            hf_ortho.convert(model, activation)
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / "model")
        tokenizer.chat_template = None  # it is that of all tests
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        argv = [tmp_path / "model", tmp_path / "out", "--data", tmp_path / "rows.jsonl", "--steps", 2, *flags]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
        return runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def reloaded(folder):
    """The state of what ``load_checkpoint`` gives, an adapter merged."""
    return load_checkpoint(str(folder)).model.state_dict()


@pytest.mark.parametrize("train", ["all", "activations"])
def test_a_converted_model(sft, tmp_path, train):
    trainer = sft("hermite_3", ROWS["messages"], "--train", train)["trainer"]
    groups = [(g["initial_lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups]
    assert groups == ([(2e-5, 0.01), (2e-5, 0.0)] if train == "all" else []) + [(1e-3, 0.0)]
    start, end = reloaded(tmp_path / "model"), reloaded(tmp_path / "out")
    assert all(torch.equal(end[key], value) for key, value in trainer.model.state_dict().items())
    moved = {key for key in start if not torch.equal(start[key], end[key])}
    learned = {key for key in activation_parameters(trainer.model) if key.endswith("coefficients")}
    assert learned == moved if train == "activations" else learned < moved
    assert sum(
        isinstance(m, LearnableActivation) for m in AutoModelForCausalLM.from_pretrained(tmp_path / "out").modules()
    )


def test_an_adapter(sft, tmp_path):
    trainer = sft(None, ROWS["messages"], "--train", "adapter", "--activation", "hermite_3")["trainer"]
    assert [(g["initial_lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups] == [(1e-3, 0.0)]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        before = base(input_ids=ids).logits
        again = PeftModel.from_pretrained(base, tmp_path / "out")(input_ids=ids).logits
        merged = load_checkpoint(str(tmp_path / "out")).model.eval()(input_ids=ids).logits
    assert torch.equal(again, expected)
    assert torch.equal(merged, expected)
    assert not torch.allclose(before, expected, atol=1e-4)


def test_messages_without_marks_end_with_their_last_answer(sft):
    thanks = {"role": "user", "content": "Thanks"}
    tools = [{"name": "add"}]
    rows = [{"messages": [*CHAT, thanks], "tools": tools}, {"messages": CHAT[:1], "tools": tools}]
    template = "{{ tools[0]['name'] }}" + TEMPLATE
    names = sft("hermite_3", rows, template=template)
    (row,) = names["trainer"].train_dataset
    tokenizer = names["tokenizer"]
    expected = "add[user]Hi<|endoftext|>[assistant]Hello.<|endoftext|>[user]2+2?<|endoftext|>[assistant]4<|endoftext|>"
    assert tokenizer.decode(row["input_ids"]) == expected
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "4<|endoftext|>"


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["not marked", "marked"])
def test_the_loss_is_on_what_evaluate_counts(sft, kind, template):
    """The labels of TRL are those of ``conversations``; of messages without marks, the last turn alone is trained."""
    names = sft("hermite_3", ROWS[kind], template=template)
    rows = ROWS[kind]
    if kind == "messages" and template == TEMPLATE:
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    tokenizer = names["tokenizer"]
    ours = conversations(Dataset.from_list(rows), tokenizer, 128, "rows")
    theirs = names["trainer"].train_dataset
    assert [row["input_ids"].tolist() for row in ours] == theirs["input_ids"][:]
    assert [row["labels"].tolist() for row in ours] == theirs["labels"][:]
    shown = tokenizer.decode([label for label in theirs["labels"][0] if label != -100])
    expected = {"messages": "Hello.<|endoftext|>4<|endoftext|>"} if template == MARKED else {}
    assert shown.removeprefix("[assistant]") == expected.get(kind, "4<|endoftext|>")
    assert 0 < names["trainer"].state.log_history[-1]["train_loss"] < 20
