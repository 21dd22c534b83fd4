"""What is wrong with a folder of images, before anything is learnt from it."""

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from nextvit.data.images import ImageRejected, printable, upright_size
from nextvit.data.masks import IGNORED, MaskSplit
from nextvit.data.objects import Objects, ObjectSplit
from nextvit.data.split import UNLABELLED, Split
from nextvit.devices import cpu_count
from nextvit.errors import UserError, first_few
from nextvit.progress import track

T = TypeVar("T")
Truth = np.ndarray | Objects | None  # the label of each pixel; the objects; nothing, of classification
QUICK = 2_000  # images that training decodes before it starts, and all masks
QUICK_FILES = 20_000  # and files that it compares across splits
MOST_UNREADABLE = 0.01  # of the images, and of the objects
SMALL_SIDE = 32  # pixels
HASH_SIDE = 16
NEAR = 6  # of the 256 bits of a hash may differ in two copies of a picture,
NEAR_LEVELS = 4.0  # and so much of 255, on the average, what is left when brightness and contrast are made the same
MOST_COMPARED = 20_000  # images, each with each; of more, only equal hashes are near
IMBALANCE = 10  # times as many images in the largest class as in the smallest
LISTED = 100  # examples a finding
OR_MASKS = " or masks"


@dataclass(frozen=True)
class Finding:
    """Something that a person should look at. `serious`: training would be wrong or stop."""

    kind: str
    serious: bool
    count: int
    what: str
    examples: tuple[str, ...]  # at most LISTED


@dataclass(frozen=True)
class Checked:
    """What a data set is, and what was found in it."""

    images: dict[str, int]  # split -> how many
    splits: dict[str, dict[str, int]]  # split -> class -> images that are of it; of dense tasks, that have it somewhere
    sides: dict[str, tuple[int, int, int]]  # split -> the shortest, median and longest short side in pixels
    findings: tuple[Finding, ...]

    @property
    def serious(self) -> bool:
        return any(finding.serious for finding in self.findings)


@dataclass(frozen=True)
class _Seen:
    """One image that could be decoded to its last pixel."""

    file: Path
    split: str
    size: tuple[int, int]
    classes: tuple[int, ...]  # that its mask, or its objects, have
    grey: np.ndarray  # uint8 (HASH_SIDE, HASH_SIDE + 1): a small copy
    bits: np.ndarray  # uint64 (4,): of each of its pixels, whether the next one is brighter


# ---- all of it -------------------------------------------------------------------------------------------------------


def check(splits: Sequence[Split]) -> Checked:
    """Decode every image of the splits, and compare all of them."""
    seen, bad = [], []
    for split in splits:
        for index, found in _each(split, range(len(split)), _look):
            if isinstance(found, str):
                bad.append(found)
            else:
                seen.append(_Seen(split.files[index], split.name, *found))
    labels = {split.name: split.labels for split in splits}
    counts = {split.name: {label: 0 for label in split.labels} for split in splits}
    for split in splits:
        for target in split.targets:
            if target != UNLABELLED:
                counts[split.name][split.labels[target]] += 1
    for s in seen:
        for number in s.classes:
            counts[s.split][labels[s.split][number]] += 1
    exact, repeated = _equal(splits)
    same = {file for group in exact for file in group}
    dense = any(isinstance(split, MaskSplit) for split in splits)
    faults = [told for split in splits for told in split.faults]
    misshapen = [told for split in splits if isinstance(split, ObjectSplit) for told in split.misshapen]
    labelled = dense or any(isinstance(split, ObjectSplit) for split in splits)
    blank = [str(s.file) for s in seen if labelled and not s.classes]
    findings = [
        _finding("unreadable", True, f"images{OR_MASKS * dense} cannot be read; they would be left out", bad),
        _finding("entries", True, "entries have no partner or no number of their own; they would be left out", faults),
        _finding("objects", True, "objects have no box or no mask that can be; they would be left out", misshapen),
        _finding("no class", len(blank) == len(seen), "images have nothing of any class", blank),
        _finding("same in two splits", True, "images lie in two splits: figures on the second flatter", _named(exact)),
        _finding("same within a split", False, "groups of equal files in one split", _named(repeated)),
        _finding("near duplicates", False, "pairs look the same across splits", _near(seen, same)),
        _finding("other classes", True, "classes are not those of train, which would be refused", _unknown(splits)),
        _finding(
            "empty class",
            False,
            "classes have no images",
            [f"{label} in {name}" for name, by in counts.items() for label, count in by.items() if not count],
        ),
        _finding("imbalance", False, f"splits have a class {IMBALANCE} times as large as another", _uneven(counts)),
        _finding(
            "small",
            False,
            f"images have a side below {SMALL_SIDE} pixels",
            [f"{s.file} ({s.size[0]} x {s.size[1]})" for s in seen if min(s.size) < SMALL_SIDE],
        ),
        _finding("elsewhere", False, "further notes", [note for s in splits for note in s.notes]),
    ]
    sides = {}
    for name, group in groupby(seen, lambda s: s.split):
        short = sorted(min(s.size) for s in group)
        sides[name] = (short[0], short[len(short) // 2], short[-1])
    return Checked({split.name: len(split) for split in splits}, counts, sides, tuple(f for f in findings if f.count))


def _unknown(splits: Sequence[Split]) -> list[str]:
    known = next((set(split.labels) for split in splits if split.name == "train"), None)
    if known is None:
        return []
    return [f"{label} in {split.name}" for split in splits for label in split.labels if label not in known]


def _finding(kind: str, serious: bool, what: str, examples: Sequence[str]) -> Finding:
    return Finding(kind, serious, len(examples), what, tuple(printable(example) for example in examples[:LISTED]))


def _named(groups: Iterable[Sequence[Path]]) -> list[str]:
    return [" = ".join(map(str, group[:4])) for group in groups]


def _uneven(counts: dict[str, dict[str, int]]) -> list[str]:
    told = []
    for name, by in counts.items():
        most, least = (pick(((n, label) for label, n in by.items() if n), default=(0, "")) for pick in (max, min))
        if most[0] > IMBALANCE * least[0]:
            told.append(f"{name}: {most[0]} of {most[1]}, {least[0]} of {least[1]}")
    return told


def _look(image: Image.Image, truth: Truth) -> tuple[tuple[int, int], tuple[int, ...], Any, Any]:
    labels = truth.labels if isinstance(truth, Objects) else truth
    there = () if labels is None else tuple(int(number) for number in np.unique(labels) if number != IGNORED)
    grey = np.asarray(image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BILINEAR))
    return image.size, there, grey, np.packbits(grey[:, 1:] > grey[:, :-1]).view(np.uint64)


def _teaches(image: Image.Image, truth: Truth) -> bool:
    labels = truth.labels[~truth.crowd] if isinstance(truth, Objects) else truth  # a crowd is no object to find
    return labels is not None and bool((labels != IGNORED).any())


def _mask_teaches(split: MaskSplit, index: int) -> bool:
    return bool((split.labels_of(index, upright_size(split.files[index])) != IGNORED).any())


def _left(a: np.ndarray, b: np.ndarray) -> float:
    """Levels, root mean square, by which two grey pictures differ when brightness and contrast are made the same."""
    a, b = (values - values.mean() for values in (a.astype(float), b.astype(float)))
    weaker, stronger = sorted((a, b), key=np.std)
    fitted = stronger * (stronger * weaker).sum() / max((stronger**2).sum(), 1e-9)
    return float(np.sqrt(((weaker - fitted) ** 2).mean()))


def _near(seen: Sequence[_Seen], same: set[Path]) -> list[str]:
    """Pairs from different splits whose pictures hardly differ; those that are equal byte for byte are told already."""
    kept = [s for s in seen if s.file not in same]
    if len({s.split for s in kept}) < 2:
        return []
    if len(kept) > MOST_COMPARED:
        by_hash = defaultdict(list)
        for s in kept:
            by_hash[s.bits.tobytes()].append(s)
        pairs = [(a, b) for group in by_hash.values() for a, b in zip(group, group[1:], strict=False)]
    else:
        bits = np.stack([s.bits for s in kept])
        pairs = []
        for number, s in enumerate(kept):
            apart = np.bitwise_count(bits[number + 1 :] ^ s.bits).sum(1)
            pairs += [(s, kept[number + 1 + other]) for other in np.flatnonzero(apart <= NEAR)]
    return [f"{a.file} ~ {b.file}" for a, b in pairs if a.split != b.split and _left(a.grey, b.grey) < NEAR_LEVELS]


# ---- parts, and what training does of it -----------------------------------------------------------------------------


def quick_check(training: Split, validation: Split, *, allow_bad: bool = False, strict: bool = False) -> list[str]:
    """What training says before its first step.

    Raises UserError where over 1 % of the images cannot be read or of the objects cannot be, or where any mask cannot
    be used or entry has no partner, unless allow_bad; and with `strict` where any image or object cannot, or where an
    image is in both splits.
    """
    notes = [note for split in (training, validation) for note in _insist(split, allow_bad, strict)]
    if len(training) + len(validation) <= QUICK_FILES:
        same, _ = _equal([training, validation])
        if same:
            a, b = (printable(path) for path in same[0][:2])
            told = f"{len(same)} images are in train and val both, such as {a} and {b}: the figures on val flatter"
            if strict:
                raise UserError(f"{told}. `nextvit data check` lists them all.")
            notes.append(told)
    return notes


def _insist(split: Split, allow_bad: bool, strict: bool) -> list[str]:
    """That a split is fit to learn from; what is left out of it all the same."""
    masks, objects = isinstance(split, MaskSplit), isinstance(split, ObjectSplit)
    cure = "`nextvit data check` lists them all; mend them, or train without them by --allow-bad."
    # What does not fit is an error of somebody's labelling, of which there are seldom few.
    if split.faults and not allow_bad:
        raise UserError(f"{len(split.faults)} entries of {split.name} fit nothing: {first_few(split.faults)}. {cure}")
    chosen = np.unique(np.linspace(0, len(split) - 1, min(QUICK, len(split))).astype(int))
    looked = [found for _, found in _each(split, chosen.tolist(), _teaches)]
    if isinstance(split, MaskSplit) and len(chosen) < len(split):  # of the others the masks alone
        rest = np.setdiff1d(np.arange(len(split)), chosen).tolist()
        looked += [found for _, found in _by_index(rest, f"check masks of {split.name}", partial(_mask_teaches, split))]
    bad = [found for found in looked if isinstance(found, str)]
    if len(bad) > (0 if strict or masks else MOST_UNREADABLE * len(chosen)) and not allow_bad:
        raise UserError(
            f"{len(bad)} of {len(looked)} images{OR_MASKS * masks} of {split.name} cannot be read: {bad[0]} {cure}"
        )
    if (masks or objects) and not any(found is True for found in looked):
        what = "masks of {} has a pixel with a class" if masks else "images of {} has an object that is no crowd"
        end = "nothing is learnt" if split.name == "train" else "nothing can be measured"
        raise UserError(f"none of {len(looked)} {what.format(split.name)}; {end}.")
    if not isinstance(split, ObjectSplit) or not split.misshapen:
        return []
    told = f"{len(split.misshapen)} of {len(split.misshapen) + len(split.annotations)} objects of {split.name} are none"
    told += f": {first_few(split.misshapen)}"
    most = 0 if strict else MOST_UNREADABLE * (len(split.misshapen) + len(split.annotations))
    if len(split.misshapen) > most and not allow_bad:
        raise UserError(f"{told}. {cure}")
    return [f"{told}; they are left out"]


def _each(
    split: Split, indices: Sequence[int], look: Callable[[Image.Image, Truth], T]
) -> Iterator[tuple[int, T | str]]:
    """(index, what `look` makes of image and labels, or why they cannot be used), in order; decoded by all cores."""

    return _by_index(indices, f"check {split.name}", lambda index: look(*split.labelled(index)))


def _by_index(indices: Sequence[int], label: str, look: Callable[[int], T]) -> Iterator[tuple[int, T | str]]:
    def one(index: int) -> tuple[int, T | str]:
        try:
            return index, look(index)
        except ImageRejected as error:
            return index, str(error)

    with ThreadPoolExecutor(cpu_count()) as pool:  # decoding leaves Python alone
        yield from track(pool.map(one, indices), total=len(indices), label=label, unit="images")


def _equal(splits: Sequence[Split]) -> tuple[list[list[Path]], list[list[Path]]]:
    """Groups of files with the same bytes: those that lie in more than one split, and those within one.

    Only files of the same length are read.
    """
    by_size = defaultdict(list)
    for split in splits:
        for index in range(len(split)):
            with contextlib.suppress(ImageRejected):  # what cannot be read is a finding of its own
                by_size[split.size(index)].append((split, index))
    by_hash = defaultdict(list)
    for files in by_size.values():
        if len(files) > 1:
            for split, index in files:
                with contextlib.suppress(ImageRejected):
                    by_hash[hashlib.sha256(split.content(index)).digest()].append((split, index))
    across: list[list[Path]] = []
    within: list[list[Path]] = []
    for group in by_hash.values():
        if len(group) > 1:
            several = len({split.name for split, _ in group}) > 1
            (across if several else within).append([split.files[index] for split, index in group])
    return across, within
