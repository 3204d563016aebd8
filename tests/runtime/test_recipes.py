"""The settings of distilled models: what their makers state, and how they become a plan."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wanexport.runtime.errors import BadRequest
from wanexport.runtime.family import FAMILIES, SamplingDefaults
from wanexport.runtime.recipes import RECIPES, recipe_named
from wanexport.runtime.sample import fill, make_plan, plan_of, with_recipe
from wanexport.runtime.settings import Settings
from wanexport.runtime.solvers import SOLVERS

A14B = ("t2v-a14b", "i2v-a14b")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_plan_without_guidance_for_its_families(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.source and {*recipe.families} <= {*FAMILIES}
    for family in recipe.families:
        recipe.check(family)
        plan = make_plan(FAMILIES[family].sampling, Settings(recipe=name))
        assert set(plan.guidance) == {1.0} and plan.solver == recipe.solver
    others = FAMILIES.keys() - {*recipe.families}
    for family in others:
        with pytest.raises(BadRequest, match="this recipe is for"):
            recipe.check(family)


@pytest.mark.parametrize("family", A14B)
@pytest.mark.parametrize("name", ["lightning-4", "lightx2v-4"])
def test_four_steps_are_two_of_each_expert_at_shift_5(name: str, family: str) -> None:
    """Wan2.2-Lightning: steps 4, shift 5; LightX2V: 1000, 750, 500, 250, boundary_step_index 2."""
    defaults = FAMILIES[family].sampling
    plan = make_plan(defaults, Settings(recipe=name))
    sigmas = [5 * s / (1 + 4 * s) for s in (1, 0.75, 0.5, 0.25)]
    np.testing.assert_allclose(plan.schedule.sigmas, [*sigmas, 0], rtol=1e-6)
    np.testing.assert_allclose(plan.schedule.timesteps, np.multiply(sigmas, 1000), rtol=1e-12)
    assert defaults.boundary is not None
    high = [t >= 1000 * defaults.boundary for t in plan.schedule.timesteps]
    assert high == [True, True, False, False]


def test_what_is_given_replaces_a_recipes_own() -> None:
    defaults = FAMILIES["t2v"].sampling
    plan = make_plan(defaults, Settings(recipe="lightx2v-4", solver="unipc", guidance=2.0))
    assert (plan.solver, set(plan.guidance), len(plan)) == ("unipc", {2.0}, 4)
    plan = make_plan(defaults, Settings(recipe="lightx2v-4", steps=8, shift=3.0))
    assert len(plan) == 8 and plan.solver == "euler"
    plan = make_plan(defaults, Settings(recipe="causvid", timesteps=[1000, 500]))
    assert plan.schedule.timesteps == (1000, 500)
    assert make_plan(None, Settings(recipe="fastwan")).schedule.timesteps == (1000, 757, 522)
    plan = make_plan(defaults, Settings(recipe="fastwan", timesteps=[1000, 500]))
    assert (plan.solver, set(plan.guidance)) == ("renoise", {1.0})
    with pytest.raises(BadRequest, match="unknown recipe 'x': expected one of lightning-4, "):
        make_plan(defaults, Settings(recipe="x"))


def test_a_recipe_without_a_shift_keeps_that_of_the_family() -> None:
    small = replace(FAMILIES["i2v"].sampling, shift=3.0)
    applied = recipe_named("accvideo").applied(small)
    assert (applied.steps, applied.shift, applied.solver) == (10, 3.0, "unipc")


class OfASet:
    """A denoiser whose weights set has a recipe."""

    record = SimpleNamespace(family="i2v", sampling=FAMILIES["i2v"].sampling)
    recipe = "causvid"


def test_a_recipe_at_a_run_stands_in_the_place_of_the_sets() -> None:
    own = plan_of(OfASet(), Settings())
    assert (len(own), own.solver) == (12, "unipc")
    asked, settings = with_recipe(OfASet(), Settings(recipe="accvideo"))
    assert fill(asked, settings).shift == FAMILIES["i2v"].sampling.shift  # not causvid's 7
    assert plan_of(OfASet(), Settings(timesteps=[1000, 500])).solver == "unipc"
    with pytest.raises(BadRequest, match="this recipe is for t2v-a14b, i2v-a14b, the model is i2v"):
        plan_of(OfASet(), Settings(recipe="lightning-4"))


def test_defaults_with_timesteps_are_used_unless_steps_are_said() -> None:
    own = SamplingDefaults(2, 1.0, (1.0, 1.0), None, 16, "renoise", (900.0, 300.0))
    assert make_plan(own, Settings()).schedule.timesteps == (900, 300)
    assert make_plan(own, Settings()).solver == "renoise"
    assert len(make_plan(own, Settings(steps=5))) == 5


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_renoise_is_the_loop_of_its_makers(kind: type) -> None:
    """x0 = x - s v, then x = (1 - s') x0 + s' noise; the last step returns x0."""
    sigmas = (1.0, 0.757, 0.522, 0.0)
    rng = np.random.default_rng(3)
    latent = rng.standard_normal((1, 2, 3, 4, 4), np.float32)
    velocities = rng.standard_normal((3, 1, 2, 3, 4, 4), np.float32)
    solver, x = SOLVERS["renoise"](sigmas), kind(latent)
    expected, draws = latent.astype(np.float64), None
    for index, velocity in enumerate(velocities):
        x = solver.step(x, kind(velocity))
        if draws is None:
            bits = latent.reshape(-1)[-8:].view(np.uint32)
            draws = np.random.default_rng([int(b) for b in bits])
        x0 = expected - sigmas[index] * velocity
        after = sigmas[index + 1]
        noise = draws.standard_normal(latent.shape, np.float32) if after else 0.0
        expected = (1 - after) * x0 + after * noise
        np.testing.assert_allclose(np.asarray(x), expected, atol=1e-6)
    assert not np.array_equal(
        SOLVERS["renoise"](sigmas).step(latent, velocities[0]),
        SOLVERS["renoise"](sigmas).step(latent + 1, velocities[0]) - 1,
    )
