"""``hf-ortho push``: upload a folder with a model or an adapter to the Hub, with its card, as one commit."""

from __future__ import annotations

from ..hub.contents import contents_of
from ..hub.push import push
from .console import Parser, console

HELP = __doc__


def parser() -> Parser:
    p = Parser(prog="hf-ortho push", description=HELP)
    p.add_argument("folder", help="with a model, as hf-ortho convert writes it, or with an adapter of peft")
    p.add_argument("repo_id", help="owner/name on the Hub, or name for your own; created if there is none")
    p.add_argument("--private", action="store_true", help="create it private; one that exists stays as it is")
    p.add_argument("--revision", metavar="BRANCH", help="created if there is none, or refs/pr/N; default: main")
    p.add_argument("--create-pr", action="store_true", help="open a pull request against main")
    p.add_argument("--remote-code", action="store_true", help="loads without hf_ortho too, by trust_remote_code=True")
    p.add_argument("--commit-message", metavar="M")
    return p


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
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
