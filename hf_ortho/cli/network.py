"""Check that the Hub is reachable before heavy imports: without a network, its clients retry for a minute."""

from __future__ import annotations

import glob
import http.client
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ..errors import CheckpointError, DataError, HubError
from ..tasks.built_in import BUILT_IN

SECONDS = 3.0
CONFIGS = ("config.json", "adapter_config.json")


def check_hub(
    models: Iterable[tuple[str | None, str | None]] = (), datasets: Iterable[str | None] = (), *, push: bool = False
) -> None:
    """Check that all inputs from the Hub are available there or in the cache. If only in the cache, switch the
    libraries to offline mode.

    Args:
        models: (name, revision) pairs. Folders and None are skipped.
        datasets: names. Files, folders, built-in datasets and None are skipped.
        push: whether the command writes to the Hub.

    Raises:
        CheckpointError, DataError, HubError: the Hub is unreachable, and the cache has no copy.
    """
    remote_models = [(name, revision) for name, revision in models if _on_hub(name)]
    remote_datasets = [
        name for name in datasets if _on_hub(name) and name not in BUILT_IN and not Path(str(name)).suffix
    ]
    if not (remote_models or remote_datasets or push) or (not constants.HF_HUB_OFFLINE and answers(constants.ENDPOINT)):
        return
    reason = f"no answer from {constants.ENDPOINT}"
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    if push:
        raise HubError(f"{reason}: nothing was pushed; run the same command again once the Hub is available")
    for name, revision in remote_models:
        if not _cached(str(name), revision):
            raise CheckpointError(f"{name} is not a folder and cannot be downloaded: {reason}, and it is not cached")
    for name in remote_datasets:
        if not _cached_dataset(str(name)):
            raise DataError(
                f"dataset {name!r} is not a file or folder and cannot be downloaded: {reason}, and it is not cached"
            )
    os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def hub_tokenizer(name: str | None) -> tuple[str | None, None]:
    """A tokenizer as an entry of ``models``; the names of new tokenizers are not on the Hub."""
    return (None if name in ("bytes", "bpe") else name), None


def answers(endpoint: str) -> bool:
    """Whether a server responds within ``SECONDS``, including name resolution. An error response counts."""
    answered = threading.Event()

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=SECONDS).close()
        except urllib.error.HTTPError:
            pass
        except (OSError, ValueError, http.client.HTTPException) as error:
            if "SSL" not in repr(error):  # an untrusted certificate: the clients report it
                return
        answered.set()

    # In a separate thread, as name resolution has no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answered.is_set()


def _on_hub(name: str | None) -> bool:
    """Whether a name can only refer to the Hub."""
    if not name or os.path.exists(name) or glob.has_magic(name):
        return False
    return name[0] not in "/.~" and name.count("/") <= 1


def _cached(name: str, revision: str | None) -> bool:
    try:
        return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in CONFIGS)
    except HFValidationError:  # loading reports the invalid name
        return True


def _cached_dataset(name: str) -> bool:
    home = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME, "datasets")))
    places = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}"), home / name.replace("/", "___")
    return any(place.is_dir() for place in places)
