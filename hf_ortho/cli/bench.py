"""``hf-ortho bench``: benchmark the activations against fixed activations, standalone and in models."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..benchmark import TOLERANCE
from ..errors import ConfigError
from ..files import check_file, written
from .console import Parser, console, table
from .env import environment, show_environment

if TYPE_CHECKING:
    from ..benchmark import BenchResults, Settings


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho bench",
        description="Measure time and memory of the activations against fixed activations, standalone and in models.",
    )
    p.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="cpu (one thread, float32) or cuda (bfloat16)."
    )
    p.add_argument("--json", metavar="FILE", help="Write all results, the settings and the environment to a JSON file.")
    p.add_argument("--plot", metavar="FILE.png", help="Plot the ratios, and the curves over elements and degree.")
    p.add_argument(
        "--check",
        action="store_true",
        help=f"Exit with code 1 if a target is missed by more than {TOLERANCE:.0%}%, or not run.",
    )
    p.add_argument(
        "--quick", action="store_true", help="Smoke test: small tensors, few rounds; timings are meaningless."
    )
    return p


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.check and args.quick:
        raise ConfigError("--check cannot be combined with --quick: the targets are for the full sizes")
    if args.plot and Path(args.plot).suffix != ".png":
        raise ConfigError(f"--plot {args.plot}: must end in .png")
    if args.json and args.plot and Path(args.json).absolute() == Path(args.plot).absolute():
        raise ConfigError(f"--json and --plot {args.plot}: use two different files")
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        if path:
            check_file(path, flag)

    import torch

    from ..benchmark import FULL, QUICK, TARGETS, check, plot_results, report

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use --device cpu")
    settings = (QUICK if args.quick else FULL).on(args.device)
    start = time.perf_counter()
    with one_thread(args.device):
        machine = environment()
        show_environment(machine)
        console.print(report.explanation(settings))
        results = measure(settings)
    if args.json:
        content = {"environment": machine, "settings": settings.to_dict(), **dataclasses.asdict(results)}
        with written(args.json) as draft:
            draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        console.print(f"Wrote {args.json}")
    if args.plot:
        plot_results(results, settings, [] if args.quick else TARGETS, args.plot)
        console.print(f"Wrote {args.plot}")
    outcomes = [] if args.quick else check(results, args.device)
    if outcomes:
        table(*report.targets_table(outcomes))
    console.print(f"Done in {time.perf_counter() - start:.0f} s")
    if not args.check:
        return 0
    missed = [outcome for outcome in outcomes if outcome.fails]
    for outcome in missed:
        console.print(f"missed: {report.sentence(outcome)}")
    console.print(f"{len(missed)} of {len(outcomes)} targets are missed by more than {TOLERANCE:.0%} or not run")
    return 1 if missed else 0


@contextlib.contextmanager
def one_thread(device: str) -> Iterator[None]:
    """Within the block, use one torch thread on the CPU."""
    import torch

    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(settings: Settings) -> BenchResults:
    """Run all cases, and print each result when it is done."""
    from ..benchmark import SECTIONS, BenchResults, report

    results = BenchResults()
    for case, section in SECTIONS.items():
        with console.status(f"Measuring {case}"):
            section(results, settings)
        table(*report.case_table(results, case, settings))
        for line in report.not_run(results, case):
            console.print(line)
        if results.find(case, "copy", "forward"):
            console.print(f"copy: {report.bandwidth(results, case, settings) / 1e9:.3g} GB/s, read and written")
    return results
