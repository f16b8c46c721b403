"""Runs a script in two processes of one distributed job, forked from one that has imported what such scripts need."""

import gc
import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import sys

PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "hf_ortho.training",
    "hf_ortho.training.finetune",
    "hf_ortho.cli.finetune",
    "hf_ortho.peft",
]


def run(script, argv, environment, folder) -> str:
    """What both processes print with ``sys.argv = [script, *argv]``; both must end with exit code 0."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    files = [folder / f"rank-{rank}.txt" for rank in range(2)]
    processes = []
    for rank, file in enumerate(files):
        variables = environment | job | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        processes.append(context.Process(target=_rank, args=(str(script), [str(a) for a in argv], variables, str(file))))
        processes[-1].start()
    running = list(processes)
    while running:
        multiprocessing.connection.wait([p.sentinel for p in running])
        for process in [p for p in running if not p.is_alive()]:
            running.remove(process)
            if process.exitcode:  # the other would wait for it
                for other in running:
                    other.kill()
    printed = "".join(file.read_text() for file in files)
    assert [p.exitcode for p in processes] == [0, 0], printed
    return printed


def _rank(script, argv, environment, output):
    gc.freeze()
    os.environ |= environment
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = [script, *argv]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()
