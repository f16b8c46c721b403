"""Convert a language model and fine-tune it in a plain Accelerate loop; offline by default.

    python recipes/accelerate_loop.py demo-text out --data pydoc_topics --steps 200
    torchrun --nproc-per-node 2 recipes/accelerate_loop.py openai-community/gpt2 out --data my_text.txt

Expected hardware: any. Status: run for 2 steps by the tests; no results.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import hf_ortho
from hf_ortho.tasks import data

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("model", help="Folder or Hub model.")
p.add_argument("output", help="Output folder of the trained model.")
p.add_argument("--activation", default="hermite_8")
p.add_argument("--data", default="pydoc_topics")
p.add_argument("--block_size", type=int, default=32)
p.add_argument("--batch_size", type=int, default=8)
p.add_argument("--steps", type=int, default=100)
p.add_argument("--lr", type=float, default=1e-4)
p.add_argument("--activation_lr", type=float, default=1e-3)
p.add_argument("--cpu", action="store_true")
args = p.parse_args()

set_seed(0)
accelerator = Accelerator(cpu=args.cpu)
model = AutoModelForCausalLM.from_pretrained(args.model)
tokenizer = AutoTokenizer.from_pretrained(args.model)
blocks = data.text_blocks(data.load(args.data)["train"], tokenizer, args.block_size)
batches = DataLoader(blocks, args.batch_size, shuffle=True, drop_last=True)

calibration = [{"input_ids": blocks[i]["input_ids"][None], "labels": blocks[i]["labels"][None]} for i in range(8)]
accelerator.print(hf_ortho.convert(model, args.activation, calibration=calibration))
hf_ortho.DomainPenalty(model, weight=0.01)  # keeps pre-activations in the domain of the conversion

groups = hf_ortho.param_groups(model, lr=args.lr, weight_decay=0.1, activation_lr=args.activation_lr)
optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=args.steps)
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

model.train()
step = 0
while step < args.steps:
    for batch in batches:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0 or step == args.steps:
            accelerator.print(f"step {step} loss {accelerator.reduce(loss.detach(), 'mean').item():.4f}")
        if step == args.steps:
            break

accelerator.unwrap_model(model).save_pretrained(
    args.output,
    is_main_process=accelerator.is_main_process,
    state_dict=accelerator.get_state_dict(model),
)
if accelerator.is_main_process:
    tokenizer.save_pretrained(args.output)
accelerator.end_training()
