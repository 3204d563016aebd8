"""Wan's VAE: pixels to normalised latents and back, through diffusers' AutoencoderKLWan.

It computes in fp32, as the official pipelines do: they make WanVAE and Wan2_2_VAE with the default
dtype, torch.float, and autocast to that dtype is none. On a GPU, PyTorch's default lets
convolutions use TF32, there and here.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wanexport.runtime.arrays import Array, count_not_finite, is_on_gpu, to_numpy
from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    EngineFailure,
    WanExportWarning,
    first_line,
    needing_extra,
)
from wanexport.runtime.geometry import TEMPORAL_STRIDE, latent_count
from wanexport.runtime.machine.memory import (
    available_bytes,
    free_bytes,
    limit_bytes,
    physical_bytes,
)
from wanexport.runtime.parts.vae_keys import config_of, diffusers_name

if TYPE_CHECKING:
    from torch import Tensor

TILE, OVERLAP = 256, 64  # pixels of a tile's side, and of what two tiles share
_SHARE = 0.75  # of a machine's memory: the whole picture may take it

# Peak memory in bytes of diffusers 0.42.1 on a CPU, by tests/tables/vae_memory.py at 240x416: for
# each pixel and each channel of the widest layers, in a first latent frame and in a later one.
_FIXED_BYTES = 10**8
_BYTES = {
    ("encode", False): (54, 195),  # Wan2.1
    ("decode", False): (107, 254),
    ("encode", True): (20, 52),  # Wan2.2
    ("decode", True): (35, 97),
}


def open_vae(weights: str | Path, *, device: str = "cpu", tiling: bool | None = None) -> "Vae":
    """Open a VAE: a folder in diffusers' layout, or the official Wan2.1_VAE.pth or Wan2.2_VAE.pth.

    tiling True cuts a picture of more than 256 pixels a side into tiles, False never does, and None
    does where memory does not suffice for the whole: on a CPU, where it would take over three
    quarters of the machine's, and on a GPU, where the whole was tried first.
    Raises WanExportError when a package is missing, when there is no such VAE or it is damaged, and
    when it does not fit in the GPU's memory.
    """
    with needing_extra("pipeline", "the VAE"):
        import torch
        from diffusers import AutoencoderKLWan
    weights = Path(weights)
    read = _read_folder if weights.is_dir() else _read_official
    model = read(AutoencoderKLWan, weights)
    try:
        return Vae(model, device=device, tiling=tiling)
    except torch.OutOfMemoryError as error:
        raise EngineFailure(
            f"the GPU has {free_bytes(device) / 1e9:.1f} GB free, which do not hold the VAE: "
            f"free some, or run the VAE on the CPU"
        ) from error


def _read_official(model_class: Any, path: Path) -> Any:
    import torch

    from wanexport.runtime.parts.torch_checkpoint import load_converted, read_state_dict

    tensors = read_state_dict(path)
    config = config_of({name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    with torch.device("meta"):
        model = model_class(**config)
    return load_converted(model, {diffusers_name(n): t for n, t in tensors.items()}, path).float()


def _read_folder(model_class: Any, folder: Path) -> Any:
    import torch

    _check_class(folder)
    # None lets diffusers take a pickle, of which it loads tensors alone.
    use_safetensors = True if any(folder.glob("*.safetensors*")) else None
    try:
        with _quiet_diffusers():
            model, found = model_class.from_pretrained(
                folder,
                local_files_only=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
                use_safetensors=use_safetensors,
                # True has PyTorch make every new parameter of the process without memory meanwhile,
                # of parts too that other threads open.
                low_cpu_mem_usage=False,
            )
    except Exception as error:  # of many kinds: config, index and every shard may be damaged
        raise BundleError(
            f"cannot read the VAE in {folder} ({first_line(error)[:160]}): download it again"
        ) from error
    # diffusers fills with random numbers what the files lack, and drops what they have too much.
    if wrong := sorted({*found["missing_keys"], *found["unexpected_keys"]}):
        raise BundleError(
            f"{folder} does not fit AutoencoderKLWan: {len(wrong)} tensors are missing or "
            f"unexpected, {wrong[0]} for one: download it again"
        )
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """No reports of diffusers, whose findings become one line of ours."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_class(folder: Path) -> None:
    """Raise BundleError when config.json is missing, damaged or of another model."""
    path = folder / "config.json"
    try:
        name = json.loads(path.read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(
            f"{path} is missing or damaged: expected a folder in diffusers' layout, or the file "
            f"Wan2.1_VAE.pth or Wan2.2_VAE.pth"
        ) from error
    if name != "AutoencoderKLWan":
        raise BundleError(f"{path} is of {name!r:.60}: expected AutoencoderKLWan, Wan's VAE")


class Vae:
    """A VideoCodec: one AutoencoderKLWan on a device. It serves one call at a time.

    `tiled` tells whether the last call cut the picture into tiles, which changes the result a
    little: the VAE does not see beyond a tile. It is decided once for a shape, so that a later call
    gives the same pixels whatever else is in memory by then.
    """

    def __init__(self, model: Any, *, device: str, tiling: bool | None) -> None:
        import torch

        config = model.config
        self.device = device
        self.tiling = tiling
        self.tiled = False
        self._decided: dict[tuple[object, ...], bool] = {}  # task and shape -> whether in tiles
        self.channels: int = config.z_dim
        self.spatial_stride: int = config.scale_factor_spatial
        self._model = model.to(device)
        shape = (1, self.channels, 1, 1, 1)
        self._mean = torch.tensor(config.latents_mean, device=device).view(shape)
        # As in the official code, which multiplies by the reciprocal and divides by that again.
        self._scale = 1 / torch.tensor(config.latents_std, device=device).view(shape)

    def encode(self, video: Array) -> np.ndarray:
        """The normalised posterior mean, fp32 [1, C, f, h, w], of a video [3, F, H, W] in [-1, 1].

        f is (F - 1) / 4 + 1; h and w are H and W by the spatial stride. A video on a GPU stays
        there, and is not searched for NaN.
        Raises BadRequest when the video has another shape, NaN or Inf, and EngineFailure when
        memory does not suffice.
        """
        pixels = video.detach().float() if is_on_gpu(video) else to_numpy(video)
        stride = self.spatial_stride
        channels, frames, height, width = pixels.shape if pixels.ndim == 4 else (0, 0, 0, 0)
        fits = frames % TEMPORAL_STRIDE == 1 and height % stride == 0 == width % stride
        if channels != 3 or not fits or 0 in pixels.shape:
            raise BadRequest(
                f"a video of shape {list(pixels.shape)} cannot be encoded: expected [3, F, H, W], "
                f"F of 4k+1, H and W multiples of {stride}"
            )
        return self._run("encode", pixels[None]).cpu().numpy()

    def decode(self, latent: Array) -> np.ndarray:
        """The frames, uint8 [F, H, W, 3], of a normalised latent [1, C, f, h, w].

        A value v, which the model clamps to [-1, 1], becomes (v + 1) / 2 * 255 without its
        fraction, as in the official cache_video (Wan2.1) and save_video (Wan2.2). A latent on a GPU
        stays there, and is not searched for NaN.
        Raises BadRequest when the latent has another shape, NaN or Inf, and EngineFailure when
        memory does not suffice.
        """
        array = latent.detach().float() if is_on_gpu(latent) else to_numpy(latent)
        if array.ndim != 5 or array.shape[:2] != (1, self.channels) or not array.size:
            raise BadRequest(
                f"a latent of shape {list(array.shape)} cannot be decoded: this VAE takes "
                f"[1, {self.channels}, F, h, w]"
            )
        video = self._run("decode", array)[0].add_(1).div_(2).mul_(255)
        return video.byte().permute(1, 2, 3, 0).contiguous().cpu().numpy()

    def close(self) -> None:
        """Free the model's memory, a GPU's too; later calls raise EngineFailure."""
        from wanexport.runtime.parts.torch_checkpoint import free_unused_memory

        self._model = None
        free_unused_memory()

    def _run(self, task: str, array: Array) -> "Tensor":
        """Encode or decode an array, whole or in tiles; tiles where a GPU refuses the whole."""
        if self._model is None:
            raise EngineFailure("the VAE is closed: open it again")
        if bad := count_not_finite(array):
            raise BadRequest(
                f"cannot {task} {bad} values that are NaN or Inf: look at what made them"
            )
        height, width = self._sides(task, array)
        shape = (task, *array.shape)
        can_tile = self.tiling is not False and max(height, width) > TILE
        is_short = self._is_short(task, array, can_tile)
        self.tiled = can_tile and (self.tiling is True or self._decided.get(shape, is_short))
        result = self._attempt(task, array)
        if result is None and can_tile and not self.tiled and shape not in self._decided:
            self.tiled = True
            result = self._attempt(task, array)
        if result is None:
            raise EngineFailure(
                f"the GPU's memory does not suffice to {task} {height}x{width}, with "
                f"{free_bytes(self.device) / 1e9:.1f} GB free: free some, or run the VAE on the CPU"
            )
        self._decided.setdefault(shape, self.tiled)
        return result

    def _is_short(self, task: str, array: Array, can_tile: bool) -> bool:
        """Whether a CPU's memory does not suffice for the whole; a GPU is asked by trying.

        Warns when the whole is to be, and less is free. Raises EngineFailure when there can never
        be enough, cut into tiles or not.
        """
        if self.device != "cpu":
            return False
        height, width = self._sides(task, array)
        frames = array.shape[2] if task == "decode" else latent_count(array.shape[2])
        whole, tiled = (
            needed_bytes(self._model.config, task, frames, height, width, tile)
            for tile in (None, TILE)
        )
        least = whole if self.tiling is False else tiled
        if least > limit_bytes():
            raise EngineFailure(
                f"to {task} {height}x{width} needs {least / 1e9:.1f} GB of memory, of "
                f"{limit_bytes() / 1e9:.1f} GB here: use a GPU, or make a smaller video"
            )
        is_short = whole > _SHARE * physical_bytes()
        if not (is_short and can_tile) and whole > (free := available_bytes()):
            warnings.warn(
                f"to {task} {height}x{width} needs {whole / 1e9:.1f} GB of memory, of which "
                f"{free / 1e9:.1f} GB are free: close what else takes it",
                WanExportWarning,
                stacklevel=2,
            )
        return is_short

    def _sides(self, task: str, array: Array) -> tuple[int, int]:
        """Height and width in pixels of what is to be encoded or decoded."""
        stride = self.spatial_stride if task == "decode" else 1
        return array.shape[3] * stride, array.shape[4] * stride

    def _attempt(self, task: str, array: Array) -> "Tensor | None":
        """The result, or None where a GPU's memory does not suffice."""
        import torch

        from wanexport.runtime.parts.torch_checkpoint import free_unused_memory

        try:
            with torch.no_grad(), torch.autocast(torch.device(self.device).type, enabled=False):
                return self._compute(task, torch.as_tensor(array))
        except torch.OutOfMemoryError:
            pass  # and the tensors of the failed call are free, once the exception is
        self._model.clear_cache()
        free_unused_memory()
        return None

    def _compute(self, task: str, batch: "Tensor") -> "Tensor":
        from wanexport.runtime.parts.vae_tiling import run_tiled

        function = {"encode": self._encode, "decode": self._decode}[task]
        if not self.tiled:
            return function(batch)
        stride = self.spatial_stride
        return run_tiled(
            function,
            batch,
            tile=TILE // stride,
            overlap=OVERLAP // stride,
            scale_in=stride if task == "encode" else 1,
            scale_out=stride if task == "decode" else 1,
        )

    def _encode(self, pixels: "Tensor") -> "Tensor":
        mean = self._model.encode(pixels.to(self.device), return_dict=False)[0].mode()
        return (mean - self._mean) * self._scale

    def _decode(self, latent: "Tensor") -> "Tensor":
        latent = latent.to(self.device) / self._scale + self._mean
        return self._model.decode(latent, return_dict=False)[0]


def needed_bytes(
    config: Any, task: str, frames: int, height: int, width: int, tile: int | None = None
) -> int:
    """Memory on a CPU to encode or decode `frames` latent frames, by measurement.

    The model computes one latent frame at a time, which is one frame of video or, after the first,
    four; pixels and results are held whole, twice. tile is the side of tiles, None for the whole.
    """
    first, later = _BYTES[task, bool(config.is_residual)]
    channels = config.base_dim
    if task == "decode":
        channels = config.decoder_base_dim or config.base_dim
    computed = height * width if tile is None else min(height, tile) * min(width, tile)
    per_pixel = later if frames > 1 else first
    video = 12 * height * width * ((frames - 1) * TEMPORAL_STRIDE + 1)
    return _FIXED_BYTES + channels * computed * per_pixel + 2 * video
