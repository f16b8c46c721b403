"""``python -m tests.architectures [MODEL_TYPE ...] [--jobs N]``: one line per model type, then the counts."""

from __future__ import annotations

import argparse
import collections
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from transformers import CONFIG_MAPPING

from .check import REFUSED, WRONG, Result, check_apart

CLASSES = {
    "looked up inside forward": "inside forward|reads the name|by name",
    "no driving field": "no field names|creates no module|not kept as a module",
    "shared instance": "share one instance",
    "config validation": "with another name",
    "module without use": "no method uses",
    "function without straight asymptotes": "asymptotic slope",
}


def heading(result: Result) -> str:
    """The line of the summary that a result belongs to."""
    if result.outcome != REFUSED:
        return result.outcome
    return f"{REFUSED}: " + next((name for name, text in CLASSES.items() if re.search(text, result.detail)), "other")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="all of transformers by default")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args(argv)
    known = list(CONFIG_MAPPING.keys())
    if unknown := set(args.model_types) - set(known):
        parser.error(f"transformers has no model type {', '.join(sorted(unknown))}")

    start = time.perf_counter()
    counts: collections.Counter[str] = collections.Counter()
    print("| model type | class | sites | result |\n|---|---|---|---|")
    with ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(check_apart, args.model_types or known):
            counts[heading(result)] += 1
            note = f": {result.detail}" if result.detail else ""
            print(f"| {result.model_type} | {result.cls} | {result.sites or ''} | {result.outcome}{note} |", flush=True)
    print()
    for name, count in counts.most_common():
        print(f"{count:5d}  {name}")
    print(f"{sum(counts.values()):5d}  model types in {time.perf_counter() - start:.0f} s")
    return 1 if counts[WRONG] else 0


if __name__ == "__main__":
    sys.exit(main())
