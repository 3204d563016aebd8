"""The causal graph against the rules of Self-Forcing in fp64, chunk by chunk."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.causal_stream import CONFIG, Clip, begin, compared, eager, random_weights
from wanexport.exporter.reference.parity import FP32_GATE, relative_l2

GLOBAL = Clip([3] * 4, 12)
WINDOWED = Clip([3] * 6, 9, window=9)
WITH_SINK = Clip([3] * 6, 9, window=9, sink=3)
CLIPS = {
    "everything": GLOBAL,
    "a cache with room": replace(GLOBAL, cache=15),
    "a window": WINDOWED,
    "a window with a sink": WITH_SINK,
    "a window that chunks do not divide": Clip([3] * 7, 7, window=7, sink=1),
    "frame by frame": Clip([1] * 8, 4, window=4, sink=1),
    "a first chunk of one frame": Clip([1, 3, 3, 3], 7, window=7),
    "a last chunk of one frame": Clip([3, 3, 1], 7),
    "the latest of what is kept": Clip([3] * 5, 6, window=9, sink=3, max_attention=6),
    "given first frames": Clip([3] * 5, 12, window=12, given=2),
    "given frames and then ones": Clip([1, 1, 3, 3], 8, given=1),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_weights(CONFIG)


def worst(clip: Clip, weights: Any, call: Any, slots: Any = None, **options: Any) -> float:
    """The relative error of the worst velocity of a clip."""
    return max(relative_l2(*pair) for pair in compared(clip, weights, call, slots, **options))


@pytest.mark.parametrize("name", CLIPS)
def test_every_step_is_that_of_the_official_rules(name: str, weights: Any) -> None:
    clip = CLIPS[name]
    _, call = eager(weights, clip.geometry)
    assert worst(clip, weights, call) <= FP32_GATE


def test_two_videos_of_one_graph_do_not_meet(weights: Any) -> None:
    graph, call = eager(weights, GLOBAL.geometry)
    others = compared(GLOBAL, weights, begin(graph))
    for pair in compared(GLOBAL, weights, call):
        assert relative_l2(*pair) <= FP32_GATE and relative_l2(*next(others)) <= FP32_GATE


def test_what_is_kept_is_keys_and_values_of_the_clean_chunk(weights: Any) -> None:
    """A commit writes the slots of its frames and no other, at every layer."""
    graph, _ = eager(weights, GLOBAL.geometry)
    state = {name: torch.zeros(spec.shape) for name, spec in graph.program.states().items()}
    inputs = {"latent": torch.randn(graph.program.inputs["latent"].shape)}
    inputs |= {"timestep": torch.zeros(3), "position": torch.tensor([4])}
    inputs |= {"slots": torch.tensor([5, 0, 2]), "keys": torch.tensor([6 * 6])}
    with torch.no_grad():
        graph.run(inputs, state, ("commit",))
    for layer in range(CONFIG.num_layers):
        for name in (f"cache_k.{layer}", f"cache_v.{layer}"):
            slots = state[name].reshape(GLOBAL.geometry.slots, -1).abs().sum(1) > 0
            assert slots.nonzero().flatten().tolist() == [0, 2, 5]
        assert not state[f"text_k.{layer}"].any()
