"""``hf-ortho app``: a web page for exploring fits of activations and the activations of a checkpoint."""

from __future__ import annotations

import contextlib
import threading

from ..errors import ConfigError
from .console import Parser, console
from .network import check_hub
from .progress import announce_libraries

LOCAL = ("127.0.0.1", "localhost", "::1")


def parser() -> Parser:
    p = Parser(
        prog="hf-ortho app",
        description="Open a web page for exploring fits of activations and the activations of a checkpoint.",
    )
    p.add_argument("--model", default="", help="Converted folder or Hub model to show on startup.")
    p.add_argument("--revision", default="", help="Branch, tag or commit of the Hub model.")
    p.add_argument(
        "--host",
        default="127.0.0.1",
        help="Address to listen on. With any other address, visitors can only open Hub models.",
    )
    p.add_argument("--port", type=int, help="Port. Default: the first free port starting at 7860.")
    p.add_argument(
        "--share", action="store_true", help="Create a public gradio.live link. Visitors can only open Hub models."
    )
    return p


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.port is not None and not 1 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port}: must be between 1 and 65535")
    if args.revision and not args.model:
        raise ConfigError(f"--revision {args.revision} requires --model")
    check_hub([(args.model, args.revision or None)])
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ConfigError("hf-ortho app requires Gradio: pip install 'hf-ortho[app]'") from error
    announce_libraries()
    from ..app.page import LAUNCH, build

    page = build(args.model, args.revision, public=args.share or args.host not in LOCAL)
    try:
        _, address, public = page.launch(
            server_name=args.host, server_port=args.port, share=args.share, prevent_thread_lock=True, **LAUNCH
        )
        if args.share and not public:
            raise ConfigError("--share: gradio.live returned no link; check the network, or omit the flag")
        console.print(f"{public or address} (press Ctrl-C to stop)")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    except OSError as error:
        where = f"{args.host}:{args.port or '7860-7959'}"
        raise ConfigError(
            f"{where} cannot be opened: it is in use, or the host is not an address of this machine; use another "
            "--port or --host"
        ) from error
    finally:
        page.close(verbose=False)
