"""Text of strangers (manifests, headers, file names, exceptions) as one line that can be shown."""

_SHOWN = 2000  # characters: more is no line that anybody reads


def printable(value: object, at_most: int = _SHOWN) -> str:
    """One line of printable characters; others (line ends, ESC, bidi marks) are escaped.

    The middle of a text of more than at_most characters is left out: its end may say what to do.
    """
    text = _cut(str(value), at_most)
    return _cut("".join(c if c.isprintable() else _escaped(c) for c in text), at_most)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _cut(text: str, at_most: int) -> str:
    if len(text) <= at_most:
        return text
    tail = at_most // 3
    return f"{text[: at_most - tail - 5]} ... {text[len(text) - tail :]}"
