"""The commit of a model on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers.utils import CONFIG_NAME, cached_file, logging

logger = logging.get_logger("hf_ortho")


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit hash of 40 hexadecimal digits, which never moves."""
    return re.fullmatch("[0-9a-f]{40}", revision or "") is not None


def model_commit(name: str, revision: str | None, config: str = CONFIG_NAME) -> str | None:
    """The commit of a Hub model, None for a folder. If the Hub does not answer, uses the cache and logs a note."""
    moving = not os.path.isdir(name) and not is_commit(revision)
    offline = moving and not _answers(name, revision, config)
    file = Path(str(cached_file(name, config, revision=revision, local_files_only=offline)))
    if file.parent.parent.name != "snapshots":
        return None
    commit = file.parent.name
    if offline:
        logger.warning(f"note: no answer from {constants.ENDPOINT}: using the cached commit {commit} of {name}")
    return commit


def _answers(name: str, revision: str | None, config: str) -> bool:
    """Whether the Hub responds at all; a 404 counts."""
    try:
        get_hf_file_metadata(hf_hub_url(name, config, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError as error:
        return error.response.status_code < 500
    except (HTTPError, OSError):
        return False
    except ValueError:  # not a valid repository name
        return True
    return True
