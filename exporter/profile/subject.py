"""What is profiled: one forward of an arm of a bundle, or one call of a function of the user's."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from wanexport.exporter.bench.arms import ARMS, Arm, Job, find_arms
from wanexport.exporter.bench.opening import open_arm, open_denoiser, read_inputs
from wanexport.exporter.bench.process import take_gpu
from wanexport.exporter.bench.subject import Subject, check_arms, choose_subject, first_job
from wanexport.exporter.module_function import load_function
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.trace.kinds import ATTENTION, PRODUCTS
from wanexport.graphs.signature import attention_flops, product_flops
from wanexport.runtime.bundle.tensorfile import save_arrays
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.engines.onnx import OnnxEngine
from wanexport.runtime.errors import BadRequest

_SEED = 0


@dataclass(frozen=True)
class Profiled:
    """A step that can be repeated, and what is known of it.

    `device` and `dtype` are None where only its trace tells. `flops` are those of a step by kind of
    work, as far as they follow from the model's geometry. `nodes` is an engine whose nodes ONNX
    Runtime records. `within` is entered around all steps.
    """

    target: str
    step: Callable[[], Any]
    name: str  # of its files
    described: dict[str, Any]
    device: str | None = None
    dtype: str | None = None
    flops: dict[str, int] = field(default_factory=dict)
    nodes: OnnxEngine | None = None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


def open_bundle(bundle: Path, arm: str | None, asked: EngineOptions, folder: Path) -> Profiled:
    """One forward of an arm of `bench`, by default of the engine that runs best here.

    folder is a temporary one. Raises WanExportError when there is no such arm, it cannot run here,
    or it does not take an option.
    """
    if asked.backend:
        raise BadRequest(f"profile takes no backend: name it as the arm, {asked.backend}")
    if asked.offload == "experts":
        raise BadRequest("profile opens one expert, offload experts swaps two: leave it out")
    named = find_arms([arm]) if arm is not None else []
    subject = choose_subject(bundle.resolve(), asked, named)
    chosen = named[0] if named else ARMS[subject.record.backend]
    check_arms([chosen], subject)
    job = replace(first_job(subject, folder, 1, False), arm=chosen)
    config, geometry = subject.manifest.config, subject.record.geometry
    save_arrays(Path(job.inputs), forward_inputs(config, geometry, subject.timestep, _SEED))
    take_gpu(job.device)
    step, nodes = _step(job, folder)
    return Profiled(
        target=str(bundle),
        step=step,
        name=f"profile-{_name(subject, chosen)}",
        described=_described(subject, chosen),
        device=job.device,
        dtype=job.dtype,
        flops={
            PRODUCTS: product_flops(config, geometry),
            ATTENTION: attention_flops(config, geometry),
        },
        nodes=nodes,
    )


def _step(job: Job, folder: Path) -> tuple[Callable[[], Any], OnnxEngine | None]:
    """One forward, and the engine that is to record its nodes."""
    inputs = read_inputs(job)
    if job.on_gpu:
        return partial(open_arm(job), inputs), None
    if job.arm.backend is None or "keys" in inputs:  # of a causal engine, which is not called so
        import torch

        # Of arrays it would make arrays again, which is no work of the model's.
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return partial(open_arm(job), tensors), None
    (engine,) = open_denoiser(job).engines.values()
    nodes = engine if isinstance(engine, OnnxEngine) else None
    if nodes is not None:
        nodes.record_nodes(folder / "nodes")
    # A denoiser would turn arrays into tensors, and back.
    given = {name: engine.array(value) for name, value in inputs.items()}
    return partial(engine, given, memory=engine.memory()), nodes


def closed(subject: Profiled) -> Profiled:
    """What is known of a subject, without the model, whose memory others may need."""
    return replace(subject, step=lambda: None, nodes=None)


def _name(subject: Subject, arm: Arm) -> str:
    """The engine's name, or what it would be of an arm without one, as part of a file's name."""
    record = subject.record
    own = record.name if arm.backend else f"{record.geometry.name}-{arm.name}-{record.dtype}"
    return own.replace("/", "-")


def _described(subject: Subject, arm: Arm) -> dict[str, Any]:
    is_engine = arm.backend is not None
    weights = subject.options.weights
    return {
        "arm": arm.name,
        "engine": subject.record.name if is_engine else None,
        "model": subject.manifest.model,
        "expert": subject.expert,
        "weights": None if weights is None else str(weights),
        "size": subject.record.geometry.name,
        "dtype": subject.record.dtype,
        "tokens": subject.record.geometry.num_tokens,
    }


def open_function(target: str) -> Profiled:
    """One call of what MODULE:FUNCTION returns; a torch.nn.Module is called without gradients.

    Raises BadRequest as `load_function` does.
    """
    model, args, kwargs = load_function(target)
    import torch

    return Profiled(
        target=target,
        step=partial(model, *args, **kwargs),
        name=f"profile-{re.sub(r'[^A-Za-z0-9_.-]', '-', target)}",
        described={},
        within=torch.no_grad if isinstance(model, torch.nn.Module) else nullcontext,
    )
