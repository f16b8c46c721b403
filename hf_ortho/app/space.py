"""The app.py of a Hugging Face Space with the page."""

import os

# Visitors must not get access through the token of the Space.
os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"

from hf_ortho.app.page import LAUNCH, build

demo = build()

if __name__ == "__main__":
    demo.launch(**LAUNCH)
