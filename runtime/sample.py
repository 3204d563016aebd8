"""Wan's sampling loop around any denoiser: solver, guidance, and the TI2V first frame."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from wanexport.runtime.arrays import Array, is_torch, to_fp32_like, to_numpy
from wanexport.runtime.denoiser import check_rows, open_session
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.family import MAX_GUIDANCE, SamplingDefaults
from wanexport.runtime.host_copy import finite
from wanexport.runtime.recipes import recipe_named
from wanexport.runtime.settings import Settings
from wanexport.runtime.solvers import NUM_TRAIN_TIMESTEPS, SOLVERS, Schedule, make_schedule


@dataclass(frozen=True)
class Step:
    """A finished step: its 0-based index, the timestep the model was given, the latent after."""

    index: int
    timestep: float
    latent: Array


@dataclass(frozen=True)
class Plan:
    """Everything a run decides before its first step."""

    solver: str
    schedule: Schedule
    guidance: tuple[float, ...]  # of each step

    def __len__(self) -> int:
        return len(self.guidance)


def sample(
    denoiser: Callable[..., Array],
    *,
    noise: Array,
    text: Array,
    negative: Array | None = None,
    first_frame: Array | None = None,
    solver: str | None = None,
    steps: int | None = None,
    shift: float | None = None,
    guidance: float | tuple[float, float] | None = None,
    timesteps: Sequence[float] | None = None,
    recipe: str | None = None,
    **inputs: Array | None,
) -> Iterator[Step]:
    """Denoise from noise [1, C, F, h, w] and yield every step; the last latent is the result.

    text and negative are text embeddings ([n, 4096], n <= 512); negative is needed unless guidance
    is 1. None for solver, steps, shift or guidance takes the denoiser's own default. guidance is a
    number or Wan's (low noise, high noise) pair. timesteps are the explicit float timesteps of a
    distilled model: Euler and no guidance unless named. recipe names its settings, of
    `recipes.RECIPES`, and the others replace them. first_frame [1, C, 1, h, w] is TI2V's image
    latent: it replaces frame 0 before the run and after every step, and is given timestep 0. inputs
    are the model's others, as condition and image: every step is given them.

    The step's velocity is uncond + guidance * (cond - uncond), in fp32.
    Raises BadRequest, before any work, for settings and inputs that do not fit; what else fails is
    the denoiser's to raise, at a step.
    """
    plan = plan_of(denoiser, Settings(steps, shift, guidance, solver, timesteps, recipe))
    return run_plan(
        denoiser,
        plan,
        noise=noise,
        text=text,
        negative=negative,
        first_frame=first_frame,
        **inputs,
    )


def run_plan(
    denoiser: Callable[..., Array],
    plan: Plan,
    *,
    noise: Array,
    text: Array,
    negative: Array | None = None,
    first_frame: Array | None = None,
    **inputs: Array | None,
) -> Iterator[Step]:
    """What `sample` does once its settings have become a plan, which several seeds may share."""
    texts = _texts(plan, text, negative)
    latent = to_fp32_like(noise, noise)
    if latent.ndim != 5:
        raise BadRequest(f"noise has shape {list(latent.shape)}, expected [1, C, F, h, w]")
    if first_frame is not None:
        _check_first_frame(denoiser, latent, first_frame)
        first_frame = to_fp32_like(first_frame, latent)
    _check_finite(noise=noise, text=text, negative=negative, first_frame=first_frame, **inputs)
    sessions = [open_session(denoiser, text=own, **inputs) for own in texts]
    return _run(sessions, plan, latent, first_frame)


def _texts(plan: Plan, text: Array, negative: Array | None) -> list[Array]:
    """The texts that the plan calls the model with. Raises BadRequest when one is not there."""
    check_rows(text=text, negative=negative)
    if all(scale == 1 for scale in plan.guidance):
        return [text]
    if negative is None:
        raise BadRequest(
            f"guidance {max(plan.guidance)} needs negative text embeddings: "
            f"pass them, or set guidance to 1"
        )
    return [text, negative]


def denoise(denoiser: Callable[..., Array], **options: Any) -> Step:
    """Run `sample` with these options to its end, and return the last step.

    Raises as `sample` does.
    """
    (step,) = deque(sample(denoiser, **options), maxlen=1)
    return step


def plan_of(denoiser: Any, settings: Settings) -> Plan:
    """The plan of a run with a denoiser, or with any callable.

    Raises BadRequest as make_plan does, and for a recipe of models of other families.
    """
    defaults, asked = with_recipe(denoiser, settings)
    return make_plan(defaults, asked)


def with_recipe(denoiser: Any, settings: Settings) -> tuple[SamplingDefaults | None, Settings]:
    """The model's own defaults, and the settings with the recipe of the weights set in use.

    Raises BadRequest for a recipe of models of other families.
    """
    record = getattr(denoiser, "record", None)
    own = getattr(record, "sampling", None)
    if record is None or own is None:
        return getattr(denoiser, "sampling", None), settings
    recipe = settings.recipe or getattr(denoiser, "recipe", "") or None
    if recipe is not None:
        recipe_named(recipe).check(record.family)
    return own, replace(settings, recipe=recipe)


def make_plan(defaults: SamplingDefaults | None, settings: Settings) -> Plan:
    """Fill what is None from the defaults. Raises BadRequest when something is left open."""
    filled = fill(defaults, settings)
    solver, steps, shift, guidance = (
        getattr(filled, name) for name in ("solver", "steps", "shift", "guidance")
    )
    if solver is None or steps is None or shift is None or guidance is None:
        raise BadRequest(
            "this denoiser has no sampling defaults: pass solver, steps, shift and guidance"
        )
    schedule = make_schedule(solver, steps=steps, shift=shift, timesteps=filled.timesteps)
    boundary = None if defaults is None else defaults.boundary
    return Plan(solver, schedule, _guidance_per_step(guidance, schedule, boundary))


def fill(defaults: SamplingDefaults | None, settings: Settings) -> Settings:
    """The settings with the defaults, or those of their recipe, for what is None.

    Explicit timesteps stand for steps and shift. Raises BadRequest for both, and for a recipe that
    there is not.
    """
    if settings.recipe is not None:
        defaults = recipe_named(settings.recipe).applied(defaults)
    if settings.timesteps is not None:
        return _distilled(_with_method(settings, defaults))
    known = {
        name: getattr(defaults, name, None) if (value := getattr(settings, name)) is None else value
        for name in ("steps", "shift", "guidance", "solver")
    }
    timesteps = getattr(defaults, "timesteps", None)
    if timesteps is None or settings.steps is not None or settings.shift is not None:
        return Settings(**known)
    return _distilled(Settings(**{**known, "steps": None, "shift": None, "timesteps": timesteps}))


def _with_method(settings: Settings, defaults: SamplingDefaults | None) -> Settings:
    """Settings with timesteps, and the guidance and solver of their recipe where they have one."""
    if settings.recipe is None or defaults is None:
        return settings
    guidance = defaults.guidance if settings.guidance is None else settings.guidance
    return replace(settings, guidance=guidance, solver=settings.solver or defaults.solver)


def _distilled(settings: Settings) -> Settings:
    """The settings of a distilled model, whose timesteps are given."""
    if settings.steps is not None or settings.shift is not None:
        raise BadRequest("timesteps name every step: leave out steps and shift")
    timesteps = _numbers(settings.timesteps)
    return Settings(
        steps=len(timesteps),
        shift=1.0,
        guidance=1.0 if settings.guidance is None else settings.guidance,
        solver=settings.solver or "euler",
        timesteps=timesteps,
    )


def _numbers(timesteps: Any) -> list[float]:
    try:
        if isinstance(timesteps, str):  # whose letters would be numbers of one digit
            raise TypeError
        return [float(t) for t in timesteps]
    except (TypeError, ValueError) as error:
        raise BadRequest(
            f"timesteps must be numbers, as [1000, 750, 500, 250], got {timesteps!r:.80}"
        ) from error


def _guidance_per_step(
    guidance: float | Sequence[float], schedule: Schedule, boundary: float | None
) -> tuple[float, ...]:
    try:
        pair = np.asarray(guidance)
        pair = np.array([]) if pair.dtype.kind in "bUS" else pair.astype(np.float64).reshape(-1)
    except (TypeError, ValueError):
        pair = np.array([])
    if pair.size not in (1, 2) or not ((pair > 0) & (pair <= MAX_GUIDANCE)).all():
        raise BadRequest(
            f"guidance {guidance!r:.80}: expected a number or (low noise, high noise), above 0 and "
            f"of at most {MAX_GUIDANCE}; 1 is no guidance, 0 would leave the prompt out"
        )
    low, high = float(pair[0]), float(pair[-1])
    if low != high and boundary is None:
        raise BadRequest(
            f"guidance {low}, {high} is a (low noise, high noise) pair, "
            f"but this model has one expert: pass one number"
        )
    threshold = 0.0 if boundary is None else boundary * NUM_TRAIN_TIMESTEPS
    # In fp32, as the denoiser sees the timestep when it picks the expert.
    return tuple(high if np.float32(t) >= threshold else low for t in schedule.timesteps)


def _run(
    sessions: Sequence[Callable[..., Array]],
    plan: Plan,
    latent: Array,
    first_frame: Array | None,
) -> Iterator[Step]:
    """The loop over sessions of the prompt, and where it is guided of the negative one."""
    solver = SOLVERS[plan.solver](plan.schedule.sigmas)
    latent = set_first_frame(latent, first_frame)
    solver.begin(latent)
    for index, (timestep, scale) in enumerate(
        zip(plan.schedule.timesteps, plan.guidance, strict=True)
    ):
        given = frame_timesteps(timestep, latent, first_frame)
        velocity = to_fp32_like(sessions[0](latent=latent, timestep=given), latent)
        if scale != 1:
            uncond = to_fp32_like(sessions[1](latent=latent, timestep=given), latent)
            velocity = uncond + scale * (velocity - uncond)
        latent = set_first_frame(solver.step(latent, velocity), first_frame)
        yield Step(index, timestep, latent)


def _check_finite(**inputs: Array | None) -> None:
    """Name an input by what the caller called it, before it becomes part of something else.

    Waits once for a GPU, however many of them are there.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    arrays = [value if is_torch(value) else to_numpy(value) for value in given.values()]
    for name, is_finite in zip(given, finite(arrays).array(), strict=True):
        if not is_finite:
            raise BadRequest(f"{name} has NaN or Inf: expected finite values")


def _check_first_frame(denoiser: Callable[..., Array], latent: Array, first_frame: Array) -> None:
    frames = latent.shape[2]
    expected = [*latent.shape[:2], 1, *latent.shape[3:]]
    inputs = getattr(denoiser, "inputs", {})
    if frames == 1 or ("timestep" in inputs and inputs["timestep"].shape != (frames,)):
        raise BadRequest(
            f"first_frame is for TI2V at more than one latent frame; this latent has {frames} and "
            f"the model takes {inputs['timestep'].shape[0] if inputs else 'other'} timesteps"
        )
    if list(first_frame.shape) != expected:
        raise BadRequest(f"first_frame has shape {list(first_frame.shape)}, expected {expected}")


def frame_timesteps(
    timestep: float, latent: Array, first_frame: Array | None
) -> float | np.ndarray:
    """The timestep, or with a first frame one per latent frame: 0 for the given frame."""
    if first_frame is None:
        return timestep
    return np.array([0.0] + [timestep] * (latent.shape[2] - 1), np.float32)


def set_first_frame(latent: Array, first_frame: Array | None) -> Array:
    """latent with its frame 0 replaced by first_frame if there is one, as a new array."""
    if first_frame is None:
        return latent
    result = latent.clone() if is_torch(latent) else latent.copy()
    result[:, :, :1] = first_frame
    return result


def seeded_noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Standard normal fp32 noise from numpy's PCG64.

    Not the noise that torch.Generator draws for the same seed: to repeat a run made elsewhere, pass
    its own noise.
    """
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
