"""The steps of a run as the device ends them, each found to be without NaN and Inf."""

from collections import deque
from collections.abc import Iterable, Iterator

from wanexport.runtime.errors import EngineFailure
from wanexport.runtime.host_copy import HostCopy, finite
from wanexport.runtime.sample import Step


def finished_steps(steps: Iterable[Step], engine: str) -> Iterator[Step]:
    """Give each step when it is done and was looked at; the last when nothing more runs.

    A GPU has the next step to go on with meanwhile, so that it never waits for the host. Raises
    EngineFailure, with the engine's name, for a latent with NaN or Inf, and what `steps` raises.
    """
    launched: deque[tuple[Step, HostCopy]] = deque()
    for step in steps:
        launched.append((step, finite([step.latent])))
        while launched and (len(launched) > 1 or launched[0][1].is_there()):
            yield _checked(*launched.popleft(), engine)
    while launched:
        yield _checked(*launched.popleft(), engine)


def not_finite(engine: str, where: str) -> EngineFailure:
    """What is raised for a latent with NaN or Inf."""
    return EngineFailure(
        f"engine {engine} gave NaN or Inf in {where}: "
        f"check the inputs, or use an engine in fp32 (--dtype fp32)"
    )


def check_step(step: Step, engine: str) -> None:
    """Wait for a step and look at it. Raises EngineFailure for a latent with NaN or Inf."""
    _checked(step, finite([step.latent]), engine)


def _checked(step: Step, is_finite: HostCopy, engine: str) -> Step:
    if not is_finite.array().all():
        raise not_finite(engine, f"step {step.index}")
    return step
