"""DATA as every verb takes it: a folder of images, or shards, by one set of names."""

from collections.abc import Sequence
from pathlib import Path

from nextvit.data.folders import folder_split, folder_splits
from nextvit.data.shards import are_shards, shard_split, shard_splits
from nextvit.data.split import Split


def split_names(data: str | Path) -> tuple[str, ...]:
    """Of train, val and test, those that `data` has."""
    return shard_splits(data) if are_shards(data) else folder_splits(data)


def read_split(data: str | Path, name: str, labels: Sequence[str] | None = None) -> Split:
    """A split of `data`: a folder as `folders` reads it, or shards; labels: see `numbered`."""
    return shard_split(data, name, labels) if are_shards(data) else folder_split(data, name, labels)


def read_splits(data: str | Path) -> list[Split]:
    """All splits that `data` has."""
    return [read_split(data, name) for name in split_names(data)]


def default_eval_split(data: str | Path) -> str:
    """`test` where there is one, else `val`: the images that training did not see."""
    return "test" if "test" in split_names(data) else "val"
