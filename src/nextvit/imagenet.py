"""The 1000 classes of ImageNet-1K, in the order of the published weights."""

from functools import cache
from importlib import resources


@cache
def labels() -> tuple[str, ...]:
    """English names."""
    return _lines("imagenet_labels.txt")


@cache
def wordnet_ids() -> tuple[str, ...]:
    """WordNet ids, such as n01440764: the names of ImageNet's own folders."""
    return _lines("imagenet_wordnet_ids.txt")


def _lines(name: str) -> tuple[str, ...]:
    return tuple((resources.files("nextvit.data") / name).read_text(encoding="utf-8").splitlines())
