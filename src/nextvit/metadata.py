"""What travels with every weight file and every exported file: the one source of truth for preprocessing and labels."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from nextvit.errors import UserError
from nextvit.spec import KvPooling

Interpolation = Literal["bicubic", "bilinear", "nearest"]
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
HEADS = {"classify": ("",), "segment": ("fpn", "upernet"), "detect": ("mask_rcnn",)}  # by task, the usual one first
LARGEST = 4_000_000  # characters of a record: 22,000 classes with names of 100 characters come to half of it
LARGEST_SIDE = 4096  # pixels of an input
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the network's input: resize the short side, cut the centre, scale to 0..1, normalise.

    With `long_side` nothing is cut: the image is made as large as fits a short side of `image_size` and a long one of
    `long_side`.
    """

    image_size: int = 224  # side of the square input, pixels
    crop: float = 0.875  # image_size / short side after resizing
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN  # RGB, of values in 0..1
    std: tuple[float, ...] = IMAGENET_STD
    long_side: int | None = None  # pixels

    def __post_init__(self) -> None:
        ok = (
            isinstance(self.image_size, int)
            and 32 <= self.image_size <= LARGEST_SIDE
            and 0 < self.crop <= 1
            and self.resize_size <= 2 * LARGEST_SIDE
            and (self.long_side is None or self.image_size <= self.long_side <= 4 * LARGEST_SIDE)
            and self.interpolation in get_args(Interpolation)
            and len(self.mean) == len(self.std) == 3
            and all(math.isfinite(m) for m in self.mean)
            and all(1e-6 < s < math.inf for s in self.std)
        )
        if not ok:
            raise UserError(
                f"images cannot be prepared to {self.image_size} pixels (crop {self.crop}, longest side "
                f"{self.long_side}, {self.interpolation}, mean {self.mean}, std {self.std}); the size must be 32 to "
                f"{LARGEST_SIDE}, the crop above 0 and at most 1, the longest side no less."
            )

    @property
    def resize_size(self) -> int:
        """Short side after resizing, pixels: 256 for 224 and crop 0.875."""
        return int(self.image_size / self.crop)


DENSE = {  # of the published networks: the authors' evaluation
    "segment": Preprocess(image_size=512, crop=1.0, interpolation="bilinear", long_side=2048),
    "detect": Preprocess(image_size=800, crop=1.0, interpolation="bilinear", long_side=1333),
}


@dataclass(frozen=True)
class Metadata:
    """The record itself."""

    variant: str
    task: str = "classify"
    head: str = ""  # of a dense task: "fpn", "upernet" or "mask_rcnn"
    labels: tuple[str, ...] = ()  # in the order of the outputs; empty: the file names none
    preprocess: Preprocess = Preprocess()
    num_classes: int = 1000
    in_channels: int = 3
    kv_pooling: KvPooling = "sequence"
    takes_pixels: bool = False  # the file prepares images itself: uint8 (B, H, W, 3) of any size
    gives_classes: bool = False  # segmentation: the file gives the class of each pixel of its input, int32 (B, H, W)
    gives_maps: bool = False  # detection: the file is backbone and feature pyramid alone, and gives its five maps
    fixed_sides: bool = False  # of a dense task: it takes inputs of image_size x image_size alone
    precision: str = "fp32"  # that the file is made for: "fp32", "fp16", "bf16" or "int8"
    version: str = ""  # of nextvit, when the file was written
    recipe: str = ""  # SHA-256 of the training recipe; empty: not trained here

    def with_image_size(self, size: int | None) -> "Metadata":
        """The same record for another input size, a longest side with it; None: unchanged."""
        if size is None:
            return self
        p = self.preprocess
        long = p.long_side if p.long_side is None else round(p.long_side * size / p.image_size)
        return replace(self, preprocess=replace(p, image_size=size, long_side=long))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what an exported file gives, in order."""
        if self.gives_maps:
            return ("p2", "p3", "p4", "p5", "p6")
        if self.task == "detect":
            return ("boxes", "labels", "scores", "masks")
        return ("classes",) if self.gives_classes else ("logits",)

    def input_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Of what the file takes."""
        return (batch, height, width, 3) if self.takes_pixels else (batch, self.in_channels, height, width)

    def sides(self, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of an input of this shape."""
        height, width = shape[1:3] if self.takes_pixels else shape[2:4]
        return height, width

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str, source: str) -> "Metadata":
        """Read a record that came with `source`; raises UserError where it is not one of ours."""
        if len(text) > LARGEST:
            raise UserError(f"the metadata in {source} has {len(text)} characters, which no record of nextvit needs.")
        try:
            found: dict[str, Any] = json.loads(text)
            unknown = found.keys() - {f.name for f in fields(cls)}
            if unknown:
                raise ValueError(f"unknown entry {sorted(unknown)[0]!r}")
            inner = found["preprocess"]
            preprocess = Preprocess(**{**inner, "mean": tuple(inner["mean"]), "std": tuple(inner["std"])})
            record = cls(**{**found, "preprocess": preprocess, "labels": tuple(map(str, found["labels"]))})
            counts = (record.num_classes, record.in_channels)
            if not all(isinstance(count, int) and count > 0 for count in counts):
                raise ValueError(f"{counts[0]!r} classes, {counts[1]!r} input channels")
            if record.precision not in PRECISIONS or record.head not in HEADS.get(record.task, ()):
                raise ValueError(f"task {record.task!r}, head {record.head!r}, precision {record.precision!r}")
            for given, tasks in (
                (record.gives_classes, ("segment",)),
                (record.gives_maps, ("detect",)),
                (record.fixed_sides, ("segment", "detect")),
            ):
                if given not in (False, True) or (given and record.task not in tasks):
                    raise ValueError(f"what is of {' and '.join(tasks)} for the task {record.task!r}")
            if not isinstance(record.takes_pixels, bool) or (record.takes_pixels and record.in_channels != 3):
                raise ValueError(f"takes_pixels {record.takes_pixels!r} of {record.in_channels} channels")
            if record.labels and len(record.labels) != record.num_classes:
                raise ValueError(f"{len(record.labels)} labels for {record.num_classes} classes")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"the metadata in {source} cannot be read ({error}); export or save it again.") from error
        return record
