"""``hf-ortho bench``: benchmark the activations against fixed activations, standalone and in models."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..benchmark import TOLERANCE
from ..errors import ConfigError
from ..files import check_file, explain, written
from .console import Parser, console, table
from .env import environment
from .progress import announce_libraries, stage

if TYPE_CHECKING:
    from ..benchmark import BenchResults, Section, Settings


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho bench",
        description="Measure time and memory of the activations against fixed activations, standalone and in models. "
        "Example: hf-ortho bench --budget 60",
    )
    p.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="cpu (one thread, float32) or cuda (bfloat16)."
    )
    p.add_argument(
        "--sections",
        nargs="+",
        metavar="NAME",
        help="Sections to run. On both devices: sequence, decode, elements, image, degree, groups, generation, "
        "convnext, libraries, vllm; on cpu also gpt2; on cuda also gpt2_eager, gpt2_compiled. Default: all.",
    )
    p.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="Leave out the least important sections if they are expected to take longer together.",
    )
    p.add_argument(
        "-o",
        "--output",
        "--json",
        dest="json",
        metavar="FILE",
        help="Write all results, the settings, the command and the environment to a JSON file, after each section.",
    )
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
    if args.budget is not None and args.quick:
        raise ConfigError("--budget cannot be combined with --quick: the durations are for the full sizes")
    if args.budget is not None and not args.budget > 0:
        raise ConfigError(f"--budget {args.budget:g}: must be a positive number of seconds")
    if args.plot and Path(args.plot).suffix != ".png":
        raise ConfigError(f"--plot {args.plot}: must end in .png")
    if args.json and args.plot and Path(args.json).absolute() == Path(args.plot).absolute():
        raise ConfigError(f"--output and --plot {args.plot}: use two different files")
    for flag, path in (("--output", args.json), ("--plot", args.plot)):
        if path:
            check_file(path, flag)

    announce_libraries()
    import torch

    from ..benchmark import FULL, QUICK, TARGETS, check, plot_results, report, within

    selected = select(args.device, args.sections)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use --device cpu")
    start, budget = time.monotonic(), args.budget or math.inf
    settings = dataclasses.replace((QUICK if args.quick else FULL).on(args.device), deadline=start + budget)
    sections = within(selected, budget)
    with one_thread(args.device):
        machine = environment()
        gpus = "".join(f"{name}; " for name in machine["gpus"])
        command = shlex.join(["hf-ortho", "bench", *argv])
        header = {"command": command, "environment": machine, "settings": settings.to_dict()}
        console.print(
            f"{machine['cpu']}, {machine['physical_cores']} cores; {gpus}torch {machine['packages']['torch']}"
        )
        console.print(report.explanation(settings))
        if not args.quick:
            for line in report.plan(sections, [name for name in selected if name not in sections], budget):
                console.print(line)

        def save(results: BenchResults) -> None:
            if args.json:
                with written(args.json) as draft:
                    draft.write_text(json.dumps(header | dataclasses.asdict(results), indent=1, allow_nan=False) + "\n")

        results = measure(sections, settings, save)
    if args.json:
        save(results)
        console.print(f"Wrote {args.json}")
    if args.plot:
        plot_results(results, settings, [] if args.quick else TARGETS, args.plot)
        console.print(f"Wrote {args.plot}")
    outcomes = [] if args.quick else check(results, args.device, [t for t in TARGETS if t.case in selected])
    if outcomes:
        table(*report.targets_table(outcomes))
    console.print(f"Done in {time.monotonic() - start:.0f} s")
    failed = [entry for entry in results.not_run if entry.failed]
    for entry in failed:
        console.print(f"failed: {entry.case}{', ' if entry.row else ''}{entry.row}: {entry.reason}")
    if not args.check:
        return 1 if failed else 0
    missed = [outcome for outcome in outcomes if outcome.fails]
    for line in report.sentences(missed):
        console.print(line)
    console.print(f"{len(missed)} of {len(outcomes)} targets are missed by more than {TOLERANCE:.0%} or not run")
    return 1 if missed or failed else 0


def select(device: str, names: list[str] | None) -> Mapping[str, Section]:
    """The named sections of ``device``, the most important first, or all of them.

    Raises:
        ConfigError: a name is unknown.
    """
    from ..benchmark import SECTIONS

    sections = SECTIONS[device]
    if names is None:
        return sections
    unknown = next((name for name in names if name not in sections), None)
    if unknown is not None:
        raise ConfigError(f"--sections {unknown}: unknown; the sections on {device} are {', '.join(sections)}")
    return {name: section for name, section in sections.items() if name in names}


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


def measure(sections: Mapping[str, Section], settings: Settings, save: Callable[[BenchResults], None]) -> BenchResults:
    """Run the sections, also after one that fails. Print and save the results of each when it is done."""
    from ..benchmark import BenchResults, NotRun, report

    results = BenchResults()
    for number, (case, section) in enumerate(sections.items(), 1):
        start = time.monotonic()
        if start > settings.deadline:
            results.not_run.append(NotRun(case, "", "left out to stay within the budget"))
        else:
            try:
                with stage(f"Measuring {case}, section {number} of {len(sections)}"):
                    section.run(results, settings)
            except Exception as error:  # any failure, of a driver or a compiler: continue with the rest
                results.not_run.append(NotRun(case, "", explain(error), failed=True))
            results.seconds[case] = time.monotonic() - start
        if results.of(case):
            title, columns, rows = report.case_table(results, case, settings)
            table("\n".join([title, *report.reference(results, case)]), columns, rows)
        for line in report.not_run(results, case):
            console.print(line)
        if report.has_bandwidth(results, case):
            table(*report.bandwidth_table(results, case, settings))
        if results.of(case):
            console.print(f"{case} took {results.seconds[case]:.0f} s")
        save(results)
    return results
