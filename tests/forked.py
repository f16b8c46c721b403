"""Runs a script in processes of one distributed job, forked from one that has imported what such scripts need."""

import gc
import json
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


def run(processes: int, script, argv, environment, folder) -> str:
    """What all processes print with ``sys.argv = [script, *argv]``; all must end with exit code 0."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    job |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = []
    for rank in range(processes):
        variables = environment | ((job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) if processes > 1 else {})
        arguments = str(script), [str(part) for part in argv], variables, str(folder / f"{rank}.txt")
        ranks.append(context.Process(target=_run, args=arguments))
        ranks[-1].start()
    running = set(ranks)
    while running:
        multiprocessing.connection.wait([process.sentinel for process in running])
        ended = {process for process in running if not process.is_alive()}
        running -= ended
        if any(process.exitcode for process in ended):
            for process in running:  # they would wait for it
                process.kill()
    printed = "".join((folder / f"{rank}.txt").read_text() for rank in range(processes))
    assert [process.exitcode for process in ranks] == [0] * processes, printed
    return printed


def by_rank(printed: str) -> list:
    """The JSON that each rank prints after ``FOUND`` and its number, in the order of the ranks."""
    lines = [line.split(maxsplit=2) for line in printed.splitlines() if line.startswith("FOUND")]
    return [json.loads(line) for _, _, line in sorted(lines)]


def _run(script, argv, environment, output):
    gc.freeze()
    os.environ |= environment
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = [script, *argv]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()
