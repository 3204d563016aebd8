"""When a CUDA graph pays, and what an engine is first run with."""

import pytest
import torch

from tests.causal_stream import CONFIG
from wanexport.runtime.causal_wan import program
from wanexport.runtime.engines.device import blank_inputs, launch_bound, zero_state
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import ENGINE_DTYPE, Call, Program, TensorSpec


@pytest.mark.parametrize(
    ("launch", "gpu", "pays"),
    [
        (0.8, 1.0, True),
        (1.5, 1.0, True),
        (0.6, 1.0, False),
        (0.0, 12.0, False),  # an execution too long to measure a launch
        (0.1, 0.0, False),  # a CPU has no launches
    ],
)
def test_a_graph_pays_where_launches_take_most_of_the_time(
    launch: float, gpu: float, pays: bool
) -> None:
    assert launch_bound(launch, gpu) is pays


@pytest.mark.parametrize(("chunk", "cache"), [(1, 1), (1, 2), (3, 3)])
def test_what_an_engine_is_first_run_with_lies_in_its_cache(chunk: int, cache: int) -> None:
    """The slots are rows that machine code writes to; a cache of one chunk of one frame has one."""
    size = Geometry(32, 48, 9, chunk=chunk, cache=cache)
    blank = blank_inputs(program(CONFIG, size).inputs, torch.device("cpu"))
    assert blank["slots"].shape == (chunk,) and blank["slots"].max() < size.slots
    assert blank["keys"].tolist() == [1] and blank["latent"].dtype == torch.float32


def test_a_state_has_the_dtype_that_the_program_says() -> None:
    """Machine code is given its address alone."""
    dtypes = {"kept": ENGINE_DTYPE, "mean": "fp32", "half": "fp16", "count": "I64"}
    state = {name: TensorSpec((2,), dtype) for name, dtype in dtypes.items()}
    own = Program({}, {}, (Call("step", (), (), state=tuple(state)),), state=state)
    made = zero_state(own, torch.bfloat16, torch.device("cpu"))
    expected = (torch.bfloat16, torch.float32, torch.float16, torch.int64)
    assert tuple(made[name].dtype for name in dtypes) == expected
