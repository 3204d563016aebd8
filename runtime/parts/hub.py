"""Get files of a repository on the Hugging Face hub, through its own client and cache."""

import re
from collections.abc import Iterable
from pathlib import Path

from wanexport.runtime.errors import BadRequest, BundleError, needing_package, printable

EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)


def download(hub_id: str, patterns: Iterable[str], *, revision: str | None = None) -> Path:
    """Folder of the local cache with the files of a repository whose names fit the patterns.

    The client's own settings (`HF_HUB_OFFLINE`, `HF_HOME`) hold. Raises BadRequest when hub_id is
    no hub id, and BundleError when the files cannot be had.
    """
    if not HUB_ID.fullmatch(hub_id):
        raise BadRequest(
            f"{printable(hub_id) or 'an empty name'} does not exist: expected a checkpoint folder, "
            f"or a hub id such as {EXAMPLE}"
        )
    with needing_package("huggingface_hub", "a download from the hub"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except RepositoryNotFoundError as error:
        raise BundleError(
            f"{hub_id} is neither a folder here nor a repository of the hub that one may read: "
            f"check its spelling, as {EXAMPLE}, or log in"
        ) from error
    except LocalEntryNotFoundError as error:  # there is no connection, or none is allowed
        raise BundleError(
            f"{hub_id} is neither a folder here nor in the hub's cache, and the hub cannot be "
            f"reached: check its spelling and the connection, or download it and name the folder "
            f"(-m, model=)"
        ) from error
    except Exception as error:  # of the hub, the HTTP client or the disk: all end the command alike
        reason = printable(" ".join(str(error).split()), 300)
        raise BundleError(
            f"cannot get {hub_id} from the hub: {reason}; download it and name the folder "
            f"(-m, model=)"
        ) from error


def is_offline() -> bool:
    """Whether the client's settings forbid downloads: what is in its cache is all there is."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
