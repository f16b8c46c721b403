"""Fine-tune on instruction data with TRL's SFTTrainer; the loss is on the completions only.

    pip install 'hf-ortho[trl]'
    python recipes/trl_sft.py smollm2-hermite out --data chats.jsonl --train activations   # a converted model; or all
    python recipes/trl_sft.py smollm2 out --data chats.jsonl --train adapter   # OrthoConfig, a model as it is

The data has the columns ``messages``, or ``prompt`` and ``completion`` (strings or messages), as in TRL. Of messages,
the assistant turns count if the chat template marks them ({% generation %}), else the last one alone. Afterward,
``hf-ortho evaluate out --dataset chats.jsonl`` measures the completions, of the model or of the adapter.

Expected hardware: any. Status: run for 2 steps by the tests; no results.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hf_ortho
from hf_ortho.peft import OrthoConfig
from hf_ortho.tasks import data
from hf_ortho.tasks.conversations import MARKS
from hf_ortho.training import set_trainable

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("model", help="Folder or Hub model with a chat template; converted, unless --train adapter.")
p.add_argument("output", help="Output folder of the trained model or adapter.")
p.add_argument("--data", required=True, help="File, folder or Hub dataset.")
p.add_argument("--split", help="Split to train on. Default: train, else the first.")
p.add_argument("--train", default="all", choices=("all", "activations", "adapter"))
p.add_argument("--activation", default="hermite_8", help="Activation of the adapter.")
p.add_argument("--max_length", type=int, default=1024)
p.add_argument("--batch_size", type=int, default=8)
p.add_argument("--steps", type=int, default=100)
p.add_argument("--lr", type=float, default=2e-5)
p.add_argument("--activation_lr", type=float, default=1e-3)
args = p.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model)
tokenizer = AutoTokenizer.from_pretrained(args.model)
splits = data.load(args.data)
rows = splits[data.pick(splits, args.split, data.TRAIN, args.data)]
marked = "messages" in rows.column_names and MARKS.search(str(tokenizer.chat_template)) is not None
if "messages" in rows.column_names and not marked:

    def last_turn(row):
        turns = [i for i, message in enumerate(row["messages"]) if i and message["role"] == "assistant"]
        last = turns[-1] if turns else len(row["messages"])
        return {"prompt": row["messages"][:last], "completion": row["messages"][last : last + 1]}

    rows = rows.map(last_turn, remove_columns=[name for name in rows.column_names if name != "tools"])
    rows = rows.filter(lambda row: row["completion"])
if args.train == "adapter":
    adapter = OrthoConfig(activation=args.activation, task_type="CAUSAL_LM")
else:
    adapter = None
    set_trainable(model, args.train)

config = SFTConfig(
    args.output,
    max_length=args.max_length,
    per_device_train_batch_size=args.batch_size,
    max_steps=args.steps,
    assistant_only_loss=marked,  # TRL otherwise takes the loss on the completions alone
    bf16=torch.cuda.is_available(),
    logging_steps=10,
    save_strategy="no",
    report_to="none",
)
trainer = SFTTrainer(
    model,
    config,
    train_dataset=rows,
    processing_class=tokenizer,
    peft_config=adapter,
    # The activations get a learning rate of their own and, unlike the matrices, no weight decay.
    optimizer_cls_and_kwargs=hf_ortho.optimizer_cls_and_kwargs(
        lr=args.lr, weight_decay=0.01, activation_lr=args.activation_lr
    ),
)
trainer.train()
trainer.save_model()
