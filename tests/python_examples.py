"""What is wrong with a Python example, told without running it.

`faults` follows names through imports, assignments, calls and attributes as far as annotations
lead. It reports an import, an attribute or a name that is not there, and a keyword or a number of
arguments that a function of this project does not take.
"""

import ast
import builtins
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Self, TypeVar, get_args, get_origin

OURS = "wanexport"
ELSEWHERE = ("wan",)  # the official repository, which no registry has
# What a function that takes any array by name is given, as no signature says it.
INPUTS = {"latent", "timestep", "text", "condition", "image"}
OF_SAMPLE = {
    "noise", "text", "negative", "first_frame", "solver", "steps", "shift", "guidance", "timesteps",
    "condition", "image",
}  # fmt: skip
OPEN = {"sample": OF_SAMPLE, "denoise": OF_SAMPLE, "session": INPUTS, "__call__": INPUTS}


@dataclass(frozen=True)
class _Instance:
    """A value of a class, of which only the class is known; `of` are its type arguments."""

    kind: type
    of: tuple[Any, ...] = ()


_UNKNOWN = object()


def faults(source: str) -> list[str]:
    """What the example gets wrong, a line each; nothing when all that can be told is right."""
    tree = ast.parse(source)
    reader = _Reader()
    for statement in tree.body:
        reader.visit(statement)
    return reader.found


class _Reader(ast.NodeVisitor):
    """Follows the statements of an example in their order."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.found: list[str] = []

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            module = self._module(alias.name)
            top = alias.name.partition(".")[0]
            self.names[alias.asname or top] = module if alias.asname else self._module(top)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = self._module(str(node.module))
        for alias in node.names:
            value = getattr(module, alias.name, None) if module is not _UNKNOWN else _UNKNOWN
            if value is None:
                self.found.append(f"{node.module} has no {alias.name}")
            self.names[alias.asname or alias.name] = _UNKNOWN if value is None else value

    def _module(self, name: str) -> Any:
        if name.partition(".")[0] in ELSEWHERE:
            return _UNKNOWN
        try:
            if find_spec(name) is not None:
                return importlib.import_module(name)
        except ImportError:
            pass
        self.found.append(f"there is no module {name}")
        return _UNKNOWN

    def visit_Assign(self, node: ast.Assign) -> None:
        value = self._value(node.value)
        for target in node.targets:
            self._bind(target, value)

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, _element(self._value(node.iter)))
        self._statements(node.body)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            value = self._value(item.context_expr)
            if item.optional_vars is not None:
                self._bind(item.optional_vars, value)
        self._statements(node.body)

    def visit_Expr(self, node: ast.Expr) -> None:
        self._value(node.value)

    def generic_visit(self, node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._value(child)
            else:
                self.visit(child)

    def _statements(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self.visit(statement)

    def _bind(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            for part in target.elts:
                self._bind(part, _UNKNOWN)
        else:
            self._value(target)

    def _value(self, node: ast.expr) -> Any:
        """What an expression is, as far as that is known; its parts are read too."""
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(self._value(node.value), node.attr)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Lambda):
            self.names.update({argument.arg: _UNKNOWN for argument in node.args.args})
            self._value(node.body)
            return _UNKNOWN
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._value(child)
        return _UNKNOWN

    def _name(self, name: str) -> Any:
        if name not in self.names and not hasattr(builtins, name):
            self.found.append(f"{name} is not defined")
        return self.names.get(name, getattr(builtins, name, _UNKNOWN))

    def _attribute(self, value: Any, name: str) -> Any:
        if value is _UNKNOWN:
            return _UNKNOWN
        if isinstance(value, _Instance):
            return self._attribute_of(value, name)
        if not hasattr(value, name):
            self.found.append(f"{getattr(value, '__name__', value)} has no {name}")
        return getattr(value, name, _UNKNOWN)

    def _attribute_of(self, value: _Instance, name: str) -> Any:
        kind = value.kind
        if not _is_ours(kind):
            return _UNKNOWN
        if name not in _attributes(kind):
            self.found.append(f"{kind.__name__} has no {name}")
            return _UNKNOWN
        member = inspect.getattr_static(kind, name, None)
        if isinstance(member, property) and member.fget is not None:
            return _result(member.fget, value)
        return _Bound(member, value) if inspect.isfunction(member) else _UNKNOWN

    def _call(self, node: ast.Call) -> Any:
        called = self._value(node.func)
        for argument in (*node.args, *(k.value for k in node.keywords)):
            self._value(argument)
        function, owner = called, None
        if isinstance(called, _Bound):
            function, owner = called.function, called.owner
        elif isinstance(called, _Instance):
            function, owner = inspect.getattr_static(called.kind, "__call__", None), called
        if function is _UNKNOWN or not _is_ours(function):
            return _UNKNOWN
        self._check(function, node, skip=owner is not None)
        return _Instance(function) if isinstance(function, type) else _result(function, owner)

    def _check(self, function: Any, node: ast.Call, *, skip: bool) -> None:
        name, signature = function.__name__, inspect.signature(function)
        parameters = list(signature.parameters.values())[1 if skip else 0 :]
        allowed = _keywords(name, parameters)
        for keyword in node.keywords:
            if keyword.arg is not None and keyword.arg not in allowed:
                self.found.append(f"{name} takes no {keyword.arg}")
        positional = [p for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD]
        given = {k.arg for k in node.keywords} | {p.name for p in positional[: len(node.args)]}
        if len(node.args) > len(positional):
            self.found.append(f"{name} takes {len(positional)} arguments by position")
        for parameter in parameters:
            is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if is_named and parameter.default is parameter.empty and parameter.name not in given:
                self.found.append(f"{name} needs {parameter.name}")


@dataclass(frozen=True)
class _Bound:
    """A method of a value."""

    function: Any
    owner: _Instance


def _is_ours(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] == OURS and callable(value)


def _keywords(name: str, parameters: list[inspect.Parameter]) -> set[str]:
    """The keywords that a function takes, those of an unpacked TypedDict among them."""
    allowed = set()
    for parameter in parameters:
        if parameter.kind is not parameter.VAR_KEYWORD:
            allowed.add(parameter.name)
        elif unpacked := get_args(parameter.annotation):
            allowed |= set(getattr(unpacked[0], "__annotations__", OPEN.get(name, ())))
        else:
            allowed |= OPEN[name]
    return allowed


def _attributes(kind: type) -> set[str]:
    """The attributes of a class's instances, with those that its methods assign."""
    names = set(dir(kind))
    for parent in kind.__mro__:
        if _is_ours(parent):
            names |= set(getattr(parent, "__annotations__", ()))
            names |= set(_ASSIGNED.findall(inspect.getsource(parent)))
    return names


_ASSIGNED = re.compile(r"\bself\.(\w+)(?=[\w\s,.]*[:=])")


def _result(function: Any, owner: _Instance | None) -> Any:
    """What a function returns by its annotation."""
    annotation = inspect.signature(function).return_annotation
    if isinstance(annotation, str):
        annotation = eval(annotation, function.__globals__)
    if owner is not None and annotation is Self:
        return owner
    if owner is not None and isinstance(annotation, TypeVar) and owner.of:
        return _typed(owner.of[0])
    return _typed(annotation)


def _typed(annotation: Any) -> Any:
    kind = get_origin(annotation) or annotation
    is_known = isinstance(kind, type) and annotation is not inspect.Signature.empty
    return _Instance(kind, get_args(annotation)) if is_known else _UNKNOWN


def _element(value: Any) -> Any:
    """What a loop over a value gives."""
    if isinstance(value, _Instance) and value.kind in (list, tuple, Iterator) and value.of:
        return _typed(value.of[0])
    return _UNKNOWN
