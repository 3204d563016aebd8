"""Settings are the keywords of `sample`, kept from who may change them."""

import inspect
from dataclasses import fields

import numpy as np
import pytest

from wanexport.runtime.sample import sample
from wanexport.runtime.settings import Settings, SettingsKeywords


def test_settings_are_what_sample_takes_by_these_names() -> None:
    names = {field.name for field in fields(Settings)}
    assert names == SettingsKeywords.__annotations__.keys()
    own = inspect.signature(sample).parameters
    assert names <= own.keys()
    assert all(own[name].default is None for name in names)
    assert set(vars(Settings()).values()) == {None}


def test_settings_keep_the_numbers_that_they_were_given() -> None:
    timesteps, guidance = [900.0, 500.0], np.array([3.0, 4.0])
    settings = Settings(guidance=guidance, timesteps=timesteps)  # type: ignore[arg-type]
    used_up = Settings(timesteps=iter(timesteps))  # type: ignore[arg-type]
    timesteps[0], guidance[1] = 800.0, 1.0
    assert settings == Settings(guidance=(3.0, 4.0), timesteps=(900.0, 500.0))
    assert used_up.timesteps == (900.0, 500.0)


@pytest.mark.parametrize("given", [5, np.array(5.0), "900,500", None])
def test_what_is_no_list_is_left_to_be_refused(given: object) -> None:
    settings = Settings(guidance=given, timesteps=given)  # type: ignore[arg-type]
    assert settings.guidance is given and settings.timesteps is given
