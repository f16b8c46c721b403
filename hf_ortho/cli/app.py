"""``hf-ortho app``: a web page that shows fits of activations, and the activations of a checkpoint."""

from __future__ import annotations

import contextlib
import threading

from ..errors import ConfigError
from .console import Parser, console
from .network import check_hub

LOCAL = ("127.0.0.1", "localhost", "::1")


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho app",
        description="Open a web page that shows fits of activations, and the activations of a checkpoint.",
    )
    p.add_argument("--model", default="", help="A converted folder or Hub model to show at the start.")
    p.add_argument("--revision", default="", help="Branch, tag or commit of the model on the Hub.")
    p.add_argument("--host", default="127.0.0.1", help="With any other address, visitors can name Hub models only.")
    p.add_argument("--port", type=int, help="Default: the first free one from 7860 on.")
    p.add_argument("--share", action="store_true", help="A public address through gradio.live; Hub models only.")
    return p


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.port is not None and not 1 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port}: must be from 1 to 65535")
    if args.revision and not args.model:
        raise ConfigError(f"--revision {args.revision} needs --model")
    check_hub([(args.model, args.revision or None)])
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ConfigError("hf-ortho app needs Gradio: pip install 'hf-ortho[app]'") from error
    from ..app.page import LAUNCH, build

    page = build(args.model, args.revision, public=args.share or args.host not in LOCAL)
    try:
        _, address, public = page.launch(
            server_name=args.host, server_port=args.port, share=args.share, prevent_thread_lock=True, **LAUNCH
        )
        if args.share and not public:
            raise ConfigError("--share: gradio.live gave no address; look at the network, or leave the flag out")
        console.print(f"{public or address} (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    except OSError as error:
        where = f"{args.host}:{args.port or '7860-7959'}"
        raise ConfigError(
            f"{where} cannot be opened: it is in use, or the host is no address of this machine; name another --port "
            "or --host"
        ) from error
    finally:
        page.close(verbose=False)
