"""Load folders with the model classes of vLLM, without an engine: python load_in_vllm.py FOLDER...

Prints one JSON object per folder: the class and the coefficients of each activation, or the error.
"""

import json
import os
import sys

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR")

import torch

from hf_ortho.activations import LearnableActivation


def start(store: str) -> None:
    """The groups of processes that layers ask for, here of one."""
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state

    if not torch.distributed.is_initialized():
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
    parallel_state.destroy_model_parallel()  # mixtures of experts need another group
    initialize_model_parallel(1, 1)


def load(folder: str) -> dict:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    options = {"dtype": "bfloat16", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 64}
    config = EngineArgs(model=folder, **options).create_engine_config()
    with set_current_vllm_config(config):
        start(f"{folder}.store")
        model = get_model(vllm_config=config)
    found = [module.coefficients for module in model.modules() if isinstance(module, LearnableActivation)]
    assert {coefficients.dtype for coefficients in found} == {torch.float32}
    return {"class": type(model).__name__, "coefficients": [coefficients.tolist() for coefficients in found]}


if __name__ == "__main__":
    torch.accelerator.empty_cache = lambda: None  # of a machine without one
    for folder in sys.argv[1:]:
        try:
            outcome = load(folder)
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
        print("\n" + json.dumps({"folder": folder} | outcome), flush=True)
