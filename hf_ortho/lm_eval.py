"""lm-evaluation-harness for converted models.

``python -m hf_ortho.lm_eval`` is its command ``lm_eval`` with the activations registered, so that ``--model hf`` finds
them. Versions with plugins also know ``lm_eval --model hf_ortho``.
"""

from lm_eval.__main__ import cli_evaluate
from lm_eval.models.huggingface import HFLM


class HfOrthoLM(HFLM):
    """``--model hf``, after this package was imported."""


if __name__ == "__main__":
    cli_evaluate()
