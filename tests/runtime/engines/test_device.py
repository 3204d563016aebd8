"""When a CUDA graph pays."""

import pytest

from wanexport.runtime.engines.device import launch_bound


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
