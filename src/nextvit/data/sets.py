"""DATA as every verb takes it: a folder of images, shards, images with masks or with objects, by one set of names."""

from collections.abc import Sequence
from pathlib import Path

from nextvit.data.folders import folder_split, folder_splits
from nextvit.data.masks import mask_split, mask_splits
from nextvit.data.objects import object_split, object_splits
from nextvit.data.shards import are_shards, shard_split, shard_splits
from nextvit.data.split import Split

TASKS = ("classify", "segment", "detect")


def split_names(data: str | Path, task: str = "classify") -> tuple[str, ...]:
    """Of train, val and test, those that `data` has."""
    if task == "segment":
        return mask_splits(data)
    if task == "detect":
        return object_splits(data)
    return shard_splits(data) if are_shards(data) else folder_splits(data)


def read_split(data: str | Path, name: str, labels: Sequence[str] | None = None, task: str = "classify") -> Split:
    """A split of `data`: a folder as `folders` reads it, or shards; for segmentation images and masks, for detection
    images and COCO's entries.

    labels: the classes of a model; see `numbered`.
    """
    if task == "segment":
        return mask_split(data, name, labels)
    if task == "detect":
        return object_split(data, name, labels)
    return shard_split(data, name, labels) if are_shards(data) else folder_split(data, name, labels)


def read_splits(data: str | Path, task: str = "classify") -> list[Split]:
    """All splits that `data` has."""
    return [read_split(data, name, task=task) for name in split_names(data, task)]


def default_eval_split(data: str | Path, task: str = "classify") -> str:
    """`test` where there is one, else `val`: the images that training did not see."""
    return "test" if "test" in split_names(data, task) else "val"


def task_of(data: str | Path) -> str:
    """What `data` is laid out for, by masks or COCO's entries beside the images. `demo` is for classification first."""
    if str(data) == "demo" or not Path(data).is_dir():
        return "classify"
    return "segment" if mask_splits(data) else "detect" if object_splits(data) else "classify"
