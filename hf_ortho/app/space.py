"""The page as a Hugging Face Space: this file is the Space's app.py."""

import os

# What the Space's own token may read is not for its visitors.
os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"

from hf_ortho.app.page import LAUNCH, build

demo = build()

if __name__ == "__main__":
    demo.launch(**LAUNCH)
