"""Run commands in forked processes that kill themselves at a chosen call: ``python killable.py runs.json``.

A run holds the arguments of ``run``; the exit statuses of all are printed as JSON. The first is not forked, so that all
is imported once, before the forks.
"""

import functools
import gc
import json
import os
import pkgutil
import signal
import sys


def kill_at(target, call, how):
    """Kill this process at the ``call``-th call of ``target``, whose first argument but self is a path.

    ``how``: ``before`` the call; ``half``: with half of the file written; ``term``: with SIGTERM, before the call;
    ``nan``: not at all, but this and all later results are nan; another word: instead of a deletion, with only the file
    of that name deleted.
    """
    place, _, name = target.rpartition("." if "." in target.partition(":")[2] else ":")
    owner = pkgutil.resolve_name(place)
    original, count = getattr(owner, name), 0

    @functools.wraps(original)
    def killing(*args, **kwargs):
        nonlocal count
        deletes = how not in ("before", "half", "term", "nan")
        count += not deletes or os.path.isdir(args[0])
        if count < call:
            return original(*args, **kwargs)
        if how == "nan":
            return original(*args, **kwargs) * float("nan")
        if how == "half":
            original(*args, **kwargs)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        elif deletes:
            os.remove(os.path.join(args[0], how))
        os.kill(os.getpid(), signal.SIGTERM if how == "term" else signal.SIGKILL)

    setattr(owner, name, killing)


def run(flags, kill=None, ranks=1, killed_rank=0):
    """The exit statuses of the ranks; when one is killed, so are the others."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            if kill and rank == killed_rank:
                kill_at(*kill)
            os._exit(main(["finetune", *flags]))
        children.append(child)
    statuses = {}
    while len(statuses) < ranks:
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        if statuses[child] < 0:
            for other in set(children) - set(statuses):
                os.kill(other, signal.SIGKILL)
    return [statuses[child] for child in children]


if __name__ == "__main__":
    import torch

    import hf_ortho.plotting
    from hf_ortho.cli import main

    torch.set_num_threads(1)
    hf_ortho.plotting.plot_stored = lambda stored, path, name: path.write_bytes(b"png")  # as conftest.py
    with open(sys.argv[1]) as file:
        runs = json.load(file)
    first = main(["finetune", *runs[0]["flags"]])
    gc.freeze()  # what a training collects is not what is imported
    print(json.dumps([[first], *(run(**options) for options in runs[1:])]))
