"""Recorded files are read by an engine's inputs, whatever these are."""

from pathlib import Path

import numpy as np
import pytest

from wanexport.exporter.compare.recorded import read_calls, read_sample_inputs
from wanexport.runtime.bundle.tensorfile import save_arrays
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.program import Input

INPUTS = {
    "latent": Input((1, 2, 3, 2, 2)),
    "timestep": Input((3,)),
    "text": Input((1, 4, 5), draw="rows"),
    "speech": Input((1, 6, 2), draw="rows"),
    "camera": Input((1, 6, 3)),
    "table": Input((7, 2)),  # without a batch
}


def stacked(number: int) -> dict[str, np.ndarray]:
    """Calls whose arrays count upwards; text and speech have fewer rows than the model takes."""
    shapes = {
        "latent": (number, 2, 3, 2, 2),
        "timestep": (number, 3),
        "text": (1, 2, 5),
        "speech": (number, 5, 2),
        "camera": (number, 6, 3),
        "table": (number, 7, 2),
    }
    return {
        name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        for name, shape in shapes.items()
    }


def test_each_input_is_cut_as_the_engine_takes_it(tmp_path: Path) -> None:
    arrays = stacked(2)
    save_arrays(tmp_path / "in", arrays)
    calls = read_calls(tmp_path / "in", INPUTS)
    assert len(calls) == 2
    for index, call in enumerate(calls):
        assert {n: a.shape for n, a in call.items()} == {n: s.shape for n, s in INPUTS.items()}
        for name in ("timestep", "table"):
            np.testing.assert_array_equal(call[name], arrays[name][index])
        for name in ("latent", "camera"):
            np.testing.assert_array_equal(call[name][0], arrays[name][index])
        np.testing.assert_array_equal(call["speech"][0, :5], arrays["speech"][index])
        np.testing.assert_array_equal(call["text"][0, :2], arrays["text"][0])
        assert not call["speech"][0, 5:].any() and not call["text"][0, 2:].any()


def test_one_number_may_stand_for_all_frames(tmp_path: Path) -> None:
    arrays = stacked(2) | {"timestep": np.array([900, 100], np.float32)}
    save_arrays(tmp_path / "in", arrays)
    calls = read_calls(tmp_path / "in", INPUTS)
    assert [call["timestep"].tolist() for call in calls] == [[900], [100]]


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("table", (2, 7, 3), "table is [2, 7, 3], expected [2, 7, 2]"),
        ("table", (7, 2), "table is [7, 2], expected [2, 7, 2]"),
        ("camera", (3, 6, 3), "camera is [3, 6, 3], expected [2, 6, 3]"),
        ("timestep", (2, 4), "timestep is [2, 4], expected [2, 3]"),
        ("speech", (2, 7, 2), "speech has 7 rows"),
        ("pose", (2, 1), "pose not expected"),
    ],
)
def test_what_the_engine_does_not_take_is_named(
    name: str, shape: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    save_arrays(tmp_path / "in", stacked(2) | {name: np.zeros(shape, np.float32)})
    with pytest.raises(BadRequest) as refused:
        read_calls(tmp_path / "in", INPUTS)
    assert said in str(refused.value)


def test_a_loop_takes_the_engines_other_inputs(tmp_path: Path) -> None:
    given = {n: np.zeros(2, np.float32) for n in ("text", "negative", "noise", "camera", "speech")}
    save_arrays(tmp_path / "in", given)
    assert read_sample_inputs(tmp_path / "in", INPUTS).keys() == given.keys()


@pytest.mark.parametrize("name", ["image", "latent", "timestep", "velocity"])
def test_a_loop_takes_nothing_else(name: str, tmp_path: Path) -> None:
    save_arrays(tmp_path / "in", {n: np.zeros(2, np.float32) for n in ("text", name)})
    with pytest.raises(BadRequest, match=r"expected text, and of speech, camera, table, negative"):
        read_sample_inputs(tmp_path / "in", INPUTS)
