"""The callable that a sampling loop sees: checks its inputs, picks the expert, runs the engine."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from wanexport.runtime.arrays import Array, count_not_finite, is_on_gpu, is_torch, like, to_numpy
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.engines.engine import Engine, Memory
from wanexport.runtime.errors import BadRequest, BundleError
from wanexport.runtime.family import SamplingDefaults
from wanexport.runtime.geometry import PATCH, TEMPORAL_STRIDE, Geometry
from wanexport.runtime.kept_frames import Window
from wanexport.runtime.kept_inputs import KeptInputs
from wanexport.runtime.lora.given import Loras
from wanexport.runtime.program import Input
from wanexport.runtime.recipes import recipe_named
from wanexport.runtime.solvers import NUM_TRAIN_TIMESTEPS
from wanexport.runtime.stream import Stream

STEP = "step"  # the moment, of a Program's, of most calls

_OF_A_STEP = ("latent", "timestep")  # inputs that every call has anew


class WeightsSet(NamedTuple):
    """A weights set by name, or by the path that it was named by, and its files by expert.

    `recipe` is how its maker says that a run with it samples, by name; empty for as the model does.
    """

    name: str
    files: Mapping[str, PinnedFile]
    recipe: str = ""


class FindWeights(Protocol):
    """Finds a weights set by name or path, and the LoRAs to merge into it."""

    def __call__(
        self, weights: str | Path | None, /, *, lora: Loras = (), lora_partial: bool = False
    ) -> WeightsSet: ...


class Denoiser:
    """Velocity of a latent at a timestep, from one engine of a bundle.

    `engines` maps each expert to its engine; a model without experts has the one key "".
    `weights` is the set that calls use, None where engines have their own; `find` returns another.
    `offload` is how the device holds less than all weights, as `load` takes it, None where it does.
    """

    def __init__(
        self,
        record: EngineRecord,
        engines: Mapping[str, Engine],
        weights: WeightsSet | None = None,
        find: FindWeights | None = None,
        *,
        offload: str | None = None,
    ) -> None:
        self.record, self.offload = record, offload
        self.engines = dict(engines)
        self._weights, self._find = weights, find
        self._kept = KeptInputs()

    @property
    def inputs(self) -> dict[str, Input]:
        """Shape and dtype of every input the engine takes."""
        return self.record.inputs

    @property
    def geometry(self) -> Geometry:
        """The video geometry this engine was compiled for."""
        return self.record.geometry

    @property
    def sampling(self) -> SamplingDefaults:
        """The sampling defaults at this geometry: the model's, or those of the set in use."""
        own, recipe = self.record.sampling, self.recipe
        return recipe_named(recipe).applied(own) if recipe else own

    @property
    def recipe(self) -> str:
        """The name of the recipe of the set in use; empty for none."""
        weights = self._weights
        return weights.recipe if weights is not None else ""

    @property
    def device(self) -> str:
        """PyTorch's name of the device that runs the engine: `cpu` or `cuda:1`."""
        return next(iter(self.engines.values())).device

    @property
    def weights(self) -> str:
        """The name, or path, of the weights set in use; empty where the engine holds its own."""
        return self._weights.name if self._weights is not None else ""

    @property
    def weights_set(self) -> WeightsSet | None:
        """The set in use, None where the engine holds its own."""
        return self._weights

    def memory(self) -> Memory:
        """What a new video keeps, of a model without experts."""
        return next(iter(self.engines.values())).memory()

    def array(self, value: Array) -> Array:
        """A caller's array as the engine takes it: fp32, in numpy or on the engine's device."""
        return next(iter(self.engines.values())).array(value)

    def only(self, expert: str) -> "Denoiser":
        """A denoiser of one of this one's experts, which serves all timesteps."""
        record = replace(self.record, sampling=replace(self.record.sampling, boundary=None))
        own = {expert: self.engines[expert]}
        return Denoiser(record, own, self._weights, self._find, offload=self.offload)

    def use(
        self,
        weights: str | Path | None = None,
        *,
        lora: Loras = (),
        lora_partial: bool = False,
    ) -> None:
        """Use another weights set of the engine's layout from the next call on.

        weights is as in `load`. The set is read in place of the one before, which waits for calls
        that run; no engine is built or opened, except that ONNX Runtime on a CPU opens a session. A
        call has one set, whole: that of the moment it began. Denoisers of a process that share
        weights on a device take turns from then on, and read anew at each.
        lora are LoRA files to merge into the set in memory, on the engine's device: each `FILE`,
        `FILE:STRENGTH` or a pair; of a model with two experts for both, or a mapping from
        `high_noise` and `low_noise`. What of them has no place in the model is refused, unless
        lora_partial. A set's values are those that it was rounded to.
        Raises BadRequest when there is no such set, a file is laid out otherwise, or a LoRA does
        not fit, BundleError when a file is missing or was altered, EngineFailure when the device
        fails; the set before stays in use.
        """
        if self._find is None or self._weights is None:
            raise BadRequest(
                f"engine {self.record.name} holds its weights inside and cannot change them: "
                f"leave {str(weights)!r:.40} out"
            )
        found = self._find(weights, lora=lora, lora_partial=lora_partial)
        for engine, file in self._read_ahead(found):
            engine.use(file)
        for expert, engine in self.engines.items():  # that keep the other's in memory
            if read_ahead := getattr(getattr(engine, "weights", None), "read_ahead", None):
                read_ahead(found.files[expert])
        self._weights = found

    def _read_ahead(self, found: WeightsSet) -> list[tuple[Engine, PinnedFile]]:
        """The engines that can hold their part of a set by now: of two that take turns, the first,
        with which a run begins."""
        held: dict[int, tuple[Engine, PinnedFile]] = {}
        for expert, engine in self.engines.items():
            shared = getattr(engine, "weights", None) or engine
            held.setdefault(id(shared), (engine, found.files[expert]))
        return list(held.values())

    def close(self) -> None:
        """Free the memory that the engine has on its device. A call then raises EngineFailure."""
        self._kept.clear()
        for engine in self.engines.values():
            engine.close()

    def __call__(self, **inputs: Array) -> Array:
        """Return the velocity: shaped and placed like latent, in fp32.

        The inputs are those of `inputs`, by name. Of plain Wan: latent [1, C, F, h, w]; timestep a
        number or [1], for TI2V also [F]; text [n, 4096] or [1, n, 4096] with n <= 512, zero-padded
        to 512 here; condition and image as in `inputs`.
        Raises BadRequest, a ValueError, for a missing, unexpected or wrongly shaped input, for one
        with NaN or Inf, for a timestep outside 0 to 1000, and for a model that keeps a state
        between steps, which needs a session; EngineFailure when the device cannot. Tensors on a GPU
        are not searched for NaN, and nothing waits for them, but for a timestep by which an expert
        is chosen; a timestep there is not compared with 0 and 1000. What is given on the host again
        and again, as text, is searched and moved to the engine once; its last few are kept.
        """
        self._refuse_chunks()
        if self.record.program.state:
            raise BadRequest(
                f"engine {self.record.name} keeps a state from step to step: call what "
                f"session() returns"
            )
        return self.session()(**inputs)

    def session(self, **constant: Array) -> "Session":
        """What is called at every step of one video, with the inputs that are not given here.

        Inputs that stay the same, as text, are checked and moved to the device here, once. A
        session has its own state, which begins as zeros, and what is computed once a prompt.
        Raises BadRequest as a call does, and for a causal model, which has streams instead.
        """
        self._refuse_chunks()
        return Session(self, constant)

    def stream(
        self,
        text: Array,
        *,
        window: int | None = None,
        sink: int = 0,
        max_attention: int | None = None,
    ) -> Stream:
        """A video of a causal model, which is made chunk by chunk, of a text [n, 4096].

        window, in latent frames, is how many frames stay, the first `sink` of the video among
        them, None for all; of these the last max_attention are attended to, None for all. All that
        is attended to must fit into the engine's cache. The model's own makers say what it was
        trained for.
        Raises BadRequest when the model is not causal, and for a window or text that does not fit;
        EngineFailure when the device has too little memory.
        """
        if not self.geometry.chunk:
            raise BadRequest(
                f"engine {self.record.name} makes a video whole: use sample, or an engine of a "
                f"causal model (wanexport build --family self-forcing)"
            )
        return Stream(self, text, Window(window, sink, max_attention))

    def _refuse_chunks(self) -> None:
        if self.geometry.chunk:
            raise BadRequest(
                f"engine {self.record.name} makes a video chunk by chunk: use denoiser.stream(text)"
                f", or the command wanexport stream"
            )

    @property
    def resident_blocks(self) -> int | None:
        """How many blocks stay on the device where others are streamed, None where none is."""
        weights = (getattr(engine, "weights", None) for engine in self.engines.values())
        return next((getattr(own, "resident_blocks", None) for own in weights), None)

    @property
    def switch_seconds(self) -> list[float]:
        """How long each replacement of one expert's weights by the other's took."""
        held = {id(w): w for e in self.engines.values() if (w := getattr(e, "weights", None))}
        return [seconds for weights in held.values() for seconds in weights.switches]

    def expert(self, timestep: float) -> str:
        """The expert that serves this timestep; empty where there is only one model."""
        boundary = self.record.sampling.boundary
        if boundary is None:
            return next(iter(self.engines))
        high = timestep >= boundary * NUM_TRAIN_TIMESTEPS
        return "high_noise" if high else "low_noise"

    def check(self, inputs: Mapping[str, Array], known: Collection[str]) -> dict[str, Array]:
        """Inputs in fp32 and in their shapes, on the host unless they are on a GPU.

        known are names that need not be among them. Raises BadRequest for an input that is missing,
        that the engine does not take, or that it takes otherwise.
        """
        self._check_names([*inputs, *known], inputs)
        arrays = {n: _fp32(value) for n, value in inputs.items() if n != "timestep"}
        for name, value in arrays.items():
            if self.inputs[name].draw == "rows":
                arrays[name] = pad_rows(value, self.inputs[name].shape, name=name)
        if "timestep" in inputs:
            arrays["timestep"] = self._times(inputs["timestep"])
        for name, array in arrays.items():
            self._check_array(name, array)
        return arrays

    def take(
        self, inputs: Mapping[str, Array], known: Collection[str]
    ) -> tuple[dict[str, Array], Array | None]:
        """Inputs of one call as the engine takes them, and the timestep, where it is given.

        Those that stay the same from step to step are checked, and moved to the device, when one of
        their content comes first. Raises BadRequest as `check` does.
        """
        own = {name: _fp32(value) for name, value in inputs.items() if self._may_stay(name, value)}
        kept = {name: self._kept.find(name, value) for name, value in own.items()}
        taken = {name: value for name, value in kept.items() if value is not None}
        new = {name: np.array(value) for name, value in own.items() if name not in taken}
        others = {name: value for name, value in inputs.items() if name not in taken}
        checked = self.check({**others, **new}, known=[*known, *taken])
        taken |= {name: self.array(value) for name, value in checked.items()}
        for name, value in new.items():
            self._kept.keep(name, value, taken[name])
        return taken, checked.get("timestep")

    def _may_stay(self, name: str, value: Array) -> bool:
        """Whether an input may be that of the last call, and its content can be looked at."""
        return name in self.inputs and name not in _OF_A_STEP and not is_on_gpu(value)

    def _check_names(self, there: Collection[str], given: Collection[str]) -> None:
        faults = {
            "missing": [name for name in self.inputs if name not in there],
            "not expected": [name for name in given if name not in self.inputs],
        }
        wrong = [f"{', '.join(names)} {what}" for what, names in faults.items() if names]
        if wrong:
            raise BadRequest(
                f"engine {self.record.name} takes {', '.join(self.inputs)}: {'; '.join(wrong)}"
            )

    def _times(self, timestep: Array) -> Array:
        """The timestep in the input's shape, which one number fills; on a GPU if it is there."""
        shape = self.inputs["timestep"].shape
        if is_on_gpu(timestep):
            times = timestep.detach().float()
            return times.reshape(1).expand(shape) if times.numel() == 1 else times
        times = to_numpy(timestep)
        return np.full(shape, times.item(), np.float32) if times.size == 1 else times

    def _check_array(self, name: str, array: Array) -> None:
        shape, spec = tuple(array.shape), self.inputs[name]
        if shape != spec.shape:
            raise BadRequest(
                f"{name} has shape {list(shape)}, engine {self.record.name} takes "
                f"{list(spec.shape)}{self._rebuild_hint(name, shape)}"
            )
        if bad := count_not_finite(array):
            raise BadRequest(
                f"{name} has {bad} values that are NaN or Inf: expected finite ones; "
                f"look at what made it"
            )
        if name != "timestep" or is_on_gpu(array):
            return
        if not ((array >= 0) & (array <= NUM_TRAIN_TIMESTEPS)).all():
            raise BadRequest(
                f"timestep is from {array.min():g} to {array.max():g}: expected from 0 to "
                f"{NUM_TRAIN_TIMESTEPS}, a sigma times {NUM_TRAIN_TIMESTEPS}"
            )

    def _rebuild_hint(self, name: str, shape: tuple[int, ...]) -> str:
        """For a latent of another geometry: the nearest legal build options."""
        is_video = self.inputs[name].shape[2:] == self.geometry.latent
        if self.geometry.chunk or not is_video or len(shape) != 5 or 0 in shape:
            return ""
        side = PATCH * self.geometry.spatial_stride
        height, width = (max(1, round(n / PATCH)) * side for n in shape[3:])
        frames = (shape[2] - 1) * TEMPORAL_STRIDE + 1
        if (height, width, frames) == astuple(self.geometry)[:3]:
            return ""
        return f": build an engine with --resolution {height}x{width} --frames {frames}"

    def run(
        self,
        expert: str,
        arrays: Mapping[str, Array],
        memory: Memory,
        moment: str = STEP,
        weights: WeightsSet | None = None,
    ) -> Array:
        """The velocity of checked inputs on the device, by one expert, with a session's memory.

        weights None are those in use. Another moment than that of a step gives what it gives.
        """
        weights = weights or self._weights
        file = weights.files[expert] if weights is not None else None
        engine = self.engines[expert]
        if moment != STEP:
            return engine(arrays, file, memory, moment)
        velocity = engine(arrays, file, memory)
        if tuple(velocity.shape) != self.record.output.shape:
            raise BundleError(
                f"engine {self.record.name} gave {list(velocity.shape)}, its record says "
                f"{list(self.record.output.shape)}: run wanexport build again"
            )
        return velocity


class Session:
    """The calls for one video: its constant inputs, and what the model keeps between steps."""

    def __init__(self, denoiser: Denoiser, constant: Mapping[str, Array]) -> None:
        self.denoiser = denoiser
        self._given = {name: value for name, value in constant.items() if value is not None}
        checked = denoiser.check(self._given, known=denoiser.inputs)
        self._times = checked.get("timestep")
        self._constant = {name: denoiser.array(value) for name, value in checked.items()}
        calls = denoiser.record.program.calls
        # What the calls of the prompt compute holds as long as these inputs do.
        self._of_prompt = {name for c in calls if c.when == "prompt" for name in c.reads}
        self._memories: dict[str, Memory] = {}  # by expert
        self._state: dict[str, Array] = {}

    def __call__(self, **inputs: Array) -> Array:
        """The velocity, shaped and placed like latent, in fp32; raises as the denoiser does."""
        denoiser = self.denoiser
        given = {name: value for name, value in inputs.items() if value is not None}
        taken, times = denoiser.take(given, known=self._constant)
        times = self._times if times is None else times
        assert times is not None  # or its name would have been missed
        arrays = {**self._constant, **taken}
        if self._of_prompt.intersection(taken):
            self._forget_prompt()
        # Where there are no two experts, the host need not wait for a timestep on a GPU.
        chooses = denoiser.record.sampling.boundary is not None
        expert = denoiser.expert(float(times.max()) if chooses else 0.0)
        velocity = self._run(expert, arrays)
        return like(velocity, {**self._given, **given}["latent"])

    def _forget_prompt(self) -> None:
        for memory in self._memories.values():
            memory.values = None

    def _run(self, expert: str, arrays: Mapping[str, Array]) -> Array:
        """One expert's call; the state goes on from what the other left."""
        if expert not in self._memories:
            self._memories[expert] = self.denoiser.engines[expert].memory()
            self._state = self._state or self._memories[expert].state
        memory = self._memories[expert]
        memory.state = self._state
        velocity = self.denoiser.run(expert, arrays, memory)
        self._state = memory.state
        return velocity


def open_session(denoiser: Callable[..., Array], **constant: Array) -> Callable[..., Array]:
    """A session of a denoiser; of any other callable, itself with these inputs at every call."""
    session = getattr(denoiser, "session", None)
    given = {name: value for name, value in constant.items() if value is not None}
    return partial(denoiser, **given) if session is None else session(**given)


def _fp32(value: Array) -> Array:
    """A tensor on a GPU as it is, anything else as an fp32 numpy array."""
    return value if is_on_gpu(value) else to_numpy(value)


def check_rows(**texts: Array | None) -> None:
    """Raise BadRequest, naming them, for text embeddings [n, D] or [1, n, D] with n = 0."""
    for name, text in texts.items():
        shape: tuple[int, ...] = tuple(getattr(text, "shape", ()))
        if len(shape) > 1 and shape[-2] == 0:
            raise BadRequest(
                f"{name} has shape {list(shape)}, no row: expected one for each token of a prompt, "
                f"an empty prompt has one too"
            )


def pad_rows(text: Array, shape: tuple[int, ...], *, name: str = "text") -> Array:
    """Zero-pad text embeddings [n, D] or [1, n, D] to [1, 512, D]: Wan attends to the zero rows.

    Raises BadRequest when there are no rows, or more than the model takes.
    """
    check_rows(**{name: text})
    text = text[None] if text.ndim == 2 else text
    if text.ndim == 3 and text.shape[1] > shape[1]:
        raise BadRequest(
            f"{name} has {text.shape[1]} rows, the model takes at most {shape[1]}: "
            f"truncate the prompt"
        )
    if text.ndim != 3 or text.shape[1] == shape[1]:
        return text
    missing = shape[1] - text.shape[1]
    if is_torch(text):
        import torch

        return torch.nn.functional.pad(text, (0, 0, 0, missing))
    return np.pad(text, ((0, 0), (0, missing), (0, 0)))
