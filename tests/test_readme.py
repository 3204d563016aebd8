"""Every command in the README runs as written, in order, in a fresh copy of the tree.

What `make demo` starts runs as a reader's does, each in a process of its own.
"""

import pytest

from tests.documents import Document, document
from tests.forked import Forks
from tests.shown_commands import Reader, copy_tree, needs_environment, offline_environment
from wanexport.runtime import load

README = document("README.md")
SECTIONS = [part for part in README.sections() if part.blocks("bash", "python")]
# They would run this test again: make only says what it would do. CI runs them.
RUNNING_TESTS = {"make test", "make check"}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Reader:
    """One who reads on: a section finds what those before it have left."""
    folder = tmp_path_factory.mktemp("readme") / "wanexport"
    copy_tree(folder)
    return Reader(folder, offline_environment(tmp_path_factory.mktemp("hub")), forks)


@needs_environment
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_every_command_of_a_section_runs(section: Document, reader: Reader) -> None:
    for command in section.commands("bash"):
        reader.run(f"{command} --dry-run" if command in RUNNING_TESTS else command)
    for printed in reader.run_scripts(section):
        assert printed.count("\n") == 4


@needs_environment
def test_the_commands_leave_what_is_said_of_them(reader: Reader) -> None:
    """After all sections: it reads what they have left."""
    assert load(reader.folder / "t2v").geometry.num_tokens == 32760
    for name in ("clip.mp4", "contact_sheet.png"):
        assert (reader.folder / "demo" / name).stat().st_size > 0


def test_no_command_is_left_out() -> None:
    commands = [command for section in SECTIONS for command in section.commands("bash")]
    assert commands == README.commands("bash") and RUNNING_TESTS <= set(commands)
    assert len(commands) >= 5 and len(README.blocks("python")) == 1
