"""The command that repeats each thing that a report shows."""

import shlex
from collections.abc import Mapping
from typing import Any

from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.engines.table import BACKENDS

Result = Mapping[str, Any]


def engine_words(engine: EngineRecord) -> list[str]:
    """The options that choose an engine by its size and precision."""
    return [*engine.geometry.options.split(), "--dtype", engine.dtype]


def compare_command(bundle: str, engine: EngineRecord, result: Result) -> str:
    """`compare` on the same inputs. Of --seed its own default would do, and is stated."""
    words = ["wanexport", "compare", bundle, "--backend", engine.backend, *engine_words(engine)]
    words += _weights(result)
    reference = str(result["reference"])
    if reference.startswith("recorded ("):
        implementation, dtype = reference.removeprefix("recorded (").rstrip(")").split(", ")
        words += ["--reference", implementation, "--outputs-dtype", dtype]
        words += ["--outputs", str(result["outputs"])]
    elif "/" in reference:  # an engine's name
        words += ["--against", _backend_of(reference)]
    else:
        words += ["--reference", reference]
    if result["model"]:
        words += ["-m", str(result["model"]), *_of_model(result)]
    words += _inputs(result)
    return shlex.join([*words, *(["--bisect"] if result["bisect"] else [])])


def _of_model(result: Result) -> list[str]:
    """What says more of the checkpoint, in results that have it."""
    low_noise, ema = result.get("low_noise"), result.get("ema")
    words = [] if low_noise is None else ["--low-noise", str(low_noise)]
    return words if ema is None else [*words, "--ema" if ema else "--no-ema"]


def bench_command(bundle: str, engine: EngineRecord, result: Result) -> str:
    """`bench` of the same arms, those that failed among them."""
    arms = [str(line["arm"]) for line in result["arms"]] + list(result["failed"])
    words = ["wanexport", "bench", bundle, *engine_words(engine), *_weights(result)]
    words += ["--arms", ",".join(arms), "--rounds", str(result["rounds"])]
    is_profiled = any(line["gpu_busy"] is not None for line in result["arms"])
    return shlex.join([*words, *(["--profile"] if is_profiled else [])])


def profile_command(bundle: str, result: Result) -> str:
    """`profile` of the same arm."""
    words = ["wanexport", "profile", bundle, "--arm", str(result["arm"])]
    words += [*_shape(str(result["size"])), "--dtype", str(result["dtype"]), *_weights(result)]
    return shlex.join([*words, "--steps", str(result["steps"]), "--warmup", str(result["warmup"])])


def _shape(size: str) -> list[str]:
    """The options of a geometry's name, as `64x96x33-chunk3-cache9`."""
    video, *chunks = size.split("-")
    height, width, frames = video.split("x")
    words = ["--resolution", f"{height}x{width}", "--frames", frames]
    for part in chunks:
        option = part.rstrip("0123456789")
        words += [f"--{option}", part.removeprefix(option)]
    return words


def _weights(result: Result) -> list[str]:
    return ["--weights", str(result["weights"])] if result["weights"] else []


def _inputs(result: Result) -> list[str]:
    """Which inputs: of a loop, whose engine has a drift, or of single calls."""
    given, is_loop = str(result["inputs"]), any(r["drift"] is not None for r in result["steps"])
    steps = ["--steps", str(len(result["steps"]))]
    if (stream := result.get("stream")) is not None:
        said = {name.replace("_", "-"): value for name, value in stream.items() if value}
        steps = [word for name, value in said.items() for word in (f"--{name}", str(value))]
    if given.startswith("seed "):
        return ["--seed", given.removeprefix("seed "), *steps]
    return ["--inputs", given, *steps] if is_loop else ["--calls", given]


def _backend_of(engine: str) -> str:
    """The backend in the name of an engine, as `64x96x9/aoti-bf16-sm90`."""
    label = engine.partition("/")[2]
    return max((name for name in BACKENDS if label.startswith(f"{name}-")), key=len)
