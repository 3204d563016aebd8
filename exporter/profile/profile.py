"""`wanexport profile`: where the time of a few steps goes, and what the host waits for.

The steps run twice under PyTorch's profiler: once undisturbed, for the times, and once with a mark
around each call of PyTorch, for the lines of Python. A step is one forward, or one call.
"""

import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.bench.process import machine_name
from wanexport.exporter.bundle.place import REPORTS
from wanexport.exporter.profile.save import save
from wanexport.exporter.profile.target import BUNDLE, TRACE, kind_of_target
from wanexport.exporter.trace.chrome import Trace, events_of, read_trace, refuse_empty_trace
from wanexport.exporter.trace.digest import digest, waits_digest, with_known_flops
from wanexport.exporter.trace.flops import dtype_of_products
from wanexport.exporter.trace.rates import rates_from
from wanexport.exporter.trace.steps import steps_of
from wanexport.exporter.trace.waits import waits_of
from wanexport.runtime.engines.engine import EngineKeywords, EngineOptions
from wanexport.runtime.errors import BadRequest, needing_extra
from wanexport.runtime.machine.temporary import check_temporary_folder, marked_folder

STEPS, WARM_UP = 3, 2
_SILENT = {"KINETO_LOG_LEVEL": "6"}  # what the profiler's library says of itself
_OURS = "wanexport"  # in a trace: what a digest needs beside its events
_NO_FLOORS = "the trace does not say how fast its machine is: there are no floors"
_NO_LINES = (
    "a run with marks for lines waited at other places: whose line is whose is unknown, and "
    "`marked` lists its own"
)


def _untold(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def profile(
    target: str | Path,
    *,
    arm: str | None = None,
    steps: int | None = None,
    warmup: int | None = None,
    report: str | Path | None = None,
    progress: Progress = _untold,
    **options: Unpack[EngineKeywords],
) -> dict[str, Any]:
    """Run a few steps under PyTorch's profiler and return the digest of them, times in seconds.

    target is a bundle, whose arm is one of `bench` (by default the engine that runs best here,
    chosen and opened by the options as `load` does); or MODULE:FUNCTION, found from the working
    directory, which returns (model, args) or (model, args, kwargs); or a Chrome trace of
    PyTorch's profiler, of which nothing runs. There are `warmup` steps, by default 2, that are not
    recorded, and `steps`, by default 3, that are. Digest and trace are saved in report, by default
    the bundle's `reports/` or the working directory; of a trace only where report is given.
    Raises WanExportError when the target is none of these, its trace is empty, or it fails.
    """
    for name, value in _SILENT.items():
        os.environ.setdefault(name, value)
    kind, asked = kind_of_target(target), EngineOptions(**options)
    with needing_extra("build,cpu", "a profile"):
        import torch  # noqa: F401
    if kind == TRACE:
        _refuse({**asked.given(), "arm": arm, "steps": steps, "warmup": warmup}, "a trace")
        return _digest_file(Path(target), report)
    if kind != BUNDLE:
        _refuse({**asked.given(), "arm": arm}, "a function")
    counts = (STEPS if steps is None else steps, WARM_UP if warmup is None else warmup)
    if counts[0] < 1 or counts[1] < 0:
        raise BadRequest(f"{counts[0]} steps and {counts[1]} of warm-up: expected 1 and 0, or more")
    check_temporary_folder()
    progress("opening the model", 0, 0)
    result, trace, name = _profile(str(target), arm, asked, counts, progress)
    is_own = report is None and kind == BUNDLE
    place = Path(target) / REPORTS if is_own else Path(report or ".")
    save(result, trace, name, place, is_own=is_own)
    return result


def _refuse(given: dict[str, Any], what: str) -> None:
    """Raise BadRequest for an option that such a target does not take."""
    if unused := sorted(name for name, value in given.items() if value is not None):
        names = " and ".join(name.replace("_", " ") for name in unused)
        raise BadRequest(f"{what} takes no {names}: leave it out")


def _digest_file(path: Path, report: str | Path | None) -> dict[str, Any]:
    """The digest of a trace that there is."""
    trace = read_trace(path)
    events = events_of(trace, path)
    refuse_empty_trace(events, path)
    steps = steps_of(events)
    stated = trace.get(_OURS)
    ours = stated if isinstance(stated, dict) else {}
    rates = rates_from(ours.get("rates"))
    result = {
        "target": str(path),
        **digest(steps, waits_of(steps), rates),
        "rates": rates and asdict(rates),
        "source": "a trace",
        "notes": [] if rates else [_NO_FLOORS],
        "files": [],
        "warning": None,
    }
    if report is not None:
        save(result, None, f"profile-{path.name.partition('.')[0]}", Path(report), is_own=False)
    return result


def _profile(
    target: str,
    arm: str | None,
    asked: EngineOptions,
    counts: tuple[int, int],
    progress: Progress,
) -> tuple[dict[str, Any], Trace, str]:
    """The result of a run, its trace, and the name of its files."""
    from wanexport.exporter.profile.rates import rates_here
    from wanexport.exporter.profile.recording import record
    from wanexport.exporter.profile.subject import closed, open_bundle, open_function

    with marked_folder("wanexport-profile-") as folder:
        is_bundle = os.path.isdir(target)
        subject = (
            open_bundle(Path(target), arm, asked, folder) if is_bundle else open_function(target)
        )
        recorded = record(subject, *counts, progress)
    events = events_of(recorded.trace, target)
    refuse_empty_trace(events, f"the profile of {target}")
    steps = steps_of(events)
    progress("measuring the machine", 0, 0)
    subject = closed(subject)
    device = subject.device or ("cuda" if steps.device else "cpu")
    rates = rates_here(device, subject.dtype or dtype_of_products(steps.host))
    recorded.trace[_OURS] = {"rates": asdict(rates)}
    result = {
        "target": target,
        **subject.described,
        "machine": machine_name(device),
        "torch": version("torch"),
        **digest(steps, recorded.waits, rates),
        "warmup": counts[1],
        "rates": asdict(rates),
        "source": "torch.profiler" + (" and ONNX Runtime's" if recorded.nodes else ""),
        "notes": [],
        "warning": None,
    }
    with_known_flops(result["kinds"], subject.flops, rates)
    if recorded.marked is not None:
        result["waits"]["marked"] = waits_digest(recorded.marked, steps.count)["lines"]
        result["notes"].append(_NO_LINES)
    return result, recorded.trace, subject.name
