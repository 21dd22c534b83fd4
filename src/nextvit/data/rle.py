"""Masks as COCO writes them: the lengths of runs."""

import numpy as np


def rle(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths of a bool (H, W): down the columns, ground and object in turn, ground first."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(edges, prepend=0, append=flat.size).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def from_text(text: str) -> list[int] | None:
    """The run lengths that COCO's compressed text holds, which may be negative or too few; None: it is no such text.

    A length is written in parts of five bits, the lowest first, from the fourth on as the difference to the one two
    before.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more to come
            continue
        value -= (1 << shift) * bool(bits & 16)  # the sign
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return None if shift else counts
