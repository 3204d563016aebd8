"""The Program of a causal Wan: its calls, what they keep, and what it is refused for."""

from dataclasses import replace

import pytest

from wanexport.graphs.config import PRESETS
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Attention, Input, TensorSpec

CONFIG = PRESETS["self-forcing-1.3b"].config
GEOMETRY = Geometry(480, 832, 81, chunk=3, cache=21)
PROGRAM = program_of(CONFIG, GEOMETRY)


def test_calls_run_once_a_prompt_at_each_step_and_to_keep_a_chunk() -> None:
    rows = [(c.name, c.when, c.repeat, c.first, c.code) for c in PROGRAM.calls]
    assert rows == [
        ("text", "prompt", 1, 0, ""),
        ("text_block", "prompt", 30, 0, ""),
        ("embed", "step", 1, 0, ""),
        ("block", "step", 30, 0, ""),
        ("head", "step", 1, 0, ""),
        ("commit_embed", "commit", 1, 0, "embed"),
        ("commit_block", "commit", 29, 0, "block"),
        ("commit_keep", "commit", 1, 29, ""),
    ]
    assert PROGRAM.fault() == PROGRAM.unfamiliar == "" and not PROGRAM.is_plain


def test_inputs_say_where_a_chunk_is() -> None:
    assert PROGRAM.inputs == {
        "latent": Input((1, 16, 3, 60, 104)),
        "timestep": Input((3,)),
        "text": Input((1, 512, 4096), draw="rows"),
        "position": Input((1,), "I64", draw="place"),
        "slots": Input((3,), "I64", draw="place"),
        "keys": Input((1,), "I64", draw="place"),
    }
    assert PROGRAM.output.shape == (1, 16, 3, 60, 104)


def test_the_state_is_of_every_layer_and_slot() -> None:
    states = PROGRAM.states()
    assert len(states) == 4 * 30
    assert states["cache_k.29"] == TensorSpec((1, 22 * 1560, 12, 128), "engine")
    assert states["text_v.0"] == TensorSpec((1, 512, 12, 128), "engine")
    one = program_of(CONFIG, replace(GEOMETRY, chunk=1))
    assert one.states()["cache_v.0"].shape == (1, 21 * 1560, 12, 128)


def test_attention_is_to_the_cache_and_the_text() -> None:
    assert PROGRAM.attention == {
        "cache": Attention(30, 4680, 32760),
        "text": Attention(30, 4680, 512),
    }


def test_a_model_of_one_layer_keeps_what_its_only_block_makes() -> None:
    program = program_of(replace(CONFIG, num_layers=1), GEOMETRY)
    commits = [(c.name, c.first) for c in program.calls if c.when == "commit"]
    assert commits == [("commit_embed", 0), ("commit_keep", 0)] and program.fault() == ""


def test_a_video_without_chunks_is_refused() -> None:
    with pytest.raises(BadRequest, match="480x832x81 has none: build an engine with --chunk"):
        program_of(CONFIG, Geometry(480, 832, 81))
