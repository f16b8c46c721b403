"""``hf-ortho push``: upload a folder with a model or an adapter to the Hub, with its card, as one commit."""

from __future__ import annotations

from pathlib import Path

from .console import Parser, console
from .network import check_hub


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho push",
        description="Upload a folder with a model or an adapter to the Hub, with its card, as one commit.",
    )
    p.add_argument("folder", help="With a model, as hf-ortho convert writes it, or with a peft adapter.")
    p.add_argument("repo_id", help="OWNER/NAME on the Hub, or NAME for your own; created if it does not exist.")
    p.add_argument("--private", action="store_true", help="Create it private; an existing one stays as it is.")
    p.add_argument(
        "--revision", metavar="BRANCH", help="A branch, created if it does not exist, or refs/pr/N. Default: main."
    )
    p.add_argument("--create-pr", action="store_true", help="Open a pull request against main.")
    p.add_argument(
        "--remote-code", action="store_true", help="Add code that loads it without hf_ortho (trust_remote_code=True)."
    )
    p.add_argument("--commit-message", metavar="MESSAGE", help="Default: one that names the model.")
    return p


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if Path(args.folder).is_dir():
        check_hub(push=True)

    from ..hub.contents import contents_of
    from ..hub.push import push

    left_out = contents_of(args.folder).left_out
    if left_out:
        console.print(f"Left out: {', '.join(left_out)}")
    url = push(
        args.folder,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        remote_code=args.remote_code,
        commit_message=args.commit_message,
    )
    console.print(f"{args.folder} is at {url}")
