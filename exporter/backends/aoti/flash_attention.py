"""FlashAttention-4 compiled ahead of time, as one shared library without weights or shapes.

FlashAttention-4 is a Python package that compiles its kernels when they are first called. Here a
child process has it compile one kernel, for the dtype and head dimension of a model and for any
batch, length and number of heads, and writes the object file, which a C++ compiler links.
`wanexport.runtime.engines.flash_attention` loads and calls the library, and needs none of the
packages that made it.
"""

import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.aoti.compiler import compiler, march_flags
from wanexport.exporter.child.child import known, main, run_process
from wanexport.exporter.child.process import Lifeline, environment_of, last_words, run_command
from wanexport.runtime.engines.flash_attention import FUNCTION
from wanexport.runtime.engines.processor import level_for
from wanexport.runtime.errors import BadRequest, WanExportError, installing

PACKAGES = ("flash-attn-4", "nvidia-cutlass-dsl", "apache-tvm-ffi")
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
NUM_SMS = 132  # the package wants one; only a kernel with split keys depends on it
MAX_WORDS = 300

# The static runtime of nvidia-cutlass-dsl lacks what its compiled code calls when a launch fails
# (NVIDIA/cutlass#3635). Weak: a version that has it wins.
ERRORS = """
extern "C" {
const char *cudaGetErrorName(int);
const char *cudaGetErrorString(int);
typedef void (*SetError)(const char *kind, const char **parts, int num_parts);
__attribute__((weak)) void CuteDSLRT_TVMFFISetRaisedCudaError(SetError set_error, int code) {
  const char *parts[] = {cudaGetErrorName(code), ": ", cudaGetErrorString(code)};
  set_error("RuntimeError", parts, 3);
}
__attribute__((weak)) void CuteDSLRT_TVMFFISetRaisedCudaLaunchError(SetError set_error, ...) {
  const char *parts[] = {"the kernel's launch configuration is beyond this GPU"};
  set_error("RuntimeError", parts, 1);
}
}
"""
# Nothing else may meet the symbols of another copy of the same runtime in one process.
EXPORTS = "{ global: __tvm_ffi_*; local: *; };"


@dataclass(frozen=True)
class KernelJob:
    """One kernel to compile; `kernel` is where its object file goes, dtype is PyTorch's name."""

    kernel: str
    dtype: str
    head_dim: int


def flash_attention_versions() -> dict[str, str]:
    """The versions of the packages that compile the kernel, by name.

    Raises WanExportError when one is missing.
    """
    try:
        return {name: version(name) for name in PACKAGES}
    except PackageNotFoundError as error:
        raise WanExportError(
            f"FlashAttention-4 needs {error.name}: {installing('flash-attn-4')}"
        ) from error


def compile_flash_attention(
    folder: Path,
    *,
    dtype: str,
    head_dim: int,
    device: str = "cuda",
    lifeline: Lifeline | None = None,
) -> Path:
    """Write the kernel for a GPU of this machine into the folder, and return the library's path.

    dtype is `bf16` or `fp16`; the compilers are stopped when the lifeline's block ends.
    Raises WanExportError when a package or a C++ compiler is missing,
    when the device is not a Hopper GPU, or when the kernel does not compile.
    """
    flash_attention_versions()
    if dtype not in DTYPES:
        raise BadRequest(f"FlashAttention-4 takes bf16 or fp16, not {dtype}: leave it out")
    library = folder / f"flash_attention-{dtype}-{head_dim}.so"
    with tempfile.TemporaryDirectory(prefix="flash-attention-", dir=folder) as name:
        kernel = Path(name).resolve() / "kernel.o"
        needed = _compile_in_child(kernel, _architecture(device), dtype, head_dim, lifeline)
        _link(kernel, needed, library, lifeline)
    return library


def _architecture(device: str) -> str:
    """The GPU's architecture as `90`. Raises WanExportError when it is none of Hopper."""
    import torch

    if not torch.cuda.is_available():
        raise WanExportError("FlashAttention-4 is compiled for this machine's GPU: it has none")
    major, minor = torch.cuda.get_device_capability(device)
    # Newer kernels specialize on the lengths; one library must serve every geometry.
    if major != 9:
        raise WanExportError(
            f"FlashAttention-4 is compiled for Hopper (sm90), and this GPU is sm{major}{minor}: "
            f"use cudnn"
        )
    return f"{major}{minor}"


def _compile_in_child(
    kernel: Path, architecture: str, dtype: str, head_dim: int, lifeline: Lifeline | None
) -> dict[str, str]:
    """Compile in a process of its own, as the packages stay loaded and patch PyTorch.

    Returns the libraries to link: `runtime`, `tvm_ffi` and `cudart`.
    """
    environment = {
        "FLASH_ATTENTION_ARCH": f"sm_{architecture}",
        "CUTE_DSL_ARCH": f"sm_{architecture}a",
        "FLASH_ATTENTION_NUM_SMS": str(NUM_SMS),
        # A kernel found in the package's own cache would not be compiled.
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0",
    }
    job = KernelJob(str(kernel), DTYPES[dtype], head_dim)
    try:
        needed: dict[str, str] = run_process(
            "backends.aoti.flash_attention",
            job,
            kernel.parent,
            lifeline=lifeline,
            environment=environment,
        )
    except WanExportError as error:
        raise WanExportError(f"FlashAttention-4 does not compile: {error}") from error
    return needed


def _link(kernel: Path, needed: dict[str, str], library: Path, lifeline: Lifeline | None) -> None:
    """Link the object file into the library. Raises WanExportError when that fails."""
    errors, exports = kernel.with_name("errors.cpp"), kernel.with_name("exports.map")
    errors.write_text(ERRORS)
    exports.write_text(EXPORTS)
    linked = kernel.with_name(library.name)
    command = [compiler(), "-shared", "-fPIC", "-O2", *march_flags(level_for("cuda"))]
    command += ["-ffunction-sections", "-o", str(linked), str(kernel), str(errors)]
    command += [needed["runtime"], "-Wl,--as-needed", needed["tvm_ffi"], needed["cudart"]]
    command += [f"-Wl,--no-undefined,--gc-sections,--version-script={exports}"]
    try:
        ended = run_command(
            command,
            environment=environment_of(kernel.parent),
            lifeline=lifeline,
            folders=[kernel.parent],
        )
    except OSError as error:
        raise WanExportError(
            f"FlashAttention-4 needs a C++ compiler ({error}): install g++, or set CXX to one"
        ) from error
    if ended.code:
        words = last_words(ended.code, ended.errors)
        raise WanExportError(f"FlashAttention-4 cannot be linked: {words}")
    linked.replace(library)


def _in_one_line(error: BaseException) -> str:
    """The message without colours and line breaks, at most MAX_WORDS characters."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return f"{type(error).__name__}: {' '.join(plain.split())}"[:MAX_WORDS]


class _Captured(Exception):
    """Carries what FlashAttention-4 was about to compile."""

    def __init__(self, arguments: tuple[Any, ...], options: str) -> None:
        super().__init__("captured")
        self.arguments = arguments
        self.options = options


def _what_it_compiles(dtype: str, head_dim: int) -> _Captured:
    """FlashAttention-4's own choice of kernel, tiles and placeholders for attention without a mask.

    Its entry point is called on tensors without memory, and stopped where it would compile.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    cute: Any = import_module("cutlass.cute")
    interface = import_module("flash_attn.cute.interface")

    def capture(*arguments: Any, options: str = "") -> None:
        raise _Captured(arguments, options)

    compile_kernel, cute.compile = cute.compile, capture
    try:
        with FakeTensorMode(), torch.no_grad():
            shape, kind = (2, 1024, 3, head_dim), getattr(torch, dtype)
            q, k, v = (torch.empty(shape, dtype=kind, device="cuda") for _ in range(3))
            interface._flash_attn_fwd(q, k, v, return_lse=True)
    except _Captured as captured:
        return captured
    finally:
        cute.compile = compile_kernel
    raise RuntimeError("flash-attn-4 compiled nothing: this version of it is not supported")


def _five_tensors(forward: Any, rest: list[Any]) -> Callable[..., None]:
    """The kernel as a function of q, k, v, the output, the logarithms of the sums of exponentials
    and the stream, whatever else it takes."""

    def attention(q: Any, k: Any, v: Any, out: Any, lse: Any, stream: Any) -> None:
        forward(q, k, v, out, lse, *rest, stream)

    return attention


def _compile(kernel: Path, dtype: str, head_dim: int) -> dict[str, str]:
    """Write the object file, and return the libraries that it must be linked with."""
    cute = import_module("cutlass.cute")
    captured = _what_it_compiles(dtype, head_dim)
    forward, *tensors = captured.arguments[:6]
    *rest, stream = captured.arguments[6:]
    function = cute.jit(_five_tensors(forward, rest))
    compiled = cute.compile(function, *tensors, stream, options=captured.options)
    compiled.export_to_c(object_file_path=str(kernel), function_name=FUNCTION)
    runtime = Path(cute.runtime.find_runtime_libraries(enable_tvm_ffi=False)[0])
    return {
        "runtime": str(runtime.with_name("libcuda_dialect_runtime_static.a")),
        "tvm_ffi": str(import_module("tvm_ffi.libinfo").find_libtvm_ffi()),
        "cudart": _loaded_cuda_runtime(),
    }


def _loaded_cuda_runtime() -> str:
    """The libcudart of this process's PyTorch, which is the one that serves."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/libcudart.so" in line:
            return line[line.index("/") :]
    raise RuntimeError("PyTorch has not loaded libcudart")


def compile_kernel(job: KernelJob) -> dict[str, str]:
    """The child's side: compile in this process; return the libraries to link."""
    try:
        return _compile(Path(job.kernel), job.dtype, job.head_dim)
    except ImportError as error:
        raise WanExportError(f"{_in_one_line(error)}: {installing('flash-attn-4')}") from error
    except Exception as error:
        raise WanExportError(known(error) or _in_one_line(error)) from error


if __name__ == "__main__":
    main(sys.argv[1], lambda job: compile_kernel(KernelJob(**job)))
