"""The Next-ViT family as plain data: a variant is a row, a stage is an NHS pattern, a block is a line of a plan.

Nothing here knows torch. `backbone.py` turns the plan into modules.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from nextvit.errors import UserError

KvPooling = Literal["sequence", "spatial"]
KV_POOLINGS: tuple[KvPooling, ...] = ("sequence", "spatial")


@dataclass(frozen=True)
class Stage:
    """One stage of the Next Hybrid Strategy: `pattern` repeated `groups` times (paper, 3.4 and Table 3)."""

    pattern: tuple[tuple[str, int, int], ...]  # (block, its width, how many), e.g. ("ncb", 384, 4), ("ntb", 512, 1)
    groups: int  # L
    reduction: int  # sr of E-MHSA: keys and values are pooled over sr * sr tokens

    @property
    def width(self) -> int:
        """Channels of the stage's output: those of its last block."""
        return self.pattern[-1][1]


@dataclass(frozen=True)
class Variant:
    """One network: a column of the paper's Table 3 with its size and cost, as Table 4 gives them."""

    name: str
    stem: tuple[int, int, int, int]  # channels of the four 3x3 convolutions, strides 2, 1, 1, 2
    stages: tuple[Stage, Stage, Stage, Stage]
    drop_path: float  # stochastic depth of the last block; it rises linearly from 0
    params: int  # with 1000 classes
    gflops: float  # 1e9 multiply-adds for one 224 x 224 image
    head_dim: int = 32
    mix: float = 0.75  # r: the share of an NTB's channels that E-MHSA has
    expand: dict[str, int] = field(default_factory=lambda: {"ncb": 3, "ntb": 2}, hash=False)  # of the MLP, by block
    norm: str = "batch"
    activation: str = "relu"

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the four stage outputs."""
        return tuple(stage.width for stage in self.stages)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks in each stage."""
        return tuple(stage.groups * sum(count for _, _, count in stage.pattern) for stage in self.stages)


@dataclass(frozen=True)
class Block:
    """What one block needs to be built."""

    kind: str
    c_in: int
    c_out: int
    stride: int
    reduction: int
    drop_path: float
    kv_pooling: KvPooling
    head_dim: int
    mix: float
    expand: int
    norm: str
    activation: str


def _published(name: str, groups: int, drop_path: float, params: int, gflops: float) -> Variant:
    """S, B and L differ only in how often stage 3 repeats its group (Table 3)."""
    stages = (
        Stage((("ncb", 96, 3),), 1, 8),
        Stage((("ncb", 192, 3), ("ntb", 256, 1)), 1, 4),
        Stage((("ncb", 384, 4), ("ntb", 512, 1)), groups, 2),
        Stage((("ncb", 768, 2), ("ntb", 1024, 1)), 1, 1),
    )
    return Variant(name, (64, 32, 64, 64), stages, drop_path, params, gflops)


VARIANTS = (  # smallest first; nano and tiny are this project's own, by the paper's rule
    Variant(
        "nextvit_nano",
        (32, 16, 32, 32),
        (
            Stage((("ncb", 32, 1),), 1, 8),
            Stage((("ncb", 96, 1), ("ntb", 128, 1)), 1, 4),
            Stage((("ncb", 192, 2), ("ntb", 256, 1)), 1, 2),
            Stage((("ncb", 384, 1), ("ntb", 512, 1)), 1, 1),
        ),
        drop_path=0.0,
        params=4_856_936,
        gflops=0.73,
    ),
    Variant(
        "nextvit_tiny",
        (48, 24, 48, 48),
        (
            Stage((("ncb", 64, 2),), 1, 8),
            Stage((("ncb", 96, 2), ("ntb", 128, 1)), 1, 4),
            Stage((("ncb", 288, 4), ("ntb", 384, 1)), 1, 2),
            Stage((("ncb", 480, 1), ("ntb", 640, 1)), 1, 1),
        ),
        drop_path=0.05,
        params=9_440_200,
        gflops=1.82,
    ),
    _published("nextvit_small", 2, 0.1, 31_763_368, 5.8),
    _published("nextvit_base", 4, 0.2, 44_818_856, 8.3),
    _published("nextvit_large", 6, 0.2, 57_874_344, 10.8),
)


@dataclass(frozen=True)
class Configuration:
    """A Next-ViT of a variant's widths and of other numbers of blocks (paper, 3.4: N and L of stage 3, r)."""

    frame: str  # the variant whose widths it has
    first: int  # NCBs in stage 1, 2 and 4
    second: int
    n: int  # NCBs before each NTB of stage 3
    groups: int  # L: NTBs of stage 3
    fourth: int
    mix: float = 0.75

    @property
    def name(self) -> str:
        """As create_model takes it: "nextvit_small@3,3,4x2,2", with r where it is not the usual one."""
        r = "" if self.mix == 0.75 else f",r{self.mix:g}"
        return f"{self.frame}@{self.first},{self.second},{self.n}x{self.groups},{self.fourth}{r}"

    @property
    def variant(self) -> Variant:
        """Its parameters and operations are counted, not written down."""
        frame = next(variant for variant in VARIANTS if variant.name == self.frame)
        counts = (self.first, self.second, self.n, self.fourth)
        stages = []
        for number, (stage, count) in enumerate(zip(frame.stages, counts, strict=True)):
            (kind, width, _), *behind = stage.pattern
            groups = self.groups if number == 2 else 1
            stages.append(Stage(((kind, width, count), *behind), groups, stage.reduction))
        one, two, three, four = stages
        return replace(frame, name=self.name, stages=(one, two, three, four), params=0, gflops=0.0, mix=self.mix)


_CONFIGURED = re.compile(r"(\w+)@(\d{1,2}),(\d{1,2}),(\d{1,2})x(\d{1,2}),(\d{1,2})(?:,r(0\.\d+|0|1))?")


def configured(name: str) -> Variant | None:
    """The network of a configuration's name; None: it is no such name, or has a stage without a block."""
    found = _CONFIGURED.fullmatch(name)
    if found is None or found[1] not in {variant.name for variant in VARIANTS}:
        return None
    first, second, n, groups, fourth = map(int, found.groups()[1:6])
    if not min(first, second, n, groups, fourth):
        return None
    mix = 0.75 if found[7] is None else float(found[7])
    return replace(Configuration(found[1], first, second, n, groups, fourth, mix).variant, name=name)


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, at least one of it and never below 90 % of `value`."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


def mixed_widths(width: int, mix: float, head_dim: int) -> tuple[int, int]:
    """Split the width of an NTB between E-MHSA and MHCA (paper, 3.3).

    Each has at least one head, but for r = 0 and r = 1 (paper, Table 8), where one of them has all.
    """
    if mix in (0, 1):
        return int(width * mix), int(width * (1 - mix))
    attention = make_divisible(width * mix, head_dim)
    if width % head_dim or width - attention < head_dim:
        raise UserError(
            f"an NTB of width {width} with r = {mix} leaves {width - attention} channels to its convolution branch; "
            f"take a width that is a multiple of the head dim {head_dim} and leaves at least one head of {head_dim}."
        )
    return attention, width - attention


def plan(
    variant: Variant, drop_path: float | None = None, kv_pooling: KvPooling = "sequence"
) -> tuple[tuple[Block, ...], ...]:
    """All blocks of the variant, stage by stage.

    The first block of a stage but the first halves the map. Stochastic depth rises linearly over all blocks, from 0 to
    `drop_path` (None: the variant's own) at the last one.
    """
    peak = variant.drop_path if drop_path is None else drop_path
    last = max(1, sum(variant.depths) - 1)
    channels, index, stages = variant.stem[-1], 0, []
    for number, stage in enumerate(variant.stages):
        blocks: list[Block] = []
        for kind, width, count in stage.pattern * stage.groups:
            for _ in range(count):
                blocks.append(
                    Block(
                        kind=kind,
                        c_in=channels,
                        c_out=width,
                        stride=2 if number > 0 and not blocks else 1,
                        reduction=stage.reduction,
                        drop_path=peak * index / last,
                        kv_pooling=kv_pooling,
                        head_dim=variant.head_dim,
                        mix=variant.mix,
                        expand=variant.expand[kind],
                        norm=variant.norm,
                        activation=variant.activation,
                    )
                )
                channels, index = width, index + 1
        stages.append(tuple(blocks))
    return tuple(stages)
