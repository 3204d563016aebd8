"""`wanexport doctor`: what is installed and works here, and the command that gets what is missing.

What wanexport needs is read from its own package metadata. Every library is imported in a process
of its own, where one that is broken or crashes does no harm.
"""

import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from typing import Any

from packaging.requirements import Requirement

from wanexport.exporter.child.child import temporary_folder
from wanexport.exporter.child.process import environment_of, run_command
from wanexport.exporter.inspection import fits_on_cards
from wanexport.graphs.config import PRESETS
from wanexport.runtime.bundle.signature import program_of, weights_layout
from wanexport.runtime.engines.onnx import disable_telemetry
from wanexport.runtime.engines.tensorrt_library import FLAVOURS
from wanexport.runtime.fitting import needs_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.machine.memory import available_bytes, limit_bytes

_TIMEOUT = 120  # seconds for one import
_IMPORTS = {  # where the package's name is not what is used of it
    "Jinja2": "import jinja2",
    "apache-tvm-ffi": "import tvm_ffi",
    "onnx-ir": "import onnx_ir",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13": "import onnxruntime_ep_nv_tensorrt_rtx",
    "tensorrt-cu13": "import tensorrt",
    # Finds its libraries only once the package that holds them is imported.
    "tensorrt-rtx-cu13-bindings": "from wanexport.runtime.engines import tensorrt_library\n"
    "tensorrt_library.import_tensorrt('tensorrt-rtx')",
    "diffusers": "from diffusers import AutoencoderKLWan, WanTransformer3DModel",
    "pillow": "from PIL import Image",
    "transformers": "from transformers import CLIPVisionModel, UMT5EncoderModel",
    "onnxruntime-gpu": "import onnxruntime\n"
    "if 'CUDAExecutionProvider' not in onnxruntime.get_available_providers(): "
    "raise ImportError('the package onnxruntime is installed over it: uninstall both first')",
}
_TASKS = {  # what a user wants -> the extras of wanexport that it needs besides the base
    "run on a CPU": ("cpu",),
    "run AOTInductor engines": ("aoti",),
    "make videos from prompts": ("pipeline",),
    "build and compare": ("cpu", "build"),
    "compare with diffusers": ("cpu", "build", "diffusers"),
}
_GPU_TASKS = {"run ONNX engines on a GPU": ("gpu",)}
_SIZES = (  # published models, and the videos that they were made for
    ("t2v-1.3b", Geometry(480, 832, 81)),
    ("ti2v-5b", Geometry(704, 1280, 121, 16)),
    ("t2v-14b", Geometry(480, 832, 81)),
    ("t2v-14b", Geometry(720, 1280, 81)),
    ("t2v-a14b", Geometry(480, 832, 81)),
    ("t2v-a14b", Geometry(720, 1280, 81)),
)
_RUNNING = ("run on a CPU", "run AOTInductor engines", *_GPU_TASKS)  # any one runs some bundle


@dataclass(frozen=True)
class Library:
    """One requirement, the version found, and what is wrong with it: nothing when empty."""

    requirement: str
    extra: str
    version: str | None
    problem: str


def doctor(*, gpu_memory: float | None = None) -> dict[str, Any]:
    """Examine this environment; `usable` says whether it runs the bundles of some backend.

    `fits` is how the published models fit on each GPU here, or on one of gpu_memory GiB.
    """
    stated = [Requirement(text) for text in requires("wanexport") or ()]
    names = {requirement.name for requirement in stated if _version(requirement.name)}
    with ThreadPoolExecutor(max_workers=4) as pool:
        problems = dict(zip(names, pool.map(_import_problem, names)))
    libraries = [_examine(requirement, problems) for requirement in stated]
    machine = _machine()
    wanted = _TASKS | (_GPU_TASKS if machine["gpus"] else {})
    tasks = {name: _task(libraries, {"", *extras}) for name, extras in wanted.items()}
    plans = {
        f"{kind.title} engines": _tensorrt(name, kind.install) for name, kind in FLAVOURS.items()
    }
    extras = {library.extra for library in libraries}  # a task that needs nothing proves nothing
    running = [tasks[n] for n, needs in wanted.items() if n in _RUNNING and extras >= {*needs}]
    running += plans.values() if machine["gpus"] else []
    return {
        "wanexport": version("wanexport"),
        "machine": machine,
        "libraries": [asdict(library) for library in libraries],
        "tasks": tasks | plans,
        "fits": _fits([f"a GPU, {gpu_memory * 1024} MiB"] if gpu_memory else machine["gpus"]),
        "usable": any(task["usable"] for task in running),
    }


def _examine(requirement: Requirement, problems: Mapping[str, str]) -> Library:
    """The requirement beside what is installed; problems are those of importing, by name."""
    _, _, extra = str(requirement.marker or "").partition("extra == ")
    stated = f"{requirement.name}{requirement.specifier}"
    found = _version(requirement.name)
    if found is None:
        return Library(stated, extra.strip('"'), None, "not installed")
    problem = problems[requirement.name]
    if not requirement.specifier.contains(found, prereleases=True):
        problem = f"{found} is not {requirement.specifier}"
    return Library(stated, extra.strip('"'), found, problem)


def _version(name: str) -> str | None:
    """Version of the package, or of another that provides its module: onnxruntime-gpu, say."""
    try:
        return version(name)
    except PackageNotFoundError:  # only then: to look through all packages takes long
        others = packages_distributions().get(name.replace("-", "_"), [])
        return version(others[0]) if others else None


def _import_problem(name: str) -> str:
    """Why a fresh process cannot import the library, or an empty string."""
    code = _IMPORTS.get(name, f"import {name}")
    return _problem([sys.executable, "-P", "-c", code])


def _problem(command: list[str]) -> str:
    """Why a process that imports something failed, or an empty string."""
    disable_telemetry()
    try:
        with temporary_folder() as scratch:
            environment = environment_of(scratch)
            ended = run_command(
                command, environment=environment, folders=[scratch], timeout=_TIMEOUT
            )
    except TimeoutError:
        return f"importing it takes over {_TIMEOUT} s"
    if ended.code < 0:
        return f"importing it dies of signal {-ended.code}"
    lines = ended.errors.strip().splitlines() or [f"exit code {ended.code}"]
    return f"importing it fails: {lines[-1]}" if ended.code else ""


def _task(libraries: Collection[Library], extras: Collection[str]) -> dict[str, Any]:
    """Whether a task can be done, and else the command that makes it so."""
    faulty = [lib for lib in libraries if lib.extra in extras and lib.problem]
    absent = all(lib.version is None for lib in faulty)
    force = "" if absent else "--force-reinstall "
    names = " ".join(shlex.quote(lib.requirement) for lib in faulty)
    pip = f"{shlex.quote(sys.executable)} -m pip"
    command = f"{pip} install {force}{names}" if faulty else ""
    if "onnxruntime-gpu" in names and _version("onnxruntime"):  # whose files it would share
        command = f"{pip} uninstall -y onnxruntime onnxruntime-gpu && {command}"
    return {"usable": not faulty, "command": command}


def _tensorrt(flavour: str, install: str) -> dict[str, Any]:
    """Whether a flavour of TensorRT can be imported; what it finds there is no package of ours."""
    code = (
        "import sys; from wanexport.runtime.engines.tensorrt_library import import_tensorrt; "
        "import_tensorrt(sys.argv[1])"
    )
    problem = _problem([sys.executable, "-P", "-c", code, flavour])
    return {
        "usable": not problem,
        "command": install if problem else "",
        "problem": problem,
    }


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": limit_bytes(),
        "available_bytes": available_bytes(),
        "free_disk_bytes": shutil.disk_usage(".").free,
        "gpus": _gpus(),
        **_hub(),
    }


def _fits(gpus: Sequence[str]) -> list[dict[str, Any]]:
    """How an AOTInductor engine in bf16 of each published model fits on each of these GPUs."""
    rows = []
    for gpu in dict.fromkeys(gpus):
        name, _, memory = gpu.rpartition(", ")
        if not (found := re.match(r"[0-9.]+", memory)):  # it shares the machine's memory
            continue
        card = round(float(found[0]) * (1 << 20))
        for model, geometry in _SIZES:
            preset = PRESETS[model]
            program = program_of(preset.config, geometry)
            entries = weights_layout(preset.config, "bf16")[1]
            needs = needs_of(program, entries, "bf16", geometry)
            needs = replace(needs, experts=max(1, len(preset.experts)))
            own = {"gpu": name, "model": model, "size": geometry.name}
            rows.append({**own, "cards": fits_on_cards(needs, [card])})
    return rows


def _hub() -> dict[str, Any]:
    """Where the hub's client keeps its downloads, and whether it may make any."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return {"hub_cache": None, "hub_offline": True}
    return {"hub_cache": constants.HF_HUB_CACHE, "hub_offline": constants.HF_HUB_OFFLINE}


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs, from the driver's own tool."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        ended = run_command(command, timeout=_TIMEOUT)
    except OSError:  # there is no driver, or it does not answer
        return []
    return ended.output.strip().splitlines() if ended.code == 0 else []
