"""A model of the user's own: what `MODULE:FUNCTION` names, imported from the working directory."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from wanexport.runtime.errors import BadRequest, first_line

_EXPECTED = "expected (model, args) or (model, args, kwargs)"
_RETURNING = "takes no arguments and returns (model, args) or (model, args, kwargs)"
_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class Called(NamedTuple):
    """A torch.nn.Module or another callable, with the arguments of one call."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def is_function(target: str) -> bool:
    """Whether a text has the form `module:function`, which no path to a file is likely to have."""
    return _TARGET.fullmatch(target) is not None


def load_function(target: str) -> Called:
    """Import MODULE, call FUNCTION without arguments, and return the model and call it gave.

    FUNCTION returns (model, args) or (model, args, kwargs).
    Raises BadRequest as `returned_by` does, and when the function returns something else.
    """
    return call_of(target, returned_by(target))


def returned_by(target: str) -> Any:
    """Import MODULE and call FUNCTION without arguments.

    The module is found as `python -m` finds it: in the working directory, then among packages.
    Raises BadRequest when the target is not of this form, the module does not import, it has no
    such function, or the function raises.
    """
    module, separator, name = target.partition(":")
    if not separator or not module or not name:
        raise BadRequest(f"{target!r:.80} names no function: expected MODULE:FUNCTION")
    function = getattr(_imported(module), name, None)
    if function is None:
        raise BadRequest(f"module {module} has no function {name}: expected one that {_RETURNING}")
    if not callable(function):
        kind = type(function).__name__
        raise BadRequest(f"{target} is no function but {kind}: expected one that {_RETURNING}")
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise BadRequest(
            f"{target} raised {_words(error)}: call it in Python to see where"
        ) from error


def _imported(module: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise BadRequest(
            f"module {module} does not import ({_words(error)}): name one of the working "
            f"directory or an installed one, as my_model:make for my_model.py"
        ) from error


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def call_of(target: str, returned: Any) -> Called:
    """What the function returned, in its parts. Raises BadRequest when it is anything else."""
    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        size = f" of {len(returned)}" if isinstance(returned, tuple) else ""
        raise BadRequest(f"{target} returned {type(returned).__name__}{size}: {_EXPECTED}")
    model, args, kwargs = (*returned, {})[:3]
    if not callable(model):
        raise BadRequest(f"{target} returned {type(model).__name__} as model: {_EXPECTED}")
    if not isinstance(args, tuple | list):
        raise BadRequest(
            f"{target} returned {type(args).__name__} as args: {_EXPECTED}, args a tuple"
        )
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise BadRequest(
            f"{target} returned {type(kwargs).__name__} as kwargs: {_EXPECTED}, kwargs a dict"
        )
    return Called(model, tuple(args), kwargs)
