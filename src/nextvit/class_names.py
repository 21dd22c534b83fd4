"""Names of the classes of the public sets, in the order of the published weights."""

from functools import cache
from importlib import resources


@cache
def imagenet() -> tuple[str, ...]:
    """English names of the 1000 classes of ImageNet-1K."""
    return _lines("imagenet_labels.txt")


@cache
def imagenet_wordnet_ids() -> tuple[str, ...]:
    """Their WordNet ids, such as n01440764: the names of ImageNet's own folders."""
    return _lines("imagenet_wordnet_ids.txt")


@cache
def ade20k() -> tuple[str, ...]:
    """The 150 classes of ADE20K's benchmark; its label files have 1 for the first one."""
    return _lines("ade20k_labels.txt")


@cache
def coco() -> tuple[str, ...]:
    """The 80 classes of COCO, by ascending number of its categories."""
    return _lines("coco_labels.txt")


def coco_ids(labels: tuple[str, ...]) -> tuple[int, ...]:
    """Numbers of categories in COCO's results: its own, which have gaps, for its classes; for others from 1."""
    if labels != coco():
        return tuple(range(1, len(labels) + 1))
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    return tuple(number for number in range(1, 91) if number not in gaps)


def of_task(task: str) -> tuple[str, ...]:
    """Those of the set that the published weights of a task were trained on."""
    return {"classify": imagenet, "segment": ade20k, "detect": coco}[task]()


def _lines(name: str) -> tuple[str, ...]:
    return tuple((resources.files("nextvit.data") / name).read_text(encoding="utf-8").splitlines())
