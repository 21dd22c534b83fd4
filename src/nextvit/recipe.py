"""Recipes: every value that decides a training run, as one typed record, to and from YAML."""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from nextvit.errors import UserError
from nextvit.metadata import HEADS

STRICT = ConfigDict(extra="forbid")
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=32)]  # pixels


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    """AdamW (paper, 4.1)."""

    lr: Positive | None = 1e-3  # peak, for the batch size as it is; None: by the batch and the weights it starts from
    weight_decay: NotNegative = 0.05
    decays: Literal["matrices", "not_norms", "all"] = (
        "matrices"  # what decays: all but biases and norms, the tensors of one dimension; all but norms; everything
    )
    clip_norm: Positive | None = 5.0  # of the gradient of all parameters together; None: it is not clipped
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = (
        1.0  # of the rate, from each block to the one before it; None: by the weights that it starts from
    )
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 0  # the stem and so many stages keep the weights they start with

    @property
    def peak(self) -> float:
        """The rate, once it is decided."""
        if self.lr is None:
            raise ValueError("the rate is left to the run, which has not begun")
        return self.lr


@dataclass(frozen=True, config=STRICT)
class Schedule:
    """The rate over a run: a linear warm-up to the peak, and what `kind` says after it."""

    kind: Literal["cosine", "cosine_released", "poly", "steps", "constant"] = "cosine"
    epochs: Count | None = 30  # None: chosen from the number of training images
    steps_per_epoch: Count | None = (
        None  # between two validations, over images that are shuffled again when all were seen; None: all images once
    )
    warmup_epochs: NotNegative = 3.0
    warmup_lr: NotNegative = 1e-5  # where the warm-up starts
    min_lr: NotNegative = 1e-5  # where a cosine or a polynomial ends
    power: Positive = 0.9  # of a polynomial
    falls: tuple[Count, ...] = ()  # of steps: after so many epochs the rate becomes a tenth


@dataclass(frozen=True, config=STRICT)
class Images:
    """Classification: size of the input and augmentation in training; evaluation cuts the centre out."""

    size: Annotated[int, Field(ge=32)] = 224  # pixels
    crop: Annotated[float, Field(gt=0, le=1)] = 0.875  # evaluation: size / short side after resizing
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    crop_area: Annotated[float, Field(gt=0, le=1)] = 0.35  # training: a random crop has at least this share of the area
    crop_aspect: Annotated[float, Field(ge=1)] = 4 / 3  # and at most this aspect ratio, either way
    flip: Share = 0.5  # probability of a horizontal flip
    randaugment: Annotated[str, Field(pattern=r"^(rand(-[a-z]+[\d.]+)+)?$")] = (
        ""  # in timm's notation, such as rand-m9-mstd0.5-inc1; empty: none
    )
    erasing: Share = 0.0  # probability that a rectangle becomes noise


@dataclass(frozen=True, config=STRICT)
class Crops:
    """Segmentation: what is drawn for an image and its labels in training; evaluation takes the whole image."""

    size: Annotated[int, Field(ge=32)] = 512  # pixels a side of a crop
    short_side: Annotated[int, Field(ge=32)] = 512  # pixels that an image fits into, before its scale
    long_side: Annotated[int, Field(ge=32)] = 2048
    scale: tuple[Positive, Positive] = (0.5, 2.0)  # drawn evenly
    largest_class: Share = 0.75  # less of a crop's labelled pixels are of one class,
    tries: Annotated[int, Field(ge=0)] = 10  # if one of so many more crops is such
    flip: Share = 0.5  # probability
    distortion: bool = True  # of brightness, contrast, saturation, hue

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError("the scale goes from the smaller to the larger number")
        if self.short_side > self.long_side:
            raise ValueError("the short side is not longer than the long one")


@dataclass(frozen=True, config=STRICT)
class Scenes:
    """Detection: what is drawn for an image and its objects in training; evaluation has the largest short side."""

    short_sides: Annotated[tuple[Side, ...], Field(min_length=1)] = (800,)  # pixels; an image has one of them,
    long_side: Side = 1333  # or a smaller one where its other side would be longer
    cut: Share = 0.0  # probability that it is first resized to one of `cut_short_sides` and cut at random,
    cut_short_sides: Annotated[tuple[Side, ...], Field(min_length=1)] = (400, 500, 600)
    cut_sides: tuple[Side, Side] = (384, 600)  # to height and width drawn from these
    flip: Share = 0.5  # probability
    copy_paste: Share = 0.0  # probability that some objects of another image are laid over it
    negatives: bool = False  # images without an object are seen, too

    def __post_init__(self) -> None:
        if max(self.short_sides) > self.long_side:
            raise ValueError("no short side is longer than the long one")
        if self.cut_sides[0] > self.cut_sides[1]:
            raise ValueError("cut_sides go from the smaller to the larger number")


@dataclass(frozen=True, config=STRICT)
class Sampling:
    """Detection: how many boxes of an image the losses see; the authors' numbers. Masks cost most of a step."""

    anchors: Count = 256
    boxes: Count = 512
    masks: Count = 128  # of the boxes that stand for an object


@dataclass(frozen=True, config=STRICT)
class Mixing:
    """Classification: Mixup and CutMix: a batch and the same batch reversed become one, images and targets alike."""

    mixup: NotNegative = 0.0  # alpha of Beta(alpha, alpha), which the share is drawn from; 0: no mixup
    cutmix: NotNegative = 0.0  # alpha of CutMix; with both, either by a fair coin
    images: Count | None = None  # that share one draw; None: the whole batch


@dataclass(frozen=True, config=STRICT)
class Distillation:
    """Classification: a teacher's answers as targets, beside the labels or instead of them."""

    teacher: str | None = None  # a checkpoint or an exported file of ours, or timm:NAME; None: no teacher
    share: Share = 0.5  # of the teacher in the loss of an image with a label; without a label it is 1
    hard: bool = False  # the teacher's first label; else its probabilities
    temperature: Positive = 1.0  # of both sides' probabilities
    unlabelled: str | None = None  # a folder of images without labels, which the teacher alone judges

    def __post_init__(self) -> None:
        if self.unlabelled is not None and self.teacher is None:
            raise ValueError("images without labels need distillation.teacher")


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """All of a run. `runs/NAME/recipe.yaml` holds it whole."""

    task: Literal["classify", "segment", "detect"] = "classify"
    head: Literal["fpn", "upernet", "mask_rcnn"] | None = None  # of a dense task; None: fpn, mask_rcnn
    model: str | None = "nextvit_nano"  # None: that of the weights; see `run` for when there are none
    weights: str | None = None  # a file, a published tag, "none"; None: published ones where the variant has them
    batch_size: Count = 16  # images a step, over all processes
    accumulation: Count = 1  # parts that a process takes its share of a batch in, for less memory
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    images: Images = Field(default_factory=Images)
    crops: Crops = Field(default_factory=Crops)
    scenes: Scenes = Field(default_factory=Scenes)
    sampling: Sampling = Field(default_factory=Sampling)
    mixing: Mixing = Field(default_factory=Mixing)
    distillation: Distillation = Field(default_factory=Distillation)
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1  # classification
    class_weights: bool = False  # classification: an image counts by the inverse of its class's share, the mean is 1
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None  # None: the variant's own
    kv_pooling: Literal["sequence", "spatial"] = "sequence"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay a step of a running mean of the weights; None: none
    patience: Count | None = None  # epochs without a better one after which the run ends; None: it never does
    sync_batchnorm: bool = False  # with several processes: statistics over all of them
    fixed_norms: bool | None = None  # detection: BatchNorms keep their statistics; None: if it starts from weights
    seed: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        own: dict[str, dict[str, Any]] = {
            "classify": {
                "images": Images(),
                "mixing": Mixing(),
                "distillation": Distillation(),
                "label_smoothing": Recipe.label_smoothing,
                "class_weights": Recipe.class_weights,
            },
            "segment": {"crops": Crops()},
            "detect": {"scenes": Scenes(), "sampling": Sampling(), "fixed_norms": None},
        }
        unread = {key: default for task, keys in own.items() if task != self.task for key, default in keys.items()}
        if self.task == "classify":
            unread["head"] = None
        for key, default in unread.items():
            if getattr(self, key) != default:
                raise ValueError(f"{key} is not for the task {self.task}; leave it as it is")
        if self.head is not None and self.head not in HEADS[self.task]:
            raise ValueError(
                f"head {self.head} is not for the task {self.task}; it has {' and '.join(HEADS[self.task])}"
            )

    @property
    def side(self) -> int:
        """Of a training sample, pixels."""
        sides = {"classify": self.images.size, "segment": self.crops.size, "detect": max(self.scenes.short_sides)}
        return sides[self.task]

    @property
    def variant(self) -> str:
        """The model, once it is decided."""
        if self.model is None:
            raise ValueError("the model is left to the run, which has not begun")
        return self.model

    def to_yaml(self) -> str:
        return yaml.safe_dump(to_dict(self), sort_keys=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """All values, nested as in the YAML."""
    values: dict[str, Any] = TypeAdapter(Recipe).dump_python(recipe, mode="json")
    return values


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `to_dict` was given."""
    return TypeAdapter(Recipe).validate_python(values)


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with `key=value` overrides."""
    return parse_recipe(recipe.to_yaml(), "the recipe", overrides)


def of_task(recipe: Recipe, task: str | None, source: str) -> Recipe:
    """The recipe, once it is clear that it is for the task; None: for its own."""
    if task is not None and task not in HEADS:
        raise UserError(f"there is no task {task!r}; take one of {', '.join(HEADS)}.")
    if task not in (None, recipe.task):
        raise UserError(f"{source} is a recipe for the task {recipe.task}, and --task says {task}; leave one out.")
    return recipe


def with_image_size(recipe: Recipe, size: int) -> Recipe:
    """For training samples of so many pixels a side; of dense tasks, the sides that images fit into go with it."""
    if recipe.task == "classify":
        return override(recipe, [f"images.size={size}"])
    factor = size / recipe.side

    def scaled(sides: Sequence[int]) -> list[int]:
        return [max(32, round(side * factor)) for side in sides]

    if recipe.task == "segment":
        short, long = scaled((recipe.crops.short_side, recipe.crops.long_side))
        return override(recipe, [f"crops.size={size}", f"crops.short_side={short}", f"crops.long_side={long}"])
    s = recipe.scenes
    values = {"short_sides": scaled(s.short_sides), "long_side": scaled([s.long_side])[0]}
    values |= {"cut_short_sides": scaled(s.cut_short_sides), "cut_sides": scaled(s.cut_sides)}
    return override(recipe, [f"scenes.{key}={value}" for key, value in values.items()])


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two recipes, each with both values."""
    first, second = flat(before), flat(now)
    return {key: (first.get(key), second[key]) for key in second if first.get(key) != second[key]}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("nextvit") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_recipe(name: str, overrides: Sequence[str] = (), values: Mapping[str, Any] = MappingProxyType({})) -> Recipe:
    """A shipped recipe by name or a YAML file by path, with `key=value` overrides such as `optimizer.lr=5e-4`.

    values: overrides too, dotted key to value; `overrides` win. A file holds differences from the defaults. Raises
    UserError for a key that does not exist, with the nearest one that does, and for a value out of range.
    """
    if name in shipped():
        text = (resources.files("nextvit") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    elif name.endswith((".yaml", ".yml")):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the recipe {name}; give a YAML file or one of {', '.join(shipped())}."
            ) from error
    else:
        raise UserError(f"there is no recipe {name!r}; give a YAML file or one of {', '.join(shipped())}.")
    return parse_recipe(text, name, overrides, values)


def parse_recipe(
    text: str, source: str, overrides: Sequence[str] = (), values: Mapping[str, Any] = MappingProxyType({})
) -> Recipe:
    """A recipe of YAML text, with overrides; see read_recipe."""
    try:
        nested: Any = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not plain YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(nested, dict):
        raise UserError(f"{source} must be a mapping of keys to values.")
    for key, value in {**values, **dict(map(_key_and_value, overrides))}.items():
        *groups, last = key.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):
                raise UserError(f"{key} cannot be set: {group} is one value, not a group.")
        inner[last] = value
    try:
        return TypeAdapter(Recipe).validate_python(nested)
    except ValidationError as error:
        raise UserError(_sentence(error, source)) from error


def _key_and_value(override: str) -> tuple[str, Any]:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"--set takes key=value, such as optimizer.lr=5e-4, not {override!r}.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override} has a value that cannot be read.") from error


def _sentence(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return f"{source}: {message}."
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = difflib.get_close_matches(key, list(flat(to_dict(Recipe()))), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "`nextvit train --help` tells where the keys are listed."
        return f"{source}: there is no key {key}; {hint}"
    return f"{source}: {key} = {first['input']!r} will not do: {message[0].lower()}{message[1:]}."
