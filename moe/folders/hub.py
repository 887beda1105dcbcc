"""Models by their name on a hub such as ``Qwen/Qwen3-30B-A3B``: downloaded once per machine.

huggingface_hub does the work, so ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE``
count, a connection that breaks is taken up again, whole files stay after a failure, and processes
that want the same file wait for one of them. (Data sets have their own file, training/data/hub.py.)
"""

import errno
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ...errors import ModelFileError

NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
FULL = os.strerror(errno.ENOSPC)
COMMIT = re.compile("[0-9a-f]{40}")
"""Its files never change: if all are here, no network is needed, and nothing is shown."""
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
"""Configuration, tokenizer and chat templates. Weights as pickles are not among them."""
WEIGHTS = "*.safetensors"
OTHER_FORMATS = tuple(f"*/{pattern}" for pattern in (WEIGHTS, "*.json", "*.txt", "*.model"))
"""Folders inside a model have its weights again, for other programs."""


def hub_name(name: str | Path) -> tuple[str, str | None] | None:
    """Return ``OWNER/MODEL`` and the revision behind ``@``, or None for the path of a folder.

    A path that exists is a folder, and so is one whose first part exists: that is a slip of the pen
    in a path of this machine.
    """
    found = NAME.fullmatch(str(name))
    if found is None or Path(name).exists() or Path(found[1]).parent.exists():
        return None
    return found[1], found[2]


def local_folder(name: str | Path, weights: bool = True) -> Path:
    """Return ``name`` itself if it is a folder, else the folder of that model in the hub's cache.

    Downloads what is not there yet: safetensors unless ``weights`` is False, JSON, templates and
    tokenizer. Raises :class:`ModelFileError` with the reason and the remedy.
    """
    found = hub_name(name)
    return Path(name) if found is None else _download(*found, weights)


def pinned(name: str, weights: bool = True) -> str:
    """Return the name with the commit that it stands for now; a folder's name is unchanged.

    The model is downloaded. :func:`local_folder` of the result needs no network on this machine and
    gives the same files on another one.
    """
    found = hub_name(name)
    if found is None:
        return name
    return f"{found[0]}@{_download(*found, weights).name}"


def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if os.environ.get("LOCAL_RANK", "0") != "0":
        disable_progress_bars()  # the first process of a machine shows them
    get = partial(
        snapshot_download,
        name,
        revision=revision,
        allow_patterns=[*SMALL_FILES, *([WEIGHTS] if weights else [])],
        ignore_patterns=list(OTHER_FORMATS),
    )
    try:
        folder = _whole_here(get, revision) or get()
    except Exception as error:
        # Files come through several libraries, whose errors have no common class.
        reason = _reason(name, revision, error, constants.ENDPOINT, constants.HF_HUB_CACHE)
        raise ModelFileError(reason) from error
    if weights and not any(Path(folder).glob(WEIGHTS)):
        raise ModelFileError(
            f"{name} has no safetensors on {constants.ENDPOINT}; other weights are not read, so "
            "convert it, or choose another model."
        )
    return Path(folder)


def _whole_here(get: Callable[..., str], revision: str | None) -> str | None:
    """Return the folder of a commit whose files are all here, or None."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if COMMIT.fullmatch(revision or "") is None:
        return None
    try:
        folder = get(local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    # Without the list of the model's files the library cannot know whether some are missing.
    has_list = (Path(folder).parents[1] / "trees" / f"{revision}.json").exists()
    return folder if has_list else None


def _reason(name: str, revision: str | None, error: Exception, endpoint: str, cache: str) -> str:
    """Return what went wrong and the remedy, in one sentence."""
    from huggingface_hub import errors

    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    by_hand = f"or run `{command} --local-dir FOLDER` on a machine that has it, and give FOLDER."
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return (
            f"{name} on {endpoint} is gated; accept its terms at {endpoint}/{name}, then run "
            "`hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} on {endpoint} has no revision {revision!r}; give a branch, tag or commit."
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"{name} is no folder here and no model on {endpoint} that you may see; correct it, "
            "or run `hf auth login` if it is private."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
            return (
                f"{name} is no folder here and not whole in {cache}, and HF_HUB_OFFLINE is set; "
                f"unset it, {by_hand}"
            )
        return (
            f"{name} is no folder here and cannot be downloaded, as {endpoint} does not answer "
            f"({_root(error)}); check the network, {by_hand}"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{name} is no folder here and no name that a hub has ({_root(error)}); correct it."
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or FULL in str(error):
        return (
            f"{name} does not fit into {cache} ({FULL}); make room or set HF_HOME to "
            "another disk, and start again: files that are whole stay."
        )
    return (
        f"the download of {name} from {endpoint} broke off ({_root(error)}); start again, as files "
        f"that are whole stay, or run `{command}`."
    )


def _root(error: BaseException) -> str:
    """Return the first line of the error behind all others, or its kind."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [""])[0][:200].rstrip(".: ") or type(error).__name__
