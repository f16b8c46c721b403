"""``python -m hf_ortho`` and ``torchrun -m hf_ortho`` are the ``hf-ortho`` command."""

import sys

from .cli import main

sys.exit(main())
