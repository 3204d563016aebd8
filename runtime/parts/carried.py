"""The encoders that a bundle carries: which it has, and what lies in the file of each.

A file holds the weights by our own names. What no weight tells lies beside them as bytes: the
sizes, and of the text encoder the tokenizer. So an encoder is one weights file of the manifest, and
whatever is true of those is true of it.
"""

from pathlib import Path

from wanexport.runtime.bundle.manifest import BASE, Manifest, WeightsRecord, read_manifest

CONFIG, TOKENIZER = "config.json", "tokenizer.json"  # tensors of bytes
MOST_BYTES = {CONFIG: 1 << 16, TOKENIZER: 1 << 27}  # umT5's tokenizer.json has 17 MB


def carried_encoder(bundle: str | Path, part: str) -> WeightsRecord | None:
    """The record of a part, `text_encoder` or `image_encoder`, that the bundle carries.

    None where it has none. Raises BundleError as read_manifest does.
    """
    return carried_in(read_manifest(Path(bundle)), part)


def carried_in(manifest: Manifest, part: str) -> WeightsRecord | None:
    """The same of a manifest."""
    records = manifest.weights.values()
    return next((w for w in records if (w.role, w.name) == (part, BASE)), None)
