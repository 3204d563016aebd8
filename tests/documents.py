"""README and docs/, and what lies in them: code blocks, commands, links, and code in the prose."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """A markdown file; `name` is its path in the repository."""

    name: str
    text: str

    def blocks(self, *languages: str) -> list[str]:
        """The code blocks of these languages."""
        return [code for language, code in _FENCE.findall(self.text) if language in languages]

    def commands(self, *languages: str) -> list[str]:
        """The commands in code blocks of these languages, each in one line."""
        lines = "\n".join(self.blocks(*languages)).replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]

    def sections(self) -> list["Document"]:
        """What stands before the first `## ` and below each, by its heading."""
        parts = re.split(r"^(?=## )", self.text, flags=re.MULTILINE)
        return [Document(part.splitlines()[0].lstrip("# "), part) for part in parts]

    @cached_property
    def prose(self) -> str:
        """The text without its code blocks."""
        return _FENCE.sub("", self.text)

    @cached_property
    def spans(self) -> list[str]:
        """Code within the prose."""
        return [" ".join(span.split()) for span in _SPAN.findall(self.prose)]

    @cached_property
    def links(self) -> list[str]:
        """Where links and pictures lead, but for other sites."""
        found = _LINK.findall(_SPAN.sub("", self.prose))
        return [link for link in found if not link.startswith(("http:", "https:"))]

    @cached_property
    def anchors(self) -> set[str]:
        """What a link may name after `#`, as GitHub makes it from headings."""
        plain = (heading.lower() for heading in _HEADING.findall(self.prose))
        return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}

    def paragraphs(self) -> Iterator[list[str]]:
        """The lines of each paragraph of prose: no heading, list, table or comment is one."""
        for part in re.split(r"\n\s*\n", self.prose):
            lines = part.strip().splitlines()
            if lines and not re.match(r"[#|<!*\-]|\d+\. ", lines[0]):
                yield lines


def documents() -> list[Document]:
    """README, and what docs/ holds."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [Document(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]


def document(name: str) -> Document:
    """One of them by its path in the repository."""
    return next(one for one in documents() if one.name == name)


def words_of(command: str, program: str) -> Iterator[list[str]]:
    """The arguments of a program in a command line, once for each time that it is run there."""
    run: list[str] = []
    for word in [*shlex.split(command, comments=True), ";"]:
        if word not in ("|", "&&", ";"):
            run.append(word)
            continue
        while run and "=" in run[0]:  # a variable for the program
            run.pop(0)
        if run[:1] == [program]:
            yield run[1:]
        run = []
