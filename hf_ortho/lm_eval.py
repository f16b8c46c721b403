"""lm-evaluation-harness for converted models.

``python -m hf_ortho.lm_eval`` runs its ``lm_eval`` command with the activations registered, so ``--model hf`` can load
converted models. Versions with plugins also support ``lm_eval --model hf_ortho``.
"""

import sys

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    print("hf-ortho: error: hf_ortho.lm_eval requires lm_eval: pip install 'hf-ortho[lm-eval]'", file=sys.stderr)
    sys.exit(2)


class HfOrthoLM(HFLM):
    """``--model hf`` with the activations registered."""


if __name__ == "__main__":
    cli_evaluate()
