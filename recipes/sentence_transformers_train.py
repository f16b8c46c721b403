"""Train a converted sentence-transformers model on pairs of texts that belong together.

    pip install 'hf-ortho[sentence-transformers]'
    hf-ortho convert all-MiniLM-L6-v2 -o minilm-hermite --calibration-data my_text.txt
    python recipes/sentence_transformers_train.py minilm-hermite pairs.jsonl --output_dir out --max_steps 100

Each line of the data has two texts, such as a question and its answer: {"anchor": "...", "positive": "..."}. A tenth of
the pairs is held out; the loss on it is printed before and after. Other flags: SentenceTransformerTrainingArguments.

Expected hardware: any. Status: run by the tests, and measured: recipes/sentence_transformers.md.
"""

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import HfArgumentParser

from hf_ortho.training import set_trainable

parser = HfArgumentParser(SentenceTransformerTrainingArguments)
parser.add_argument("model", help="Folder or Hub model of sentence-transformers.")
parser.add_argument("data", help="JSON Lines file, with two texts in each line.")
parser.add_argument("--train", default="all", choices=("all", "activations"))
args, own = parser.parse_args_into_dataclasses()

pairs = load_dataset("json", data_files=own.data, split="train").train_test_split(0.1, seed=args.seed)
model = SentenceTransformer(own.model)
set_trainable(model, own.train)
loss = MultipleNegativesRankingLoss(model)
trainer = SentenceTransformerTrainer(model, args, train_dataset=pairs["train"], eval_dataset=pairs["test"], loss=loss)
trainer.evaluate()
trainer.train()
trainer.evaluate()
trainer.save_model()
