"""Copies on the host's side: what they hold, and that they are nobody else's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from wanexport.runtime.host_copy import HostCopy, finite


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_a_copy_is_as_the_array_was(kind: Callable[[Any], Any]) -> None:
    value = kind(np.arange(6, dtype=np.float32).reshape(2, 3))
    copy = HostCopy(value)
    value[:] = -1
    assert copy.is_there()
    np.testing.assert_array_equal(copy.array(), [[0, 1, 2], [3, 4, 5]])
    assert copy.array().dtype == np.float32


def test_each_array_is_found_finite_or_not() -> None:
    whole, nan, inf = np.ones(3), np.array([1, np.nan]), torch.tensor([1, -np.inf])
    assert finite([whole, nan, inf, torch.ones(2, 2)]).array().tolist() == [
        True, False, False, True,
    ]  # fmt: skip
    assert finite([]).array().tolist() == []


@pytest.mark.gpu
def test_a_copy_from_a_gpu_waits_for_what_was_launched_and_for_nothing_later() -> None:
    value = torch.zeros(1 << 20, device="cuda")
    side = torch.cuda.Stream()
    HostCopy(value, side).array()  # pinned memory, and the stream, are there
    bad = torch.full((4,), float("nan"), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
        value += 1
        early, beside = HostCopy(value), HostCopy(value * 2, side)
        assert not early.is_there() and not beside.is_there()
        value += 1
        torch.cuda._sleep(400_000_000)
        assert (early.array() == 1).all() and (beside.array() == 2).all()
        assert not torch.cuda.current_stream().query()
        assert finite([np.ones(2), value, bad]).array().tolist() == [True, True, False]
    finally:
        torch.cuda.set_sync_debug_mode("default")
