"""Masks as COCO writes them uncompressed: the lengths of runs."""

import numpy as np


def rle(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths of a bool (H, W): down the columns, ground and object in turn, ground first."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(edges, prepend=0, append=flat.size).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}
