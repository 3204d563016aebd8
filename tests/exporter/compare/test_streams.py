"""`compare` of a causal engine: it passes a good one, and sees a fault where it is made."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from tests.runtime.causal_engine import CausalEngine, causal_denoiser, geometry_of, text_of
from tests.runtime.test_denoiser import record
from wanexport.exporter.compare.peers import EXACT, Peers
from wanexport.exporter.compare.recorded import Loop
from wanexport.exporter.compare.request import CompareRequest
from wanexport.exporter.compare.streams import StreamRows, check_streamed, stream_rows
from wanexport.graphs.config import PRESETS
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.errors import BadRequest

GEOMETRY = geometry_of(9)
ROWS = [f"{chunk}.{what}" for chunk in range(3) for what in (0, 1, 2, 3, "commit")]


def rows(
    spoil: Callable[[CausalEngine], None] = lambda engine: None,
    request: CompareRequest | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> StreamRows:
    denoiser, engine = causal_denoiser(GEOMETRY)
    spoil(engine)
    peers = Peers({EXACT: causal_denoiser(GEOMETRY)[0]}, None)
    given = Loop({"text": text_of(), **(inputs or {})}, 4)
    return stream_rows(denoiser, peers, given, request or CompareRequest(), lambda *_: None)


def failed(found: StreamRows) -> list[str]:
    return [row["step"] for row in found.rows if not row["passed"]]


def test_a_good_engine_passes_step_by_step_and_commit_by_commit() -> None:
    found = rows()
    assert [row["step"] for row in found.rows] == ROWS and found.passed
    assert all(row["error"] == 0 == row["drift"] and row["floor"] is None for row in found.rows)
    assert len(found.seconds) == len(found.reference_seconds) == 12


@pytest.mark.parametrize("policy", [{"window": 5}, {"window": 7, "sink": 1}, {"max_attention": 4}])
def test_windows_are_compared_as_they_are_asked(policy: dict[str, int]) -> None:
    found = rows(request=CompareRequest(chunks=2, **policy))  # type: ignore[arg-type]
    assert [row["step"] for row in found.rows] == ROWS[:10] and found.passed


def test_noise_of_a_file_says_how_many_chunks_there_are() -> None:
    noise = np.random.default_rng(0).standard_normal((1, 16, 4, 4, 6), np.float32)
    found = rows(inputs={"noise": noise})
    assert [row["step"] for row in found.rows] == ROWS[:10]


def after(
    change: Callable[[dict[str, Any], Memory, str, int], None],
) -> Callable[[CausalEngine], None]:
    """Change what an engine has done, before its caller sees it: inputs, memory, moment, number."""

    def spoil(engine: CausalEngine) -> None:
        run, calls = type(engine).__call__, [0]

        class Spoilt(CausalEngine):
            def __call__(
                self, inputs: Any, weights: Any = None, memory: Any = None, moment: str = "step"
            ) -> Any:
                found = run(self, inputs, weights, memory, moment)
                calls[0] += 1
                change(dict(inputs), memory, moment, calls[0])
                return found

        engine.__class__ = Spoilt

    return spoil


def test_a_commit_that_keeps_nothing_is_seen_at_once_and_in_later_steps() -> None:
    """What the last step wrote stays, as where a commit is left out."""

    def spoil(engine: CausalEngine) -> None:
        class Forgetful(CausalEngine):
            def __call__(
                self, inputs: Any, weights: Any = None, memory: Any = None, moment: str = "step"
            ) -> Any:
                return super().__call__(inputs, weights, memory) if moment == "step" else None

        engine.__class__ = Forgetful

    assert failed(rows(spoil)) == ["0.commit", *ROWS[5:]]


def test_a_fault_in_one_layers_cache_is_seen_where_it_was_made() -> None:
    def change(_: Any, memory: Memory, moment: str, number: int) -> None:
        if moment == "commit" and number == 10:  # that of the second chunk
            memory.state["cache_v.1"][:, 18:36] *= 1.001

    assert failed(rows(after(change))) == ["1.commit", *ROWS[10:]]


def test_nan_in_the_cache_fails() -> None:
    def change(_: Any, memory: Memory, moment: str, number: int) -> None:
        if moment == "commit" and number == 5:
            memory.state["cache_k.0"][:, 0] = torch.nan

    found = rows(after(change))
    assert failed(found) == ROWS[4:]
    commit = found.rows[4]
    assert commit["error"] is None and commit["nan"] > 0


def test_an_engine_that_is_lost_on_its_own_fails() -> None:
    """Forced it is right; of its own loop, which comes after, each velocity is off."""

    def spoil(engine: CausalEngine) -> None:
        class Drifting(CausalEngine):
            forced = 15

            def __call__(
                self, inputs: Any, weights: Any = None, memory: Any = None, moment: str = "step"
            ) -> Any:
                found = super().__call__(inputs, weights, memory, moment)
                self.forced -= 1
                return found if self.forced >= 0 or found is None else found * np.nan

        engine.__class__ = Drifting

    found = rows(spoil)
    assert failed(found) == ROWS and all(row["error"] == 0 for row in found.rows)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"against": "onnx"}, "leave --against out"),
        ({"bisect": True}, "leave --bisect out"),
        ({"reference": "diffusers"}, "leave --reference diffusers out"),
        ({"calls": "calls.safetensors"}, "leave --calls out"),
    ],
)
def test_what_a_stream_is_not_compared_with_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest, match=f"a causal engine is compared with our graph, .*{said}"):
        check_streamed(CompareRequest(**asked), GEOMETRY, saves=False)
    with pytest.raises(BadRequest, match="leave --save-inputs and --save-outputs out"):
        check_streamed(CompareRequest(), GEOMETRY, saves=True)


@pytest.mark.parametrize("option", ["chunks", "window", "sink", "max_attention"])
def test_an_engine_that_is_not_causal_has_no_window(option: str) -> None:
    request = CompareRequest(**{option: 1})  # type: ignore[arg-type]
    whole = record(PRESETS["tiny"].config).geometry
    with pytest.raises(BadRequest, match=f"--{option.replace('_', '-')} is for causal engines"):
        check_streamed(request, whole, saves=False)
    check_streamed(CompareRequest(), whole, saves=True)
