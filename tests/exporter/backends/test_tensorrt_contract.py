"""Every name of TensorRT that our code uses exists in its real bindings, and is called as they say.

The names are read from the source. The oldest version of TensorRT that serves and later
ones are checked, each in a process of its own, and TensorRT for RTX in this one.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.oracles.bindings import (
    CONTRACT,
    ROOT,
    VERSIONS,
    accepts,
    describe,
    signatures,
    stand_ins,
)
from tests.quick import slow_but
from wanexport.runtime.dtypes import DTYPES
from wanexport.runtime.engines.tensorrt_library import import_tensorrt

MODULE = "trt"  # what our code calls either module
OBJECTS: dict[str, dict[str, str]] = {  # file -> expression in it -> its value's class
    "runtime/engines/tensorrt_library.py": {},
    "runtime/engines/tensorrt_plan.py": {
        "runtime": "Runtime",
        "engine": "ICudaEngine",
        "self.engine": "ICudaEngine",
        "config": "IRuntimeConfig",
        "self.config": "IRuntimeConfig",
        "context": "IExecutionContext",
        "self.cache": "IRuntimeCache",
    },
    "exporter/backends/tensorrt/plan.py": {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "layer": "ILayer",
        "tensor": "ITensor",
        "parser": "OnnxParser",
        "error": "ParserError",
        "config": "IBuilderConfig",
        "targets": "ComputeCapability",
        "cache": "ITimingCache",
        "runtime": "Runtime",
        "engine": "ICudaEngine",
        "inspector": "EngineInspector",
    },
}
RTX_ALONE = {  # used only where the flavour is TensorRT for RTX
    "ComputeCapability",
    "ComputeCapability.CURRENT",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.set_runtime_cache",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
}
ENGINES = ("engine", "moments")  # tests on doubles
OWN = {"ILogger.reason", "ILogger.errors", "ILogger.clear"}  # what we add to what we derive
Description = dict[str, Any]


@dataclass(frozen=True)
class Use:
    """A name that our code uses: of a class or, where owner is empty, of the module."""

    owner: str
    path: tuple[str, ...]
    line: int
    is_set: bool = False
    call: tuple[int, tuple[str, ...]] | None = None  # positional arguments, names of the others
    overrides: tuple[str, ...] | None = None  # parameters of our method in the place of it

    @property
    def name(self) -> str:
        return ".".join((self.owner, *self.path) if self.owner else self.path)


def uses(source: str, objects: Mapping[str, str]) -> set[Use]:
    """Every attribute that a source takes of the module or of the objects named."""
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found = set(_overrides(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner, path = _owner(node, objects)
        if owner is None or (id(node) in inner and owner == ""):  # a part of a longer name
            continue
        call = calls.get(id(node))
        arguments = None
        if call:  # of **others the names are not in the source
            arguments = (len(call.args), tuple(k.arg for k in call.keywords if k.arg))
        is_set = isinstance(node.ctx, ast.Store)
        found.add(Use(owner, path, node.lineno, is_set, arguments))
    return found


def _owner(node: ast.Attribute, objects: Mapping[str, str]) -> tuple[str | None, tuple[str, ...]]:
    """The class that an attribute is of, empty for the module, and the names that lead to it."""
    base = ast.unparse(node.value)
    if base in objects:
        return objects[base], (node.attr,)
    if base.split(".")[0] == MODULE:
        return "", (*base.split(".")[1:], node.attr)
    return None, ()


def _overrides(tree: ast.Module) -> Iterator[Use]:
    """Our methods in classes derived from one of the module's."""
    for node in ast.walk(tree):
        for base in node.bases if isinstance(node, ast.ClassDef) else ():
            module, _, owner = ast.unparse(base).partition(".")
            if module != MODULE:
                continue
            assert isinstance(node, ast.ClassDef)
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    names = tuple(argument.arg for argument in method.args.args[1:])
                    use = Use(owner, (method.name,), method.lineno, overrides=names)
                    if use.name not in OWN:
                        yield use


def fault(use: Use, description: Description) -> str:
    """What the bindings say against a use; empty when they have it as it is used."""
    member: Description = {"kind": "class", "members": description}
    for name in (use.owner, *use.path) if use.owner else use.path:
        if member["kind"] != "class":
            break  # of an enum's member, say, or of what a call returned
        if name not in member["members"]:
            return f"{use.name} does not exist"
        member = member["members"][name]
    kind = member["kind"]
    if use.is_set:
        return "" if kind == "property" else f"{use.name} cannot be set"
    if use.overrides is not None:
        return _fault_of_override(use, member)
    if use.call is None:
        return "" if kind != "function" else f"{use.name} is a method"
    if kind == "class":
        name, doc = "__init__", member["members"]["__init__"]["doc"]
    elif kind == "function":
        name, doc = use.path[-1], member["doc"]
    else:
        return f"{use.name} is a {kind}, not a method"
    count, names = use.call
    count += bool(use.owner) or kind == "class"  # self, which trt.Class.method(self) names
    stated = signatures(name, doc)
    if accepts(stated, (None,) * count, **dict.fromkeys(names)):
        return ""
    return f"{use.name} takes {stated}, is given {count} arguments and {names}"


def _fault_of_override(use: Use, member: Description) -> str:
    if member["kind"] != "function":
        return f"{use.name} is no method"
    for signature in signatures(use.path[-1], member["doc"]):
        if tuple(signature.parameters)[1:] == use.overrides:
            return ""
    return f"{use.name} is overridden with other parameters: {use.overrides}"


def faults(description: Description, file: str, source: str, *, is_rtx: bool) -> list[str]:
    """All that is wrong in a source by these bindings."""
    return [
        f"{file}:{use.line}: {reason}"
        for use in uses(source, OBJECTS[file])
        if (is_rtx or use.name not in RTX_ALONE) and (reason := fault(use, description))
    ]


@pytest.fixture(scope="module")
def rtx() -> Description:
    """The bindings of TensorRT for RTX."""
    return describe(import_tensorrt("tensorrt-rtx"))


@pytest.fixture(scope="module", params=VERSIONS)
def environment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, str]]:
    """A version of TensorRT, and the environment of a process that can import its bindings."""
    if not (CONTRACT / request.param).is_dir():
        pytest.skip(f"{CONTRACT / request.param} is missing: run make setup")
    return request.param, stand_ins(request.param, tmp_path_factory.mktemp("stand_ins"))


@pytest.fixture(scope="module")
def tensorrt(environment: tuple[str, dict[str, str]]) -> Description:
    """The bindings of that version."""
    command = [sys.executable, "-m", "tests.oracles.bindings", "tensorrt"]
    child = subprocess.run(
        command, cwd=ROOT, env=environment[1], capture_output=True, text=True, check=True
    )
    return json.loads(child.stdout)


@pytest.mark.parametrize("file", OBJECTS)
def test_what_we_use_is_in_tensorrt(file: str, tensorrt: Description) -> None:
    assert faults(tensorrt, file, (ROOT / file).read_text(), is_rtx=False) == []


@pytest.mark.parametrize("file", OBJECTS)
def test_what_we_use_is_in_tensorrt_for_rtx(file: str, rtx: Description) -> None:
    assert faults(rtx, file, (ROOT / file).read_text(), is_rtx=True) == []


def test_the_names_of_dtypes_are_theirs(tensorrt: Description, rtx: Description) -> None:
    for row in DTYPES.values():
        use = Use("", ("DataType", row.tensorrt), 0)
        for description in (tensorrt, rtx):
            assert not row.tensorrt or fault(use, description) == ""


def test_what_is_said_to_be_of_rtx_alone_is(tensorrt: Description) -> None:
    """A name that TensorRT has as well would be left out of the check for nothing."""
    for file, objects in OBJECTS.items():
        for use in uses((ROOT / file).read_text(), objects):
            if use.name in RTX_ALONE:
                assert fault(use, tensorrt), use


def test_setup_gets_the_versions_checked_here() -> None:
    assert f"TENSORRT := {' '.join(VERSIONS)}\n" in (ROOT / "Makefile").read_text()


def test_each_object_named_here_is_used() -> None:
    for file, objects in OBJECTS.items():
        source = (ROOT / file).read_text()
        for expression in objects:
            assert uses(source, objects) != uses(
                source, {k: v for k, v in objects.items() if k != expression}
            ), (file, expression)


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("runtime/engines/tensorrt_plan.py", "set_tensor_address(", "set_tensor_adress("),
        ("runtime/engines/tensorrt_plan.py", "device_memory_size_v2", "device_memory_size_v3"),
        ("runtime/engines/tensorrt_plan.py", "TOTAL_WEIGHTS_SIZE", "TOTAL_WEIGHT_SIZE"),
        (
            "runtime/engines/tensorrt_library.py",
            "trt.ILogger.Severity.ERROR",
            "trt.ILogger.Level.ERROR",
        ),
        ("runtime/engines/tensorrt_plan.py", "engine_host_code_allowed", "device_memory_size_v2"),
        ("runtime/engines/tensorrt_plan.py", "activations.nbytes)", ")"),
        ("runtime/engines/tensorrt_plan.py", "trt.Runtime(self.log)", "trt.Runtime(log=self.log)"),
        (
            "runtime/engines/tensorrt_library.py",
            "severity: Any, msg: str",
            "severity: Any, text: str",
        ),
        ("runtime/engines/tensorrt_plan.py", "execute_async_v3(", "execute_async_v2("),
        ("exporter/backends/tensorrt/plan.py", "builder_optimization_level", "optimization_level"),
        ("exporter/backends/tensorrt/plan.py", "ignore_mismatch=", "ignore_mismatches="),
        (
            "exporter/backends/tensorrt/plan.py",
            "trt.OnnxParser(network, log)",
            "trt.OnnxParser(network)",
        ),
        ("exporter/backends/tensorrt/plan.py", "def step_complete(", "def step_completed("),
    ],
)
def test_a_wrong_name_or_call_is_found(
    file: str, right: str, wrong: str, rtx: Description, tensorrt: Description
) -> None:
    source = (ROOT / file).read_text()
    assert right in source
    for description, is_rtx in ((rtx, True), (tensorrt, False)):
        assert faults(description, file, source.replace(right, wrong), is_rtx=is_rtx)


@pytest.mark.parametrize("environment", slow_but(VERSIONS, VERSIONS[-1]), indirect=True)
def test_a_plan_is_refused_in_one_line_where_tensorrt_does_not_start(
    environment: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    """The stand-ins make no runtime: the real bindings' exception becomes our error."""
    code = (
        "import torch, contextlib, pathlib, sys\n"
        "torch.cuda.device = contextlib.nullcontext\n"
        "from wanexport.runtime.engines.tensorrt_plan import Plan\n"
        "try: Plan('tensorrt', pathlib.Path('x.plan'), torch.device('cpu'))\n"
        "except ValueError as error: print(type(error).__name__, error)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment[1],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("EngineFailure TensorRT cannot start for x.plan (it gave no")
    assert len(child.stdout.splitlines()) == 1


@pytest.mark.slow  # of this Python's own classes, the same tests are quick
def test_the_runtime_works_on_doubles_of_these_classes(
    environment: tuple[str, dict[str, str]],
) -> None:
    version, variables = environment
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    child = subprocess.run(
        [*command, *(f"tests/runtime/engines/test_tensorrt_{name}.py" for name in ENGINES)],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-3000:]
    assert f"[tensorrt-{version}]" in child.stdout
