"""``hf-ortho push``: push the folder of a model or adapter to the Hub, with its card, in one commit."""

from __future__ import annotations

import os
from pathlib import Path

from ..text import one_line, some
from .console import Parser, console
from .network import check_hub
from .progress import announce_libraries


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho push",
        description="Push the folder of a model or adapter to the Hub, with its card, in one commit. "
        "Example: hf-ortho push tuned YOU/gpt2-tuned",
    )
    p.add_argument("folder", help="Folder with a model, such as the output of hf-ortho convert, or a peft adapter.")
    p.add_argument("repo_id", help="OWNER/NAME on the Hub, or NAME for your own account. Created if it does not exist.")
    p.add_argument(
        "--private",
        action="store_true",
        help="Create the repository as private. An existing repository is not changed.",
    )
    p.add_argument(
        "--revision", metavar="BRANCH", help="Branch (created if it does not exist) or refs/pr/N. Default: main."
    )
    p.add_argument("--create-pr", action="store_true", help="Open a pull request against main.")
    p.add_argument(
        "--remote-code",
        action="store_true",
        help="Add code that loads the model without hf_ortho (trust_remote_code=True).",
    )
    p.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="Glob pattern of further files to push, such as '*.py' (repeatable). Default: only what the model needs.",
    )
    p.add_argument(
        "--base-model", metavar="ID", help="Hub id of the base model, if the model was made from a local folder."
    )
    p.add_argument("--commit-message", metavar="MESSAGE", help="Commit message. Default: the version of hf_ortho.")
    return p


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if os.path.isdir(args.folder):
        check_hub(push=True)

    announce_libraries()
    from ..hub.contents import contents_of
    from ..hub.push import push

    contents = contents_of(args.folder, args.include)
    if contents.left_out:
        console.print(f"Left out (--include adds files): {one_line(some(contents.left_out, 5))}")
    size = sum(Path(args.folder, file).stat().st_size for file in contents.files)
    console.print(f"Pushing {args.folder} ({size / 1e6:.1f} MB in {len(contents.files)} files)")
    url = push(
        args.folder,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        remote_code=args.remote_code,
        include=args.include,
        base_model=args.base_model,
        commit_message=args.commit_message,
    )
    console.print(f"{args.folder} is at {url}")
