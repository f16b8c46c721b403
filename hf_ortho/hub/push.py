"""Push a folder with a model or an adapter to the Hub."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..checkpoints.adapter import LABELS
from ..checkpoints.carry import CARD
from ..checkpoints.custom_code import GENERATED, references
from ..checkpoints.listing import matches, module_folders, module_of
from ..checkpoints.place import GRAPH, GRAPH_DATA, has_graph
from ..checkpoints.revision import is_commit
from ..errors import ConfigError, HubError
from ..files import explain
from ..folders import base_of
from .card import card_of
from .contents import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Contents, contents_of
from .local_paths import check_base, public_name, without_paths
from .remote_code import REMOTE_CODE, add_remote_code

logger = logging.get_logger("hf_ortho")

WEIGHTS = "model*.safetensors*"
WITH_PATHS = "*config.json conversion.json"  # in any folder
AGAIN = "nothing was committed; run the same command again to resume the upload"


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    remote_code: bool = False,
    include: Sequence[str] = (),
    base_model: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a complete model or adapter with its card in one commit. ``folder`` is not changed.

    Local paths in the card, the configs and ``conversion.json`` are replaced by their last parts, see
    ``without_paths``.

    This uses ``HfApi.create_commit`` because ``upload_folder`` may split a folder into several commits. The repository
    thus always contains a complete model. The commit includes files that are not in the folder (the card for the Hub,
    the remote code), and deletes weights of an earlier push that ``from_pretrained`` would prefer. huggingface_hub
    retries data requests (5 times, for 408, 429, 5xx and lost connections). After an interruption, the same call
    resumes: data already on the Hub is not sent again, and unchanged files are not part of the commit.

    Args:
        folder: the folder to push; see ``contents_of`` for the checks and the selected files.
        repo_id: ``owner/name``, or ``name`` for a repository of the current user. Created if it does not exist.
        private: whether a new repository is private. An existing repository is not changed, which is logged.
        revision: branch (created from main if it does not exist) or ``refs/pr/N``; default: main.
        create_pr: open a pull request against main, which does not require write access.
        remote_code: add code that loads the model without hf_ortho, with ``trust_remote_code=True``.
        include: glob patterns of further files to push, see ``contents_of``.
        base_model: Hub id of the base model, for a model or adapter that was made from a local folder.
        token: default: the token of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        The URL of the pull request or commit, or of the last commit if nothing has changed.

    Raises:
        CheckpointError: the folder does not contain a complete model or adapter.
        ConfigError: the arguments are incompatible, ``repo_id`` or ``base_model`` is malformed, or ``include`` selects
            no file.
        HubError: no token, no write access, no network, or the Hub refuses. Nothing is committed. A newly created
            repository remains, empty.
    """
    if is_commit(revision):
        raise ConfigError(f"revision {revision}: cannot push to a commit; give a branch")
    if create_pr and revision not in (None, "main"):
        raise ConfigError(f"revision {revision}: a pull request is always against main; omit one of the two")
    check_base(base_model)
    contents = contents_of(folder, include)
    if remote_code and contents.adapter:
        raise ConfigError(f"remote code: {folder} contains an adapter; only a full model can have remote code")
    if remote_code and has_graph(Path(folder)):
        raise ConfigError(f"remote code: {folder} contains an ONNX graph, which is loaded without code")
    code = add_remote_code(Path(folder)) if remote_code else {}
    info = find_or_create(repo_id, private=private, token=token)
    repo_id, branch = info.id, None if revision == "main" else revision
    card = card_of(Path(folder), repo_id=repo_id, remote_code=remote_code).encode()
    additions = _additions(Path(folder), contents, code | {CARD: card}, base_model)
    api = HfApi(token=token)
    with _one_sentence(repo_id, branch):
        if branch:
            if not branch.startswith("refs/"):
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            info = api.model_info(repo_id, revision=branch)
        deleted = _stale(info, {operation.path_in_repo for operation in additions})
        done = api.create_commit(
            repo_id,
            [*additions, *map(CommitOperationDelete, deleted)],
            commit_message=commit_message or f"Upload with hf_ortho {version('hf_ortho')}",
            revision=branch,
            create_pr=create_pr,
        )
    if done.oid == info.sha:
        logger.warning(f"note: {repo_id} is already up to date at {info.sha}: nothing to push")
    elif REMOTE_CODE in deleted:
        logger.warning(f"note: {repo_id} no longer loads without hf_ortho; push with --remote-code to keep this")
    return str(done.pr_url or done.commit_url)


def find_or_create(repo_id: str, *, private: bool | None = None, token: str | None = None) -> ModelInfo:
    """The Hub repository, with its full name. Created if it does not exist. See ``push`` for the arguments."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        meant = "/".join(repo_id.rstrip("/").split("/")[-2:])
        hint = f"; did you mean {meant}?" if "://" in repo_id else ", of letters, digits, '-', '_' and '.'"
        raise ConfigError(f"repository {repo_id!r}: must be owner/name, such as me/gpt2-hermite{hint}") from error
    known = token or get_token()
    if known and not known.isascii():
        raise HubError(f"{repo_id}: the Hub token is not ASCII text; run `hf auth login` with a valid token")
    if not known:
        raise HubError(f"{repo_id}: no Hub token; run `hf auth login`, or set HF_TOKEN to a token with write access")
    api = HfApi(token=token)
    with _one_sentence(repo_id):
        info = api.model_info(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
    if private and not info.private:
        logger.warning(f"note: {info.id} exists and is public; change this in its settings on the Hub")
    return info


def _additions(
    folder: Path, contents: Contents, written: Mapping[str, bytes], base_model: str | None
) -> list[CommitOperationAdd]:
    """The files of the folder, replaced or extended by the files in ``written``, without local paths."""
    texts = {
        path: (folder / path).read_bytes() for path in contents.files if matches(path.rpartition("/")[2], WITH_PATHS)
    } | dict(written)
    public = without_paths(texts, base_model)
    changed = {path: body for path, body in public.items() if path in written or body != texts[path]}
    files: dict[str, bytes | Path] = {path: folder / path for path in contents.files} | changed
    if contents.adapter and not base_model and (base := base_of(folder)) and public_name(base) != base:
        logger.warning(
            f"note: {ADAPTER_CONFIG} names the base model {base}, a local folder, and is pushed with "
            f"{public_name(base)!r}; give its name on the Hub with --base-model so that others can load the adapter"
        )
    if missing := sorted(_modules_of_code(public) - files.keys()):
        logger.warning(
            f"note: the model needs {', '.join(missing)} to load, and code is only pushed with --include '*.py', or "
            "with --remote-code if hf_ortho generated it"
        )
    modules = module_folders(folder)
    lost = [path for path in contents.left_out if module_of(path, modules)]
    if lost := [path for path in lost if path.endswith((".bin", ".pt", "/", ")"))]:  # weights, folders and links
        logger.warning(f"note: sentence-transformers needs what is left out of its modules: {', '.join(lost)}")
    return [CommitOperationAdd(path, source) for path, source in sorted(files.items())]


def _modules_of_code(files: Mapping[str, bytes]) -> set[str]:
    """The Python files of a repository that its configs refer to."""
    found: set[str] = set()
    for path in files.keys() - {CARD}:
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            auto_map = json.loads(files[path]).get("auto_map")
            modules = {name.partition(".")[0] for name in references(auto_map).values() if "--" not in name}
            modules |= {GENERATED} if f"{GENERATED}." in str(auto_map) else set()
            found |= {f"{module}.py" for module in modules}
    return found


def _stale(info: ModelInfo, added: set[str]) -> list[str]:
    """When pushing a model: the weights, adapter and remote code of an earlier push that are no longer part of it."""
    present = {file.rfilename for file in info.siblings or []} - added
    if GRAPH in added:
        return sorted({GRAPH_DATA} & present)
    if not any(fnmatch.fnmatch(path, WEIGHTS) for path in added):
        return []
    if GRAPH in present:
        logger.warning(f"note: {info.id} still has {GRAPH}; if it has other weights, export and push it again")
    weights = {path for path in present if "/" not in path and fnmatch.fnmatch(path, WEIGHTS)}
    adapter = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, LABELS} & present if ADAPTER_CONFIG not in added else set()
    return sorted(weights | adapter | ({REMOTE_CODE} & present))


@contextlib.contextmanager
def _one_sentence(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn any final error of a request into a HubError."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise HubError(f"{repo_id}: {_reason(error, revision)}") from error


def _reason(error: BaseException, revision: str | None) -> str:
    """Explain the error and suggest a fix."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return f"{explain(error).rstrip('.')}: {_reason(error.__cause__, revision)}"
    if isinstance(error, RevisionNotFoundError):
        return (
            f"it has no revision {revision}; give a branch (created automatically) or an open pull request, refs/pr/N"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to push"
    if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} cannot be reached ({explain(error)}); {AGAIN}"
    if not isinstance(error, HfHubHTTPError):
        return f"{explain(error)}; {AGAIN}"
    status, message = error.response.status_code, error.server_message or error.response.reason_phrase
    message = f"{status} {' '.join(message.split()).rstrip('.')}"
    if status == 401:
        return f"the Hub does not accept the token ({message}); run `hf auth login` with a valid token"
    if status == 403:
        return (
            f"the token has no write access there ({message}); run `hf auth login` with another token, use your own "
            "repository, or open a pull request with --create-pr"
        )
    if status == 429 or status >= 500:
        return f"the Hub could not process the request ({message}); {AGAIN}"
    return f"the Hub refuses the request ({message})"
