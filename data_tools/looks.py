"""What a picture looks like, in 56 bytes: a perceptual hash and a few colours."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mmit.config import ConfigError
from mmit.data.sample import SampleError

COLOURS = 4
"""Pictures are also compared as COLOURS x COLOURS pixels, since a perceptual hash sees no colour: to it a red square
and a blue one are the same."""
SIDE = 64
PRINT = np.dtype([("hash", "<u8"), ("colours", "u1", (COLOURS * COLOURS * 3,))])


def need_imagehash(option: str) -> None:
    try:
        import imagehash  # noqa: F401
    except ImportError:
        raise ConfigError(f"{option} needs imagehash; pip install 'mmit[quality]'") from None


def print_of(pixels: np.ndarray) -> np.ndarray:
    """PRINT (1,) of a picture (H, W, 3) uint8: its 64-bit DCT hash (Zauner 2010) and its colours."""
    import imagehash

    image = Image.fromarray(pixels)
    # The hash is of 32 x 32 pixels: shrunk by whole pixels first, a photo takes a fifth of the time.
    image = image.reduce(max(1, min(image.size) // SIDE))
    bits = imagehash.phash(image, hash_size=8).hash.ravel()
    value = np.zeros(1, dtype=PRINT)
    value["hash"] = np.packbits(bits).view(">u8").astype(np.uint64)
    value["colours"] = np.asarray(image.resize((COLOURS, COLOURS), Image.Resampling.BOX)).ravel()
    return value


def printed(pixels: np.ndarray) -> str:
    """The print of a picture as a sample's record keeps it: the 16 digits that imagehash writes, and the colours."""
    value = print_of(pixels)
    return value["hash"].astype(">u8").tobytes().hex() + value["colours"].tobytes().hex()


def read_print(text: str, where: str) -> np.ndarray:
    """PRINT (1,) of what `printed` wrote."""
    try:
        raw = bytes.fromhex(text)
        value = np.zeros(1, dtype=PRINT)
        value["hash"] = np.frombuffer(raw, dtype=">u8", count=1)
        value["colours"] = np.frombuffer(raw, dtype="u1", offset=8).reshape(1, -1)
    except (ValueError, TypeError):
        raise SampleError(f"{where}: its print {str(text)[:40]!r} is none; convert again") from None
    return value
