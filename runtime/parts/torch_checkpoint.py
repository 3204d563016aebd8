"""Fill a model of transformers or diffusers from either layout of a checkpoint; free it again.

An official .pth file is mapped, not read: its tensors take memory where they are used. Only tensors
are unpickled, so a file can execute nothing. This file imports PyTorch: import it where a model is
opened.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar
from zipfile import ZIP_STORED, ZipFile

import torch
from packaging.version import Version
from torch import Tensor, nn

from wanexport.runtime.bundle.regular_file import open_regular
from wanexport.runtime.dtypes import DTYPES, PRECISIONS
from wanexport.runtime.errors import BundleError, printable

_SHOWN = 4  # of the tensors that do not fit, in an error
_FLOATS = [DTYPES[name].torch for name in PRECISIONS]
_ZIP = b"PK\x03\x04"  # what torch.save writes since PyTorch 1.6; an older file cannot be mapped

Model = TypeVar("Model", bound=nn.Module)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """All tensors of a .pth file by name, on the CPU and mapped to the file.

    Raises BundleError as load_saved does, and when the file holds no state dict.
    """
    state = load_saved(path)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise BundleError(
            f"{printable(path)} is no state dict: expected tensors by name, download the official "
            f"file again"
        )
    return dict(state)


def load_saved(path: Path) -> Any:
    """What torch.save wrote, its tensors on the CPU and mapped to the file.

    Raises BundleError when there is no such file, it is damaged, or it holds what could run code.
    """
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise BundleError(
            f"cannot read {printable(path)}: {error.strerror}: pass a checkpoint that has it"
        ) from error
    try:
        return _load(descriptor, path)
    except UnpicklingError as error:
        raise BundleError(
            f"{printable(path)} is damaged or holds more than tensors, which could run code, and "
            f"is not read: download the official file again"
        ) from error
    except Exception as error:  # of many kinds, for the places where a file may be damaged
        raise BundleError(
            f"{printable(path)} is no file of torch.save, or is cut short: download it again"
        ) from error


def _load(descriptor: int, path: Path) -> Any:
    """What torch.save wrote into an open file, mapped where its format allows; closes the file."""
    with open(descriptor, "rb") as file:
        mappable = file.read(len(_ZIP)) == _ZIP
        if mappable:
            with ZipFile(file) as archive:
                records = archive.infolist()
            # torch.save packs nothing: a small file could not be unpacked in bounded memory.
            if any(record.compress_type != ZIP_STORED for record in records):
                raise ValueError("packed records")
        # By the descriptor, where it has a name: another file may have the path meanwhile.
        own = Path(f"/proc/self/fd/{descriptor}")
        name = own if own.exists() else path
        return torch.load(name, map_location="cpu", weights_only=True, mmap=mappable)


def load_converted(model: Model, tensors: Mapping[str, Tensor], path: Path) -> Model:
    """Give a model built on the meta device its tensors, without a copy; it is in eval mode then.

    Tied parameters become two that share memory: tie them again. `path` is named in errors.
    Raises BundleError when a tensor is missing, unexpected, not of the model's shape or not
    fp32, bf16 or fp16.
    """
    expected = model.state_dict()
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [
        f"unexpected {printable(name)}" for name in sorted(tensors.keys() - expected.keys())
    ]
    for name in sorted(expected.keys() & tensors.keys()):
        shape, dtype = list(tensors[name].shape), tensors[name].dtype
        if shape != list(expected[name].shape):
            problems.append(f"{name} is {shape}, expected {list(expected[name].shape)}")
        elif str(dtype).removeprefix("torch.") not in _FLOATS:
            problems.append(f"{name} is {dtype}, expected {', '.join(_FLOATS)}")
    _refuse(problems, type(model), path)
    model.load_state_dict(dict(tensors), assign=True)
    return model.eval().requires_grad_(False)


def load_pretrained(model_class: Any, folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """transformers' `from_pretrained` of a local folder, for inference.

    Raises BundleError when the folder cannot be read, and when a tensor is missing or misshapen,
    which transformers would fill with random numbers.
    """
    import transformers

    if not (folder / "config.json").is_file():  # transformers would take a model of its own choice
        raise BundleError(f"{folder} has no config.json: download it again")
    # transformers 4.56 renamed the argument.
    renamed = Version(transformers.__version__) >= Version("4.56")
    options["dtype" if renamed else "torch_dtype"] = dtype
    if any(folder.glob("*.safetensors*")):  # beside a pickle they are what is read
        options["use_safetensors"] = True
    try:
        with _quiet_transformers():
            model, found = model_class.from_pretrained(
                folder,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except Exception as error:  # of many kinds: config, index and every shard may be damaged
        reason = printable(str(error).strip().partition("\n")[0], 300)
        raise BundleError(f"cannot read {folder} ({reason}): download it again") from error
    problems = [f"missing {name}" for name in sorted(found["missing_keys"])]
    for entry in sorted(found["mismatched_keys"]):  # names, or with both shapes since version 5
        problems.append(f"misshapen {entry if isinstance(entry, str) else entry[0]}")
    _refuse(problems, model_class, folder)
    return model.eval().requires_grad_(False)


def free_unused_memory() -> None:
    """Give back what models held that nothing refers to any more, on a GPU too."""
    gc.collect()  # the first call of a process can leave a model in a reference cycle
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _refuse(problems: Sequence[str], model_class: type, path: Path) -> None:
    """Raise BundleError when there are any, with the first few of them."""
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise BundleError(
            f"{printable(path)} does not fit {model_class.__name__}: {'; '.join(problems[:_SHOWN])}"
            f"{more}: download it again"
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Neither bars nor reports of transformers, whose findings become one line of ours."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
