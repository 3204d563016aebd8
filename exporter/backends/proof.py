"""What the proofs of all backends share: their size, and the fresh process that they run in."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanexport.exporter.child.child import run_process
from wanexport.runtime.errors import WanExportError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_TOKENS = 1000


def run_in_fresh_process(
    module: str, job: "DataclassInstance", folder: Path | None = None
) -> dict[str, Any]:
    """Run a module of `backends` on its job; folder is temporary.

    Raises WanExportError when it fails or dies.
    """
    try:
        return run_process(f"backends.{module}", job, folder)
    except WanExportError as error:
        raise WanExportError(f"the built engine failed its proof: {error}") from error
