"""Offline, quiet, one thread, and the tiny checkpoints that several folders share."""

import atexit
import contextlib
import dataclasses
import gc
import io
import os
import shutil
import signal
import tempfile

import pytest

# The libraries read these once, when they are imported.
HOME = tempfile.mkdtemp(prefix="hf_ortho_tests.")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
os.environ |= {
    "HF_HOME": HOME,
    "HF_DATASETS_CACHE": os.path.join(HOME, "datasets"),
    "TORCHINDUCTOR_CACHE_DIR": os.path.join(HOME, "inductor"),  # its cache mixes up the values of ATEN_CPU_CAPABILITY
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "80",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",  # otherwise DeepSpeed prints what it finds
}


def pytest_configure(config):
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.PreTrainedModel
    if not hasattr(model, "activation_checkpointing_enable"):  # the older name, of transformers 5.20 for example
        model.activation_checkpointing_enable = model.gradient_checkpointing_enable
        model.activation_checkpointing_disable = model.gradient_checkpointing_disable
        model.is_activation_checkpointing = model.is_gradient_checkpointing


def pytest_runtest_setup():
    """Set aside what lives: the full collection that every training asks for would visit all that is imported."""
    gc.collect()
    gc.freeze()


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a command gave: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence of a command that refused; fails if it did not, or said more than that."""
        assert self.code == 2, f"exit code {self.code}\n{self.out}{self.err}"
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("hf-ortho: error: ")
        return lines[0].removeprefix("hf-ortho: error: ")

    @property
    def figures(self) -> dict[str, list[str]]:
        """The cells of every printed table row, by the row's first cell; the last table wins."""
        assert self.code == 0, self.err
        rows = (line.split() for line in self.out.splitlines() if line.startswith(" "))
        return {cells[0]: cells[1:] for cells in rows if len(cells) > 1}


@pytest.fixture(scope="session")
def hf_ortho_command():
    """``hf_ortho_command("evaluate", "folder")`` runs the command in this process."""
    from hf_ortho.cli import main

    def run(*argv) -> Ran:
        out, err = io.StringIO(), io.StringIO()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main([str(a) for a in argv])
        finally:
            signal.signal(signal.SIGTERM, handler)
        return Ran(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """``forked(2, script, "argument")``: what a script prints in two processes of one job, which must end well."""
    from forked import run

    return lambda processes, script, *argv, **environment: run(
        processes, script, argv, environment, tmp_path_factory.mktemp("printed")
    )


@pytest.fixture
def randomized():
    """Factory of float64 modules with random parameters, so that no two tropical lines tie."""

    import torch

    from hf_ortho.activations import build

    def make(name, domain=None, spread=0.3):
        module = build(name).double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in module.parameters():
                if value.requires_grad:
                    value += spread * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            if domain is not None:
                module.domain.copy_(torch.tensor(domain, dtype=torch.float64))
                module.tail_slopes.copy_(torch.tensor((0.3, 1.2), dtype=torch.float64))
        return module

    return make


@pytest.fixture(scope="session")
def make_gpt2():
    """``make_gpt2(n_layer=1)``: a seeded byte-level GPT-2 with a context of 32, and its tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from hf_ortho.tasks.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    defaults = {"vocab_size": len(tokenizer), "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    defaults |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}

    def make(**options):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**(defaults | options))), tokenizer

    return make


@pytest.fixture(scope="session")
def make_convnext():
    """``make_convnext(10)``: a seeded ConvNeXt of ten classes for 16 x 16 images, and its processor."""
    import torch
    from transformers import ConvNextConfig, ConvNextForImageClassification, ConvNextImageProcessorPil

    processor = ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=1.0)

    def make(names=tuple("0123456789")):
        config = ConvNextConfig(
            num_stages=2,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            image_size=16,
            layer_scale_init_value=0.1,
            initializer_range=0.5,  # logits far enough apart that no rank is an accident of rounding
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
        torch.manual_seed(0)
        return ConvNextForImageClassification(config), processor

    return make


@pytest.fixture(scope="session")
def save_parts():
    """``save_parts(folder, model, processor)`` saves both and returns the folder."""

    def save(folder, *parts):
        for part in parts:
            part.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory, make_gpt2, save_parts):
    """A saved byte-level GPT-2, not converted."""
    return save_parts(tmp_path_factory.mktemp("gpt2"), *make_gpt2())


@pytest.fixture(scope="session")
def convnext_folder(tmp_path_factory, make_convnext, save_parts):
    """A saved ConvNeXt of ten classes, not converted."""
    return save_parts(tmp_path_factory.mktemp("convnext"), *make_convnext())


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """About 3,000 bytes of text with line breaks, as .txt."""
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    lines = [" ".join(words[i * k % 7] for k in range(1, 8)) for i in range(1, 90)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(lines))
    return path
