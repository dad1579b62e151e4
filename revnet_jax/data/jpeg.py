"""Checks that a JPEG file holds its whole image.

If the data of an image end early and an end-of-image marker follows, libjpeg fills the rest with
grey, and Pillow does not pass on libjpeg's warning. The checks here find such files without the
warning. Markers are those of ITU-T T.81 (1992), annex B.
"""

import io
import os
import re
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "MPO")  # an MPO file is a JPEG followed by others

_END = b"\xff\xd9"
# In the data of a scan, ff00 encodes a byte ff, and ffd0 to ffd7 (restart markers) separate parts.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_START_OF_SCAN = 0xDA
# c4 (Huffman tables), c8 (reserved) and cc (arithmetic coding) lie among the markers that start a
# frame, but start none.
_STARTS_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Bytes to append to truncated data: decoded, they give anything but an even grey. The leading 0
# completes an ff at the end of the data. The restart markers let decoding continue at whichever
# part the data end.
_NOISE = bytes(np.random.default_rng(0).integers(0, 255, 512, np.uint8))
_FILLER = b"\0" + _NOISE + b"".join(b"\xff" + bytes([0xD0 + i]) + _NOISE for i in range(8))


class _Structure(NamedTuple):
    """The structure of a file, from its markers.

    components: the ids of the colour components.
    final: the (component, coefficient) pairs whose last bit is in the file.
    end: the offset of the end-of-image marker, -1 if there is none.
    """

    components: frozenset[int]
    final: frozenset[tuple[int, int]]
    end: int


def check_complete(file: BinaryIO, image: Image.Image, min_size: tuple[int, int]) -> None:
    """Raises ValueError for a JPEG that ends early, with or without an end-of-image marker.

    Does not detect a cut within the last 8 or 16 rows and columns of pixels, a cut within the last
    scan of a progressive file (which adds one bit of detail), or damage in the middle.

    Args:
      file: the open file.
      image: the image in it, decoded after `draft("RGB", min_size)`.
      min_size: width and height.

    Cost: two reads of two bytes and one pixel. A file that is progressive, does not end with the
    marker, or has a grey last pixel is read once more; with a grey last pixel it is also decoded
    once more.
    """
    last = image.getpixel((image.width - 1, image.height - 1))
    # Missing data decode to 128 in every component, before colours are converted or inverted.
    grey = all(value in (127, 128) for value in (last if isinstance(last, tuple) else (last,)))
    file.seek(-len(_END), os.SEEK_END)
    progressive = image.info.get("progressive")
    # Most files are done here, and are not read once more.
    if file.read() == _END and not grey and not progressive:
        return
    file.seek(0)
    content = file.read()
    found = _structure(content)
    if found.end < 0:
        raise ValueError("the JPEG has no end-of-image marker")
    # All bits of all 64 coefficients of every component must have come.
    if progressive and any((i, k) not in found.final for i in found.components for k in range(64)):
        raise ValueError("the progressive JPEG lacks scans")
    if grey:
        # Bytes appended to the data change the image if, and only if, some data are missing.
        with Image.open(io.BytesIO(content[: found.end] + _FILLER + _END)) as filled:
            # Drafted like the image, to be decoded at the same scale.
            filled.draft("RGB", min_size)
            if filled.tobytes() != image.tobytes():
                raise ValueError("the JPEG's data end early, its last part would be grey")


def _structure(content: bytes) -> _Structure:
    components: set[int] = set()
    final: set[tuple[int, int]] = set()
    position = 2  # after the marker ffd8, the start of the image
    while match := _MARKER.search(content, position):
        marker, body = match[1][0], match.end() + 2
        if marker == _END[1]:
            return _Structure(frozenset(components), frozenset(final), match.start())
        # A segment begins with its length in two bytes, which it includes.
        length = int.from_bytes(content[match.end() : body])
        segment = content[body : match.end() + length]
        if marker in _STARTS_OF_FRAME:
            # Frame header (B.2.2): 6 bytes, then 3 for each component, its id first.
            components = set(segment[6::3])
        elif marker == _START_OF_SCAN:
            # Scan header (B.2.3): the number of components; id and tables of each; the first and
            # last coefficient; the bits of successive approximation.
            *ids, first, last, bits = (*segment[1:-3:2], *segment[-3:])
            if bits & 15 == 0:  # successive approximation low bit: 0 in the last scan
                final |= {(i, k) for i in ids for k in range(first, last + 1)}
        position = match.end() + length
    return _Structure(frozenset(components), frozenset(final), -1)
