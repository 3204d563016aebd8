"""The engine of ONNX Runtime on a CPU: one session a weights file, state in and out, memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.bundle.small_bundle import weights_record
from tests.runtime.engines.small_onnx import INPUTS, STATE, expected, inputs, write_graph
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.engines.onnx import OnnxEngine, OnnxSession
from wanexport.runtime.errors import BundleError, EngineFailure
from wanexport.runtime.machine import memory as machine_memory
from wanexport.runtime.program import WHOLE, Call, Input, Program, TensorSpec

PLAIN = Program(
    inputs={name: Input(shape) for name, shape in INPUTS.items()},
    outputs={"velocity": TensorSpec(INPUTS["latent"])},
    calls=(Call("any", tuple(INPUTS), ("velocity",)),),
).whole()
KEEPING = Program(
    inputs=PLAIN.inputs,
    outputs=PLAIN.outputs,
    calls=(Call("any", tuple(INPUTS), ("velocity",), state=("memory.{i}",)),),
    state={"memory.{i}": TensorSpec((1,))},
).whole()


@pytest.fixture
def files(tmp_path: Path) -> list[PinnedFile]:
    """Two weights files of one layout."""
    names = ("base", "style")
    records = [weights_record(tmp_path, name, seed=seed) for seed, name in enumerate(names)]
    return [pin(tmp_path / record.file.path) for record in records]


Open = Callable[..., OnnxEngine]


@pytest.fixture
def open_engine(tmp_path: Path, files: list[PinnedFile]) -> Open:
    """Opens an engine of the graph with the first file."""

    def opened(*, with_state: bool = False, **options: Any) -> OnnxEngine:
        graph = pin(write_graph(tmp_path / "denoiser.onnx", with_state=with_state))
        return OnnxEngine({WHOLE: graph}, files[0], KEEPING if with_state else PLAIN, **options)

    return opened


def close_to(velocity: np.ndarray, exact: np.ndarray) -> bool:
    return bool(np.abs(velocity - exact).max() < 1e-3)


def test_a_call_has_the_weights_of_the_file_that_it_names(
    open_engine: Open, files: list[PinnedFile]
) -> None:
    engine = open_engine()
    for file in (files[0], files[1], files[0]):
        assert close_to(engine(inputs(), file), expected(inputs(), file.path))
    assert close_to(engine(inputs()), expected(inputs(), files[0].path))  # those it has by now


def test_a_session_is_opened_once_for_a_file(
    open_engine: Open, files: list[PinnedFile], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine, opened, own = open_engine(), list[Path](), OnnxSession.__init__

    def counted(self: OnnxSession, graph: Any, weights: Any, **options: Any) -> None:
        opened.append(weights.path)
        own(self, graph, weights, **options)

    monkeypatch.setattr(OnnxSession, "__init__", counted)
    engine(inputs(), files[0])
    assert opened == []
    engine.use(files[1])
    engine(inputs(), files[1])
    assert opened == [files[1].path]
    (tmp_path / "link").symlink_to(files[1].path)  # the same file by another name
    engine(inputs(), pin(tmp_path / "link"))
    assert opened == [files[1].path]


def test_a_file_that_cannot_be_opened_leaves_the_session(
    open_engine: Open, files: list[PinnedFile]
) -> None:
    engine = open_engine()
    files[1].path.unlink()
    with pytest.raises(BundleError, match="cannot read"):
        engine.use(files[1])
    assert close_to(engine(inputs()), expected(inputs(), files[0].path))


def test_a_state_goes_from_call_to_call_and_begins_as_zeros(
    open_engine: Open, files: list[PinnedFile]
) -> None:
    engine = open_engine(with_state=True)
    mine, theirs = engine.memory(), engine.memory()
    assert list(mine.state) == [STATE] and mine.state[STATE].tolist() == [0.0]
    exact = expected(inputs(), files[0].path)
    for step in range(3):
        assert close_to(engine(inputs(), files[0], mine), exact + step)
        assert mine.state[STATE].tolist() == [step + 1.0]
    assert close_to(engine(inputs(), files[0], theirs), exact)
    assert close_to(engine(inputs(), files[0]), exact)  # without a memory every call begins anew


def test_a_state_outlives_a_change_of_weights(open_engine: Open, files: list[PinnedFile]) -> None:
    engine = open_engine(with_state=True)
    memory = engine.memory()
    for step, file in enumerate((files[0], files[1], files[0])):
        assert close_to(engine(inputs(), file, memory), expected(inputs(), file.path) + step)


def test_an_engine_that_needs_more_memory_than_there_is_is_refused(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = machine_memory.limit_bytes() + 10**9
    with pytest.raises(EngineFailure, match=r"attention .* needs \d+ GB, of .*smaller --resol"):
        open_engine(needs=needs)(inputs())
    monkeypatch.setattr("wanexport.runtime.engines.onnx.limit_bytes", lambda: needs)
    assert open_engine(needs=needs)(inputs()).shape == INPUTS["latent"]


def test_what_onnx_runtime_cannot_run_is_one_line(open_engine: Open) -> None:
    given = {**inputs(), "text": np.zeros((1, 9, 32), np.float32)}
    with pytest.raises(EngineFailure, match="ONNX Runtime cannot run the engine: ") as refused:
        open_engine()(given)
    assert "\n" not in str(refused.value)


def test_a_closed_engine_says_so(open_engine: Open, files: list[PinnedFile]) -> None:
    engine = open_engine()
    engine.close()
    engine.close()
    calls: tuple[Callable[[], Any], ...] = (
        lambda: engine(inputs()),
        lambda: engine(inputs(), files[0]),
        lambda: engine(inputs(), files[0], Memory()),
        lambda: engine.use(files[1]),
    )
    for call in calls:
        with pytest.raises(EngineFailure, match="was closed: load it again"):
            call()
