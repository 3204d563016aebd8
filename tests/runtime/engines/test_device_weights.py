"""Weights in one buffer: what it holds, who shares it, and what a failed switch leaves."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quick import slow_but
from wanexport.graphs.config import PRESETS
from wanexport.graphs.weights import RandomWeights, write_weights
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.engines import device_weights as module
from wanexport.runtime.engines.device_weights import DeviceWeights, device_weights
from wanexport.runtime.errors import BundleError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two weights files of one layout."""
    folder, config = tmp_path_factory.mktemp("weights"), PRESETS["tiny"].config
    paths = [folder / f"{seed}.safetensors" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        write_weights(path, config, "bf16", RandomWeights(config, seed, ""))
    return paths


def use(weights: DeviceWeights, file: Path | PinnedFile) -> None:
    """Have a file's tensors for no time at all."""
    with weights.held(pin(file)):
        pass


def assert_holds(weights: DeviceWeights, file: Path) -> None:
    expected = load_file(file)
    assert weights.tensors.keys() == expected.keys()
    for name, tensor in weights.tensors.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.is_contiguous() and tensor.storage_offset() * tensor.itemsize % 256 == 0


def test_the_buffer_holds_the_file_and_then_the_other(files: list[Path]) -> None:
    weights = DeviceWeights(files[0], CPU)
    assert_holds(weights, files[0])
    kept = weights.tensors["head.head.weight"]
    use(weights, files[0])
    assert not weights.switches
    use(weights, files[1])
    assert_holds(weights, files[1])
    assert weights.tensors["head.head.weight"] is kept and len(weights.switches) == 1


def test_weights_opened_in_inference_mode_can_be_written_outside(files: list[Path]) -> None:
    with torch.inference_mode():
        weights = DeviceWeights(files[0], CPU)
    assert_holds(weights, files[0])
    for tensor in (weights.buffer, weights.tensors["head.head.bias"]):
        tensor.zero_()


def test_a_file_that_ends_early_is_made_good_by_the_next(files: list[Path], tmp_path: Path) -> None:
    weights = DeviceWeights(files[0], CPU)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files[1].read_bytes()[:-1000])
    with pytest.raises(BundleError, match="ended while it was read"):
        use(weights, cut)
    use(weights, files[0])
    assert_holds(weights, files[0])


def test_weights_of_another_layout_are_refused_at_the_switch(
    files: list[Path], tmp_path: Path
) -> None:
    weights, blank = DeviceWeights(files[0], CPU), tmp_path / "blank.safetensors"
    content = files[1].read_bytes()
    length = int.from_bytes(content[:8], "little")
    blank.write_bytes(content[:8] + b"{}".ljust(length) + content[8 + length :])
    with pytest.raises(BundleError, match=f"{blank} is laid out otherwise"):
        use(weights, blank)
    use(weights, files[0])
    assert_holds(weights, files[0])


@pytest.mark.parametrize("what", ["rewritten", "gone", "a folder"])
def test_a_file_that_changed_since_it_was_pinned_is_one_line(
    what: str, files: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(files[1].read_bytes())
    weights, pinned = DeviceWeights(files[0], CPU), pin(path)
    path.unlink()
    if what == "rewritten":
        path.write_bytes(files[1].read_bytes())
    elif what == "a folder":
        path.mkdir()
    with pytest.raises(BundleError, match=f"{path} ") as caught:
        use(weights, pinned)
    assert "\n" not in str(caught.value)
    use(weights, files[0])
    assert_holds(weights, files[0])


def test_the_switches_of_a_server_that_runs_for_ever_are_not_all_kept(files: list[Path]) -> None:
    weights = DeviceWeights(files[0], CPU)
    weights.switches.extend([0.0] * 5000)
    assert len(weights.switches) == 1000


def test_one_file_is_read_once_while_anyone_holds_it(files: list[Path], tmp_path: Path) -> None:
    first = device_weights(files[0], CPU)
    assert device_weights(files[0], CPU) is first
    assert device_weights(files[1], CPU) is not first
    assert device_weights(files[0], CPU, private=True) is not first
    (tmp_path / "link.safetensors").symlink_to(files[0])
    assert device_weights(tmp_path / "link.safetensors", CPU) is first
    for path in (tmp_path / "link.safetensors", files[0]):
        use(first, path)  # which already is its content
    assert not first.switches
    alive = weakref.ref(first)
    del first
    gc.collect()
    assert alive() is None


def test_what_is_refused_before_it_is_read_leaves_what_was_held(
    files: list[Path], tmp_path: Path
) -> None:
    """The file before need not be there: it is not read again."""
    own, gone, blank = (tmp_path / name for name in ("own", "gone", "blank"))
    own.write_bytes(files[0].read_bytes())
    weights, first = DeviceWeights(own, CPU), pin(own)
    own.unlink()
    content = files[1].read_bytes()
    length = int.from_bytes(content[:8], "little")
    blank.write_bytes(content[:8] + b"{}".ljust(length) + content[8 + length :])
    gone.write_bytes(content)
    lost = pin(gone)
    gone.unlink()
    for bad in (lost, pin(blank)):
        with pytest.raises(BundleError):
            use(weights, bad)
        with weights.held(first):
            assert_holds(weights, files[0])
    assert weights.generation == 1


def test_the_generation_counts_what_the_buffer_has_held(files: list[Path]) -> None:
    weights = DeviceWeights(files[0], CPU)
    assert weights.generation == 1 and weights.holds(pin(files[0]))
    for file, generation in ((0, 1), (1, 2), (1, 2), (0, 3)):
        use(weights, files[file])
        assert weights.generation == generation and weights.holds(pin(files[file]))
        assert not weights.holds(pin(files[1 - file]))


@pytest.fixture
def small(tmp_path: Path) -> list[PinnedFile]:
    """Two files, of which one holds ones and the other twos."""
    paths = [tmp_path / f"{value}.safetensors" for value in (1, 2)]
    for value, path in enumerate(paths, 1):
        save_file({f"t{i}": torch.full((50_000,), float(value)) for i in range(4)}, path)
    return [pin(path) for path in paths]


def values(weights: DeviceWeights) -> set[float]:
    """Every value that the tensors have, read twice with a pause between."""
    found = [set(torch.unique(tensor).tolist()) for tensor in weights.tensors.values()]
    time.sleep(0.0005)
    return set().union(*found, *(torch.unique(t).tolist() for t in weights.tensors.values()))


@pytest.mark.parametrize("number", slow_but([10, 40], 10))
def test_what_a_thread_holds_is_never_torn(number: int, small: list[PinnedFile]) -> None:
    weights = DeviceWeights(small[0], CPU)

    def hold(place: int) -> set[tuple[int, frozenset[float]]]:
        seen = set()
        for turn in range(number):
            which = (place + turn) % 2
            with weights.held(small[which]):
                seen.add((which, frozenset(values(weights))))
        return seen

    with ThreadPoolExecutor(4) as pool:
        seen = set.union(*pool.map(hold, range(4)))
    assert seen == {(0, frozenset({1.0})), (1, frozenset({2.0}))}
    assert weights.generation == 1 + len(weights.switches) and len(weights.switches) > 1


def test_those_that_need_the_same_file_have_it_at_once(small: list[PinnedFile]) -> None:
    weights, together = DeviceWeights(small[0], CPU), threading.Barrier(3, timeout=5)

    def hold(_: int) -> None:
        with weights.held(small[0]):
            together.wait()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(hold, range(3)))
    assert not weights.switches


def test_a_replacement_waits_for_those_that_hold_the_other(small: list[PinnedFile]) -> None:
    weights, replaced = DeviceWeights(small[0], CPU), threading.Event()

    def replace() -> None:
        with weights.held(small[1]):
            replaced.set()

    thread = threading.Thread(target=replace)
    with weights.held(small[0]):
        thread.start()
        assert not replaced.wait(0.1)
        assert values(weights) == {1.0} and weights.generation == 1
    assert replaced.wait(5)
    thread.join()
    assert values(weights) == {2.0}


def test_who_waits_for_a_replacement_is_not_overtaken(small: list[PinnedFile]) -> None:
    """Others need the held file without a pause, one beginning before another ends."""
    weights, done = DeviceWeights(small[0], CPU), threading.Event()

    def keep_coming() -> None:
        while not done.is_set():
            with weights.held(small[0]):
                time.sleep(0.002)

    def replace() -> set[float]:
        with weights.held(small[1]):
            return values(weights)

    with ThreadPoolExecutor(4) as pool:
        coming = [pool.submit(keep_coming) for _ in range(3)]
        try:
            for _ in range(5):
                time.sleep(0.01)
                assert pool.submit(replace).result(timeout=5) == {2.0}
        finally:
            done.set()
        for future in coming:
            future.result()


def test_a_block_that_fails_lets_go(small: list[PinnedFile]) -> None:
    weights = DeviceWeights(small[0], CPU)
    with pytest.raises(ZeroDivisionError), weights.held(small[0]):
        raise ZeroDivisionError
    use(weights, small[1])
    assert values(weights) == {2.0}


def test_whose_engine_changed_its_weights_does_not_give_them_to_others(
    small: list[PinnedFile],
) -> None:
    """A third that needs the first file, which the buffer held and holds no more, has its own."""
    first = device_weights(small[0], CPU)
    use(first, small[1])
    second = device_weights(small[0], CPU)
    assert second is not first and values(second) == {1.0} and values(first) == {2.0}
    assert device_weights(small[0], CPU) is second


def test_two_files_are_read_at_the_same_time_and_one_file_once(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    both, read = threading.Barrier(2, timeout=10), []

    class Waiting(DeviceWeights):
        def __init__(self, file: Path | PinnedFile, device: torch.device) -> None:
            read.append(file)
            both.wait()
            super().__init__(file, device)

    monkeypatch.setattr(module, "DeviceWeights", Waiting)
    with ThreadPoolExecutor(4) as pool:
        asked = [files[0], files[1], files[0], files[1]]
        first, second, *again = pool.map(lambda file: device_weights(file, CPU), asked)
    assert len(read) == 2 and again == [first, second]
    assert_holds(first, files[0])
    assert_holds(second, files[1])
