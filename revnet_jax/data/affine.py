"""Random affine maps of images: rotation, scaling, shear and shift at once."""

import numpy as np


def random_affine(
    image_BHWC: np.ndarray, uniforms_B6: np.ndarray, *, strength: float
) -> np.ndarray:
    """Maps each image by an affine map of its own, with bilinear interpolation.

    The pixel of the result at v = (y, x), counted from the centre, is the image's at v + A v + b.
    Each entry of A is uniform in [-strength, strength], and b is uniform in as large a share of
    half of the height and width. At 0.15 these are rotations up to 9 degrees, and scales and shears
    up to 15 %. Outside of the image are zeros.

    Args:
      image_BHWC: float32 [B, H, W, C].
      uniforms_B6: random numbers in [0, 1), six for each image.

    Returns:
      float32 [B, H, W, C]

    Cost: four reads of each pixel; memory for five copies of the batch.
    """
    height, width = image_BHWC.shape[1:3]
    # [6, B, 1, 1]: six numbers for each image, which broadcast over its pixels. In float32, like
    # the places below: float64 would double the copies of the batch.
    maps_6B11 = strength * (2 * uniforms_B6.astype(np.float32).T[..., None, None] - 1)
    y_HW, x_HW = np.meshgrid(_from_centre(height), _from_centre(width), indexing="ij")
    ay, by, cy, ax, bx, cx = maps_6B11
    # From here on places are counted from the top and left edges: pixel i is at i + 1/2.
    y_BHW = y_HW + ay * y_HW + by * x_HW + (cy + 1) * height / 2
    x_BHW = x_HW + ax * y_HW + bx * x_HW + (cx + 1) * width / 2
    # One row of zeros on each side stands for all that is outside.
    padded_BHWC = np.pad(image_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    top_BHW, down_BHWC = _place(y_BHW, height)
    left_BHW, right_BHWC = _place(x_BHW, width)
    image_B11 = np.arange(len(image_BHWC))[:, None, None]
    # The three indices broadcast to [B, H, W], so that a read is [B, H, W, C].
    at = lambda dy, dx: padded_BHWC[image_B11, top_BHW + dy, left_BHW + dx]
    # Bilinear interpolation, a + t (b - a): within both rows, then between them.
    upper = at(0, 0) + right_BHWC * (at(0, 1) - at(0, 0))
    lower = at(1, 0) + right_BHWC * (at(1, 1) - at(1, 0))
    return upper + down_BHWC * (lower - upper)


def _from_centre(size):
    return np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)


def _place(edge_BHW, size):
    """Returns the index in a padded image and the remainder, from places counted from the edge."""
    # Place e is index e - 1/2 of the image, and e + 1/2 of the image padded by one pixel. All that
    # is further outside is clipped onto the zeros.
    padded_BHW = np.clip(edge_BHW + 0.5, 0, size + 1)
    # At most `size`, because the next index is read too and the last one is size + 1.
    whole_BHW = np.minimum(np.floor(padded_BHW), np.float32(size))
    return whole_BHW.astype(np.int64), (padded_BHW - whole_BHW)[..., None]
