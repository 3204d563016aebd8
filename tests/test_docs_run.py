"""Every command in docs/ runs as written, each page in a copy of its own of one small bundle.

That bundle is what the first command of docs/build.md makes, which the other pages refer to.
"""

import shutil
from pathlib import Path

import pytest

from tests.documents import Document, document, documents
from tests.forked import Forks
from tests.quick import slow_but
from tests.shown_commands import Reader, copy_tree, needs_environment, offline_environment
from wanexport.runtime.bundle.tensorfile import load_arrays

FIRST = document("docs/build.md").commands("bash")[0]
PAGES = [p for p in documents() if p.name.startswith("docs/") and p.blocks("bash", "python")]
# The others compile, or run for long; test_docs has click take every command that they show.
QUICK = ("docs/python.md", "docs/report.md", "docs/run.md")
MADE = {  # what a page's commands leave, by its name
    "docs/build.md": ("tiny/engines/128x192x17/onnx-fp32/denoiser.onnx",),
    "docs/run.md": ("latents.safetensors", "distilled.safetensors.json"),
    "docs/compare.md": ("in.json", "out.json", "bundle/reports", "curves.svg"),
    "docs/bench.md": ("tiny/reports/bench-64x96x9-onnx-fp32.json",),
    "docs/profile.md": ("tiny/reports/profile-64x96x9-diffusers-fp32.json",),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return offline_environment(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], forks: Forks
) -> Path:
    """A copy of the tree in which the first command of docs/build.md has run."""
    folder = tmp_path_factory.mktemp("docs") / "wanexport"
    copy_tree(folder)
    Reader(folder, environment, forks).run(FIRST)
    return folder


@needs_environment
@pytest.mark.parametrize("page", slow_but({page.name: page for page in PAGES}, *QUICK))
def test_every_command_of_a_page_runs(
    page: Document, built: Path, environment: dict[str, str], forks: Forks, tmp_path: Path
) -> None:
    folder = tmp_path / "wanexport"
    shutil.copytree(built, folder, symlinks=True)
    reader = Reader(folder, environment, forks)
    for command in page.commands("bash"):
        if command != FIRST:
            reader.run(command)
    reader.run_scripts(page)
    assert all((folder / name).exists() for name in MADE.get(page.name, ()))
    if page.name == "docs/run.md":  # the shapes that it states
        assert load_arrays(folder / "text.safetensors")["text"].shape == (77, 4096)
        assert load_arrays(folder / "latents.safetensors")["latent"].shape == (1, 16, 3, 8, 12)


def test_the_pages_that_leave_something_are_there() -> None:
    assert MADE.keys() <= {page.name for page in PAGES}
    assert FIRST.endswith(" -o tiny")
