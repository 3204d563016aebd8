"""How distilled models of Wan are sampled: few steps, without guidance, by name."""

from dataclasses import dataclass, replace

from wanexport.runtime.errors import BadRequest, printable
from wanexport.runtime.family import SamplingDefaults

_A14B = ("t2v-a14b", "i2v-a14b")


@dataclass(frozen=True)
class Recipe:
    """The settings that a distilled model was trained for, which replace its family's defaults.

    There are explicit timesteps, in which the shift is already, or steps, with the family's own
    shift where there is none. `source` is where its makers say so. Guidance is 1.
    """

    families: tuple[str, ...]
    solver: str
    source: str
    timesteps: tuple[float, ...] | None = None
    steps: int | None = None
    shift: float | None = None

    def check(self, family: str) -> None:
        """Raise BadRequest when the recipe is for models of other families."""
        if family not in self.families:
            raise BadRequest(
                f"this recipe is for {', '.join(self.families)}, the model is {family}: choose "
                f"one of {', '.join(name for name, r in RECIPES.items() if family in r.families)}"
            )

    def applied(self, defaults: SamplingDefaults | None) -> SamplingDefaults:
        """The defaults, if there are any, with what the recipe says in their place."""
        own = defaults or _NOTHING
        return replace(
            own,
            steps=self.steps or len(self.timesteps or ()),
            shift=own.shift if self.shift is None else self.shift,
            guidance=(1.0, 1.0),
            solver=self.solver,
            timesteps=self.timesteps,
        )


_NOTHING = SamplingDefaults(1, 1.0, (1.0, 1.0), None, fps=16)


def _warped(shift: float, *timesteps: float) -> tuple[float, ...]:
    """Timesteps of an even grid as the shift moves them: 1000 s t / (1000 + (s - 1) t)."""
    return tuple(1000 * shift * t / (1000 + (shift - 1) * t) for t in timesteps)


_FOUR = _warped(5.0, 1000, 750, 500, 250)
RECIPES: dict[str, Recipe] = {
    # Of two experts each takes two steps: the third timestep, 833, is below either boundary.
    "lightning-4": Recipe(
        _A14B,
        "euler",
        "ModelTC/Wan2.2-Lightning: wan/configs/wan_t2v_A14B.py, wan_i2v_A14B.py; generate.py",
        timesteps=_FOUR,
    ),
    "lightx2v-4": Recipe(
        ("t2v", "i2v", *_A14B),
        "euler",
        "ModelTC/LightX2V: configs/distill/wan21, wan22; "
        "lightx2v/models/schedulers/wan/step_distill/scheduler.py",
        timesteps=_FOUR,
    ),
    # Its LoRA, at strength 0.3; its makers publish no settings for the model that is not causal.
    "causvid": Recipe(
        ("t2v", "i2v"), "unipc", "deepbeepmeep/Wan2GP, issues 260 and 264", steps=12, shift=7.0
    ),
    "fastwan": Recipe(
        ("t2v", "ti2v"),
        "renoise",
        "hao-ai-lab/FastVideo: fastvideo/pipelines/stages/denoising.py, configs/pipelines/wan.py",
        timesteps=(1000.0, 757.0, 522.0),
    ),
    "accvideo": Recipe(("i2v",), "unipc", "aejion/AccVideo: README, sample_wanx_i2v.py", steps=10),
}


def recipe_named(name: str) -> Recipe:
    """A recipe by name. Raises BadRequest when there is none."""
    if name not in RECIPES:
        raise BadRequest(
            f"unknown recipe {printable(name)!r}: expected one of {', '.join(RECIPES)}"
        )
    return RECIPES[name]
