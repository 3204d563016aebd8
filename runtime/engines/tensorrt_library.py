"""TensorRT and TensorRT for RTX: one Python interface, two packages that may lack or be too old."""

import importlib
import threading
from collections import deque
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

from packaging.version import Version

from wanexport.runtime.errors import BundleError, installing


class Flavour(NamedTuple):
    """How one of the two is called, found and installed."""

    title: str
    modules: tuple[str, ...]  # the first that is there
    oldest: str
    install: str
    keeps_kernels: bool  # which it compiles for the GPU that it finds


FLAVOURS = {
    "tensorrt": Flavour(
        "TensorRT", ("tensorrt",), "10.14", installing("tensorrt-cu13>=10.14"), False
    ),
    "tensorrt-rtx": Flavour(
        "TensorRT for RTX",
        ("tensorrt_rtx", "tensorrt_rtx_bindings"),
        "1.7",
        installing("onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
        True,
    ),
}
_KEPT = 100  # errors of all threads
# Carries TensorRT for RTX's libraries, and makes them findable when it is imported.
_RTX_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"


def import_tensorrt(flavour: str) -> Any:
    """The module of `tensorrt` or `tensorrt-rtx`.

    Raises BundleError, naming the packages to install, when it is missing, cannot be loaded or
    is too old.
    """
    title, modules, oldest, install, _ = FLAVOURS[flavour]
    name = next((name for name in modules if find_spec(name)), None)
    if name is None:
        raise BundleError(f"{title} is not installed: {install}")
    if flavour == "tensorrt-rtx" and not find_spec("tensorrt_rtx_libs"):
        with suppress(ImportError):  # installed otherwise, its libraries may be found all the same
            importlib.import_module(_RTX_LIBRARIES)
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{title} cannot be loaded ({reason}): {install}") from error
    if Version(module.__version__) < Version(oldest):
        raise BundleError(
            f"{title} {module.__version__} is too old, {oldest} or newer is needed: {install}"
        )
    return module


@cache
def message_log(trt: Any) -> Any:
    """What keeps a flavour's errors instead of printing them, until they are cleared.

    There is one for the process, as TensorRT keeps the first that it is given. A thread clears and
    reads its own errors; those of TensorRT's threads stand in for them where it has none.
    """
    wanted = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class MessageLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: deque[tuple[int, str]] = deque(maxlen=_KEPT)  # with their thread

        def log(self, severity: Any, msg: str) -> None:
            if severity in wanted:
                self.messages.append((threading.get_ident(), msg))

        @property
        def errors(self) -> list[str]:
            """The errors of this thread, in order, or else those of all threads."""
            kept, own = list(self.messages), threading.get_ident()
            return [msg for thread, msg in kept if thread == own] or [msg for _, msg in kept]

        def clear(self) -> None:
            """Forget the errors of this thread, and of those that are no thread of Python's."""
            own = {threading.get_ident()}
            others = {thread.ident for thread in threading.enumerate()} - own
            for message in list(self.messages):
                if message[0] not in others:
                    with suppress(ValueError):  # pushed out meanwhile
                        self.messages.remove(message)

        def reason(self) -> str:
            """The first error, in one line."""
            return " ".join((self.errors or ["it gave no reason"])[0].split())[:300]

    return MessageLog()
