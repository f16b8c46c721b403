"""Train a converted sentence-transformers model on pairs of texts that belong together.

    pip install 'hf-ortho[sentence-transformers]'
    hf-ortho convert all-MiniLM-L6-v2 -o minilm-hermite --calibration-data my_text.txt
    python recipes/sentence_transformers_train.py minilm-hermite out --data pairs.jsonl --train activations

The data has two columns of texts, in this order: anchor and positive, such as a question and its answer. Of documents
in a column ``text``, each paragraph and the next are a pair. Reported: in how many held-out pairs the positive is the
nearest of all positives to its anchor, before and after.

Expected hardware: any. Status: run by the tests, and measured: recipes/inference.md.
"""

import argparse
import itertools
import re
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from hf_ortho.hub.record import carry_over
from hf_ortho.tasks import data
from hf_ortho.training import activation_parameters, set_trainable

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("model", help="Folder or Hub model of sentence-transformers, converted or not.")
p.add_argument("output", help="Output folder.")
p.add_argument("--data", required=True, help="File, folder or Hub dataset, with a split to hold out.")
p.add_argument("--train", default="all", choices=("all", "activations"))
p.add_argument("--max_length", type=int, help="Tokens of a text. Default: as the model has it.")
p.add_argument("--batch_size", type=int, default=16)
p.add_argument("--steps", type=int, default=100)
p.add_argument("--lr", type=float, default=2e-5)
p.add_argument("--activation_lr", type=float, default=1e-3)
p.add_argument("--eval_pairs", type=int, default=500)
p.add_argument("--seed", type=int, default=0)
args = p.parse_args()


def pairs(rows):
    if "text" in rows.column_names:
        documents = ([part.strip() for part in text.split("\n\n") if part.strip()] for text in rows["text"])
        found = [pair for parts in documents for pair in itertools.pairwise(parts)]
        rows = Dataset.from_dict({"anchor": [a for a, _ in found], "positive": [b for _, b in found]})
    return rows.shuffle(seed=args.seed)


train, held_out = data.split(data.load(args.data), None, None, args.data)
if held_out is None:
    train, held_out = train.train_test_split(0.1, seed=args.seed).values()
train, held_out = pairs(train), pairs(held_out)
held_out = held_out.select(range(min(args.eval_pairs, len(held_out))))
anchors, positives = ({str(i): text for i, text in enumerate(held_out[name])} for name in held_out.column_names[:2])
evaluator = InformationRetrievalEvaluator(anchors, positives, {i: {i} for i in anchors}, name="held-out")

model = SentenceTransformer(args.model)
model.max_seq_length = args.max_length or model.max_seq_length
set_trainable(model, args.train)
learned = [name for name in activation_parameters(model) if model.get_parameter(name).requires_grad]
config = SentenceTransformerTrainingArguments(
    args.output,
    per_device_train_batch_size=args.batch_size,
    max_steps=args.steps,
    learning_rate=args.lr,
    weight_decay=0.01,  # not of the activations
    learning_rate_mapping={"|".join(map(re.escape, learned)): args.activation_lr} if learned else {},
    bf16=torch.cuda.is_available(),
    seed=args.seed,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
)
loss = MultipleNegativesRankingLoss(model)
trainer = SentenceTransformerTrainer(model, config, train_dataset=train, loss=loss)
before = evaluator(model)
trainer.train()
after = evaluator(model)
for name in ("accuracy@1", "mrr@10"):
    name = f"held-out_cosine_{name}"
    print(f"{name}: {before[name]:.4f} before, {after[name]:.4f} after training")
trainer.save_model()
carry_over(args.model, None, Path(args.output))  # conversion.json, for hf-ortho plot and the record
