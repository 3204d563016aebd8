"""What the proofs of all backends share: their size, their process, and the worst of them."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanexport.exporter.child.child import run_process
from wanexport.exporter.reference.eager import cut_to_ends
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.wan_config import WanConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_TOKENS = 1000


def cut_for(config: WanConfig, verify: str) -> WanConfig:
    """The part of a model that a proof runs: its `ends`, or with `full` all of it."""
    return cut_to_ends(config) if verify == "ends" else config


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


def worst(figures: Sequence[dict[str, Any]], verify: str, started: float) -> dict[str, Any]:
    """The figures of the expert that is farthest off, for the record of a proof that began then."""
    seconds = round(time.monotonic() - started, 2)
    return {**max(figures, key=lambda f: f["error"]), "verify": verify, "seconds": seconds}
