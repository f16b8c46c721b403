"""The ``hf-ortho`` command: one file per subcommand, each with ``parser()`` and ``run(argv)``."""

from .main import main

__all__ = ["main"]
