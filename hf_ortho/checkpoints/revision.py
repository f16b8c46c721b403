"""The commit of a model on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers.utils import CONFIG_NAME, cached_file, logging

logger = logging.get_logger("hf_ortho")


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit of 40 hexadecimal digits, which never moves."""
    return re.fullmatch("[0-9a-f]{40}", revision or "") is not None


def model_commit(name: str, revision: str | None, config: str = CONFIG_NAME) -> str | None:
    """The commit of a Hub model, None for a folder; if the Hub does not answer, that of the cache, which is logged."""
    moving = not Path(name).is_dir() and not is_commit(revision)
    away = moving and not _answers(name, revision, config)
    file = Path(str(cached_file(name, config, revision=revision, local_files_only=away)))
    if file.parent.parent.name != "snapshots":
        return None
    commit = file.parent.name
    if away:
        logger.warning(f"note: no answer from {constants.ENDPOINT}: using the cached commit {commit} of {name}")
    return commit


def _answers(name: str, revision: str | None, config: str) -> bool:
    """Whether the Hub answers, even if only that there is no such model."""
    try:
        get_hf_file_metadata(hf_hub_url(name, config, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError as error:
        return error.response.status_code < 500
    except (HTTPError, OSError):
        return False
    except ValueError:  # not the name of a repository
        return True
    return True
