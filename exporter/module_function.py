"""A model that a function of the user's makes, named `module:function`."""

import importlib
import re
import sys
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from wanexport.runtime.errors import BadRequest, first_line, printable

CONTRACT = (
    "FUNCTION takes no arguments and returns (model, args) or (model, args, kwargs), model a "
    "torch.nn.Module; or returns a torch.export.ExportedProgram"
)
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_function(target: str) -> bool:
    """Whether a text has the form `module:function`."""
    return _TARGET.fullmatch(target) is not None


def load_function(target: str) -> Call | ExportedProgram:
    """Import the module, from the working directory too, call the function, and check its result.

    The user's code runs. Raises BadRequest, in one line, when the module does not import, has no
    such function, or the function raises or returns something else than CONTRACT says.
    """
    if not is_function(target):
        raise BadRequest(f"{printable(target)} names no function: expected MODULE:FUNCTION")
    module, _, name = target.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # stays: the function may import more
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:
        raise BadRequest(f"{module} does not import: {_said(error)}") from error
    if not callable(found):
        raise BadRequest(f"{module} has no function {name}: {CONTRACT}")
    try:
        result = found()
    except (Exception, SystemExit) as error:
        raise BadRequest(f"{target} raised {_said(error)}") from error
    return _checked(target, result)


def _said(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {first_line(error)}", 300)


def _checked(target: str, result: Any) -> Call | ExportedProgram:
    if isinstance(result, ExportedProgram):
        return result
    is_call = isinstance(result, tuple) and len(result) in (2, 3)
    if is_call and isinstance(result[0], nn.Module) and isinstance(result[1], tuple | list):
        kwargs = result[2] if len(result) == 3 else {}
        if isinstance(kwargs, dict) and all(isinstance(key, str) for key in kwargs):
            return result[0], tuple(result[1]), dict(kwargs)
    kinds = [type(one).__name__ for one in result] if isinstance(result, tuple) else None
    shown = f"({', '.join(kinds)})" if kinds is not None else f"a {type(result).__name__}"
    raise BadRequest(f"{target} returned {printable(shown)}: {CONTRACT}")
