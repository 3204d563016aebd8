"""Layers in turns: under any order that streams allow, each computes with its own values."""

import random
from collections import Counter

import pytest

from tests.oracles.simulated_streams import Simulated
from wanexport.runtime.engines.layer_ring import LayerRing, spread


class Gpu:
    """Buffers of a simulated GPU, which checks what every copy and every computation meets."""

    def __init__(self, seed: int, buffers: int) -> None:
        self.streams = Simulated(random.Random(seed))
        self.content: list[tuple[int, int] | None] = [None] * buffers  # set of weights, layer
        self.writing: Counter[int] = Counter()
        self.reading: Counter[int] = Counter()
        self.copies, self.weights, self.computed = 0, 0, 0
        self.ring = LayerRing(self.streams, self.copy, buffers)

    def copy(self, layer: int, buffer: int) -> None:
        assert self.streams.current == "copying"
        what = (self.weights, layer)
        self.copies += 1

        def begin() -> None:
            assert not self.reading[buffer] and not self.writing[buffer]
            self.writing[buffer] += 1
            self.content[buffer] = None

        def end() -> None:
            self.writing[buffer] -= 1
            self.content[buffer] = what

        self.streams.work(begin, end)

    def compute(self, layer: int) -> None:
        """One layer of a forward."""
        buffer, what = self.ring.take(layer), (self.weights, layer)

        def begin() -> None:
            assert self.content[buffer] == what and not self.writing[buffer]
            self.reading[buffer] += 1

        def end() -> None:
            assert self.content[buffer] == what
            self.reading[buffer] -= 1
            self.computed += 1

        self.streams.work(begin, end)
        self.ring.release()


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_every_layer_finds_its_own_values_in_any_order_of_the_streams(
    seed: int, buffers: int
) -> None:
    chance, gpu = random.Random(seed), Gpu(seed, buffers)
    order = spread(chance.randint(1, 7), 7)
    gpu.ring.arrange(order)
    launched = 0
    for _ in range(12):
        ended = chance.choice([len(order), len(order), chance.randint(0, len(order))])
        for layer in order[:ended]:  # a forward may fail in its midst
            gpu.compute(layer)
            launched += 1
        if chance.random() < 0.3:  # another set of weights
            gpu.weights += 1
            gpu.ring.start()
        if chance.random() < 0.3:
            gpu.compute(chance.choice(order))  # as `--bisect` does
            launched += 1
    gpu.streams.run()
    assert gpu.computed == launched


def test_a_round_copies_each_layer_once_and_the_next_rounds_first_ahead() -> None:
    gpu = Gpu(0, buffers=2)
    gpu.ring.arrange(range(5))
    gpu.ring.start()
    assert gpu.copies == 2
    for number in range(1, 4):
        for layer in range(5):
            gpu.compute(layer)
        assert gpu.copies == 2 + 5 * number
    gpu.streams.run()


def test_while_a_layer_computes_the_next_is_copied() -> None:
    gpu = Gpu(0, buffers=2)
    gpu.ring.arrange(range(4))
    gpu.ring.start()
    for layer in range(2):
        gpu.compute(layer)
    copying, caller = gpu.streams.queues["copying"], gpu.streams.queues["caller"]
    while gpu.content != [(0, 0), (0, 1)]:  # both are there, nothing computes yet
        gpu.streams._step("copying")
    while not gpu.reading[0]:
        gpu.streams._step("caller")
    gpu.streams._step("copying")  # past the event of the second copy
    assert not gpu.streams._able("copying") and copying  # the third waits for the first layer
    gpu.streams._step("caller")
    gpu.streams._step("caller")  # its event
    while not gpu.reading[1]:
        gpu.streams._step("caller")
    while not gpu.writing[0]:
        gpu.streams._step("copying")
    assert gpu.reading[1] and gpu.writing[0] and caller is gpu.streams.queues["caller"]
    gpu.streams.run()


@pytest.mark.parametrize("seed", range(10))
def test_a_copy_that_fails_is_made_again(seed: int) -> None:
    gpu = Gpu(seed, buffers=2)
    gpu.ring.arrange(range(3))
    gpu.compute(0)
    whole = gpu.ring._copy

    def broken(layer: int, buffer: int) -> None:
        whole(2, buffer)
        raise OSError("no such file")

    gpu.ring._copy = broken
    with pytest.raises(OSError, match="no such file"):
        gpu.compute(1)
    gpu.ring._copy = whole
    for layer in (1, 2, 0):  # as a caller may who goes on
        gpu.compute(layer)
    gpu.streams.run()


@pytest.mark.parametrize(
    ("streamed", "layers", "which"),
    [
        (0, 4, []),
        (4, 4, [0, 1, 2, 3]),
        (2, 4, [1, 3]),
        (1, 4, [3]),
        (3, 5, [1, 3, 4]),
        (30, 40, None),
    ],
)
def test_streamed_layers_are_spread_evenly(
    streamed: int, layers: int, which: list[int] | None
) -> None:
    found = spread(streamed, layers)
    assert len(found) == streamed and which in (None, found)
    for begin in range(layers):  # in any stretch of a round, as many as its share, give or take one
        for end in range(begin, layers):
            inside = sum(begin <= layer < end for layer in found)
            assert abs(inside - (end - begin) * streamed / layers) < 1
