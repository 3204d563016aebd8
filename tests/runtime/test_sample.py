"""The loop: guidance, experts, distilled schedules and the TI2V first frame."""

from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from wanexport.runtime.errors import BadRequest
from wanexport.runtime.family import SamplingDefaults
from wanexport.runtime.program import TensorSpec
from wanexport.runtime.sample import denoise, make_plan, sample, seeded_noise
from wanexport.runtime.settings import Settings

T2V = SamplingDefaults(steps=50, shift=5.0, guidance=(5.0, 5.0), boundary=None, fps=16)
A14B = SamplingDefaults(steps=40, shift=12.0, guidance=(3.0, 4.0), boundary=0.875, fps=16)
TEXT = np.ones((3, 4096), np.float32)
NEGATIVE = -TEXT


class FakeDenoiser:
    """velocity = 0.5 * latent + text[0, 0], and a record of what it was given."""

    def __init__(self, defaults: SamplingDefaults | None) -> None:
        if defaults is not None:
            self.sampling = defaults
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **inputs: Any) -> Any:
        self.calls.append(inputs)
        return 0.5 * inputs["latent"] + float(inputs["text"][0, 0])


def noise(frames: int = 2) -> np.ndarray:
    return seeded_noise((1, 4, frames, 2, 2), 0)


def test_guidance_combines_cond_first_then_uncond() -> None:
    denoiser = FakeDenoiser(T2V)
    (step,) = sample(
        denoiser, noise=noise(), text=TEXT, negative=NEGATIVE, solver="euler", steps=1, guidance=3.0
    )
    assert [call["text"][0, 0] for call in denoiser.calls] == [1, -1]
    cond, uncond = 0.5 * noise() + 1, 0.5 * noise() - 1
    np.testing.assert_allclose(step.latent, noise() - (uncond + 3 * (cond - uncond)), rtol=1e-6)


def test_guidance_of_one_calls_the_model_once_a_step() -> None:
    denoiser = FakeDenoiser(T2V)
    steps = list(sample(denoiser, noise=noise(), text=TEXT, steps=3, guidance=1.0))
    assert len(denoiser.calls) == len(steps) == 3
    assert [step.index for step in steps] == [0, 1, 2]


class OfSessions(FakeDenoiser):
    """A denoiser that makes sessions, and a record of what they were opened with."""

    def __init__(self, defaults: SamplingDefaults) -> None:
        super().__init__(defaults)
        self.opened: list[dict[str, Any]] = []

    def session(self, **constant: Any) -> Any:
        self.opened.append(constant)
        return partial(self, **constant)


def test_a_run_opens_one_session_for_the_prompt_and_one_for_the_negative() -> None:
    plain, denoiser, image = FakeDenoiser(T2V), OfSessions(T2V), np.ones((1, 2), np.float32)
    settings: dict[str, Any] = {"text": TEXT, "negative": NEGATIVE, "steps": 3, "image": image}
    step = denoise(denoiser, noise=noise(), **settings, condition=None)
    assert [given["text"] is text for given, text in zip(denoiser.opened, (TEXT, NEGATIVE))]
    assert len(denoiser.opened) == 2 and all(g["image"] is image for g in denoiser.opened)
    assert not any("condition" in call for call in denoiser.calls)
    own = denoise(plain, noise=noise(), **settings)
    assert len(plain.calls) == len(denoiser.calls) == 6
    assert all(call.keys() == {"latent", "timestep", "text", "image"} for call in plain.calls)
    np.testing.assert_array_equal(step.latent, own.latent)
    assert step.index == 2


def test_without_guidance_there_is_no_session_for_the_negative() -> None:
    denoiser = OfSessions(T2V)
    denoise(denoiser, noise=noise(), text=TEXT, negative=NEGATIVE, steps=2, guidance=1.0)
    assert len(denoiser.opened) == 1 and len(denoiser.calls) == 2


def test_defaults_come_from_the_denoiser() -> None:
    plan = make_plan(T2V, Settings())
    assert (plan.solver, len(plan), set(plan.guidance)) == ("unipc", 50, {5.0})


def test_two_experts_have_their_own_guidance() -> None:
    plan = make_plan(A14B, Settings())
    high = [t for t, g in zip(plan.schedule.timesteps, plan.guidance) if g == 4.0]
    low = [t for t, g in zip(plan.schedule.timesteps, plan.guidance) if g == 3.0]
    assert (len(high), len(low)) == (26, 14)
    assert min(high) >= 875 > max(low)


def test_distilled_steps_are_euler_without_guidance() -> None:
    times = [1000, 937.5, 833.333, 625]
    denoiser = FakeDenoiser(A14B)
    steps = list(sample(denoiser, noise=noise(), text=TEXT, timesteps=times))
    assert [call["timestep"] for call in denoiser.calls] == times
    x = noise().astype(np.float64)
    for now, after in zip(times, [*times[1:], 0]):
        x = x + (after - now) / 1000 * (0.5 * x + 1)
    np.testing.assert_allclose(steps[-1].latent, x, rtol=1e-5, atol=1e-6)


def test_first_frame_is_blended_and_has_timestep_zero() -> None:
    denoiser = FakeDenoiser(T2V)
    frame = np.full((1, 4, 1, 2, 2), 7.0, np.float32)
    start = noise(3)
    steps = list(sample(denoiser, noise=start, text=TEXT, first_frame=frame, steps=2, guidance=1.0))
    np.testing.assert_array_equal(start, noise(3))
    for call in denoiser.calls:
        np.testing.assert_array_equal(call["latent"][:, :, :1], frame)
        assert call["timestep"][0] == 0
        assert len(set(call["timestep"][1:])) == 1
        assert call["timestep"][1] > 0
    for step in steps:
        np.testing.assert_array_equal(step.latent[:, :, :1], frame)
    np.testing.assert_array_equal(denoiser.calls[0]["latent"][:, :, 1:], noise(3)[:, :, 1:])


def test_yielded_latents_are_not_overwritten_later() -> None:
    frame = np.zeros((1, 4, 1, 2, 2), np.float32)
    run = sample(
        FakeDenoiser(T2V), noise=noise(), text=TEXT, first_frame=frame, steps=3, guidance=1.0
    )
    first = next(run).latent
    kept = first.copy()
    list(run)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_torch_and_numpy_take_the_same_steps(solver: str) -> None:
    settings: dict[str, Any] = {"solver": solver, "steps": 5}
    arrays = sample(FakeDenoiser(T2V), noise=noise(), text=TEXT, negative=NEGATIVE, **settings)
    tensors = sample(
        FakeDenoiser(T2V),
        noise=torch.from_numpy(noise()),
        text=torch.from_numpy(TEXT),
        negative=torch.from_numpy(NEGATIVE),
        first_frame=None,
        **settings,
    )
    for one, other in zip(arrays, tensors):
        assert isinstance(other.latent, torch.Tensor)
        np.testing.assert_allclose(one.latent, other.latent.numpy(), rtol=1e-6, atol=1e-6)


def test_settings_that_do_not_fit_are_refused_before_any_work() -> None:
    denoiser = FakeDenoiser(T2V)
    with pytest.raises(BadRequest, match="needs negative"):
        sample(denoiser, noise=noise(), text=TEXT)
    with pytest.raises(BadRequest, match="one expert"):
        sample(denoiser, noise=noise(), text=TEXT, negative=NEGATIVE, guidance=(3.0, 4.0))
    with pytest.raises(BadRequest, match="leave out steps and shift"):
        sample(denoiser, noise=noise(), text=TEXT, timesteps=[900, 500], steps=2)
    with pytest.raises(BadRequest, match="expected a number or"):
        sample(denoiser, noise=noise(), text=TEXT, guidance=(1, 2, 3))  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="expected a number or"):
        sample(denoiser, noise=noise(), text=TEXT, guidance=float("nan"))
    with pytest.raises(BadRequest, match=r"expected \[1, C, F, h, w\]"):
        sample(denoiser, noise=noise()[0], text=TEXT, guidance=1)
    with pytest.raises(BadRequest, match="no sampling defaults"):
        sample(FakeDenoiser(None), noise=noise(), text=TEXT, steps=3)
    assert denoiser.calls == []


def test_a_first_frame_of_another_shape_is_refused() -> None:
    frame = np.zeros((1, 4, 2, 2, 2), np.float32)
    with pytest.raises(BadRequest, match=r"\[1, 4, 2, 2, 2\], expected \[1, 4, 1, 2, 2\]"):
        sample(FakeDenoiser(T2V), noise=noise(), text=TEXT, guidance=1, first_frame=frame)


def test_a_first_frame_needs_a_model_with_a_timestep_per_frame() -> None:
    class T2VDenoiser(FakeDenoiser):
        inputs: ClassVar = {"timestep": TensorSpec((1,))}

    frame = np.zeros((1, 4, 1, 2, 2), np.float32)
    for denoiser, frames in ((T2VDenoiser(T2V), 2), (FakeDenoiser(T2V), 1)):
        with pytest.raises(BadRequest, match="first_frame is for TI2V"):
            sample(denoiser, noise=noise(frames), text=TEXT, guidance=1, first_frame=frame)


def test_a_first_frame_may_be_of_the_other_kind() -> None:
    frame = np.zeros((1, 4, 1, 2, 2), np.float32)
    settings: dict[str, Any] = {"text": TEXT, "guidance": np.float32(1), "steps": 2}
    mixed = (
        (torch.from_numpy(noise()), frame),
        (noise(), torch.from_numpy(frame).bfloat16()),
    )
    for start, given in mixed:
        *_, last = sample(FakeDenoiser(T2V), noise=start, first_frame=given, **settings)
        assert type(last.latent) is type(start)


def test_expert_and_guidance_agree_at_the_boundary() -> None:
    plan = make_plan(A14B, Settings(timesteps=[900, 874.999999], guidance=(3.0, 4.0)))
    assert plan.guidance == (4.0, 4.0)  # 874.999999 is 875 in fp32, where the expert is chosen


def test_noise_depends_on_the_seed_alone() -> None:
    np.testing.assert_array_equal(seeded_noise((4, 4), 3), seeded_noise((4, 4), 3))
    assert not np.array_equal(seeded_noise((4, 4), 3), seeded_noise((4, 4), 4))


def test_guidance_is_combined_in_fp32_whatever_the_model_returns() -> None:
    def half(latent: torch.Tensor, text: torch.Tensor, **_: Any) -> torch.Tensor:
        return (latent * 0 + text[0, 0]).bfloat16()

    texts: dict[str, Any] = {
        "text": torch.full((1, 1), 1.0),
        "negative": torch.full((1, 1), 1 / 256),
    }
    start = torch.zeros(1, 1, 1, 1, 1)
    settings: dict[str, Any] = {"solver": "euler", "steps": 1, "shift": 1.0, "guidance": 3.0}
    (step,) = sample(half, noise=start, **texts, **settings)
    assert step.latent.item() == -(1 / 256 + 3 * (1 - 1 / 256))  # bf16 would round it


@pytest.mark.parametrize("name", ["noise", "text", "negative", "first_frame"])
def test_inputs_that_are_not_finite_are_named_as_they_were_given(name: str) -> None:
    inputs = {n: np.ones((3, 8), np.float32) for n in ("text", "negative")}
    inputs |= {
        n: np.ones((1, 16, f, 4, 4), np.float32) for n, f in (("noise", 3), ("first_frame", 1))
    }
    inputs[name].flat[1] = np.nan
    settings = {"solver": "euler", "steps": 2, "shift": 5.0, "guidance": 5.0}
    with pytest.raises(BadRequest, match=f"{name} has NaN or Inf"):
        list(sample(lambda **_: inputs["noise"], **inputs, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": "x"}, "expected a number"),
        ({"guidance": 1e39}, "of at most 1000"),
        ({"guidance": True}, "expected a number"),
        ({"guidance": "5"}, "expected a number"),
        ({"guidance": 0}, "above 0 .*; 1 is no guidance, 0 would leave the prompt out"),
        ({"guidance": (3.0, -4.0)}, "above 0"),
        ({"guidance": (3.0, np.nan)}, "above 0"),
        ({"timesteps": (1.0, 0.5)}, "as timesteps: 1000,500$"),
        ({"timesteps": "999"}, "timesteps must be numbers"),
        ({"timesteps": 5}, "timesteps must be numbers"),
        ({"timesteps": [None]}, "timesteps must be numbers"),
        ({"steps": 2.5}, "steps must be from 1"),
        ({"text": "a cat"}, "str is no array of numbers"),
        ({"text": np.ones((0, 8))}, r"text has shape \[0, 8\], no row: expected one for each"),
        ({"negative": torch.ones(1, 0, 8)}, r"negative has shape \[1, 0, 8\], no row"),
    ],
)
def test_settings_of_another_kind_are_refused(settings: dict[str, object], message: str) -> None:
    noise = np.ones((1, 16, 3, 4, 4), np.float32)
    plain = {"text": np.ones((3, 8)), "negative": np.ones((3, 8)), "solver": "euler"}
    if "timesteps" not in settings:
        plain |= {"steps": 2, "shift": 5.0, "guidance": 5.0}
    with pytest.raises(BadRequest, match=message):
        sample(lambda **_: noise, noise=noise, **{**plain, **settings})  # type: ignore[arg-type]
