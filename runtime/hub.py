"""Get files of a repository on the Hugging Face hub, through its own client and cache."""

from collections.abc import Iterable
from pathlib import Path

from wanexport.runtime.errors import WanExportError, needing_package

EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B"


def download(hub_id: str, patterns: Iterable[str], *, revision: str | None = None) -> Path:
    """Folder of the local cache with the files of a repository whose names fit the patterns.

    The client's own settings (`HF_HUB_OFFLINE`, `HF_HOME`) hold. Raises WanExportError when hub_id
    is no hub id, and when the files cannot be had.
    """
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise WanExportError(
            f"{hub_id} does not exist: expected a checkpoint folder, or a hub id such as {EXAMPLE}"
        )
    with needing_package("huggingface_hub", "a download from the hub"):
        from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of the hub, the HTTP client or the disk: all end the command alike
        reason = " ".join(str(error).split())
        raise WanExportError(
            f"cannot get {hub_id} from the hub: {reason[:300]}; download it and pass -m FOLDER"
        ) from error


def is_offline() -> bool:
    """Whether the client's settings forbid downloads: what is in its cache is all there is."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return True
    return bool(constants.HF_HUB_OFFLINE)
