"""What defines a Wan DiT: its sizes, and what follows from them."""

from dataclasses import dataclass, fields

from wanexport.runtime.errors import BundleError

CONDITION_CHANNELS = 20  # I2V: mask (4) + image latent (16)
IMAGE_DIM = 1280  # width of CLIP ViT-H/14 features
EXPERTS = ("high_noise", "low_noise")
_MAX_SIZE = 1 << 20  # of any, and _MAX_LAYERS: over ten times what any Wan has
_MAX_LAYERS = 1024
_UNBOUND = ("family", "image_tokens", "eps")  # fields that are no size from 1


@dataclass(frozen=True)
class WanConfig:
    """A Wan DiT's family, a row of `family.FAMILIES`, and its sizes.

    Raises BundleError when the sizes do not fit together.
    """

    family: str
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int  # of the patch embedding: latent plus condition
    out_channels: int
    image_tokens: int  # CLIP tokens: 0, 257 (I2V) or 514 (first and last frame)
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = [getattr(self, f.name) for f in fields(self) if f.name not in _UNBOUND]
        if any(type(size) is not int for size in (*sizes, self.image_tokens)):
            raise BundleError(f"the sizes of a Wan are whole numbers, got {sizes!r:.200}")
        if min(sizes) < 1 or max(sizes) > _MAX_SIZE or self.num_layers > _MAX_LAYERS:
            raise BundleError(
                f"a Wan has sizes from 1 to {_MAX_SIZE} and at most {_MAX_LAYERS} layers, "
                f"got {self!r:.300}"
            )
        if self.freq_dim % 2 or not 0 < self.eps < 1:
            raise BundleError(
                f"freq_dim {self.freq_dim}, eps {self.eps}: expected an even number, and one "
                f"between 0 and 1"
            )
        if self.dim % self.num_heads or self.head_dim % 2 or self.head_dim < 6:
            raise BundleError(
                f"dim {self.dim} does not split into {self.num_heads} heads of even width over 4"
            )
        if self.condition_channels not in (0, CONDITION_CHANNELS):
            raise BundleError(
                f"no Wan has {self.in_channels} input and {self.out_channels} output channels: "
                f"expected equal counts (T2V, TI2V) or {CONDITION_CHANNELS} more inputs (I2V)"
            )
        if self.image_tokens not in (0, 257, 514):
            raise BundleError(f"{self.image_tokens} image tokens: expected 0, 257 or 514")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def condition_channels(self) -> int:
        """Channels of the `condition` input; 0 where there is none."""
        return self.in_channels - self.out_channels
