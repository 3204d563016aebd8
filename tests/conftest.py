"""Where tests run, what they share is there: see `session.py`.

It is imported no earlier: a process that only hands out tests to others needs nothing of it.
"""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Give this process what tests share, where it runs any."""
    if config.getoption("markexpr") == "gpu" and not _has_gpu():
        pytest.exit("no test was run: each needs a CUDA device, and there is none", returncode=0)
    hands_out = config.getoption("dist", "no") != "no" and not config.getoption("collectonly")
    if not hands_out:
        config.pluginmanager.import_plugin("tests.session")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
