"""The networks of the paper's Tables 1, 2, 7, 8 and 9, each a row of the spec table: Next-ViT-S with one thing changed.

What the paper leaves open is decided here, and said: a stage of convolutions alone has NCBs of NCB's width, one of
transformers alone NTBs of NTB's, and latency is brought to the reference's by the number of blocks in stage 3, and of
NCBs or NTBs in stage 2 where that is too coarse. Table 2's body is lost in our copy of the paper: its rows are what its
text says was varied.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from nextvit.spec import VARIANTS, Stage, Variant

SMALL = next(variant for variant in VARIANTS if variant.name == "nextvit_small")
NCB_WIDTHS = (96, 192, 384, 768)
NTB_WIDTHS = (128, 256, 512, 1024)  # of stage 1: the least that leaves MHCA a head
REDUCTIONS = (8, 4, 2, 1)
BLOCKS = (3, 3, 4, 2)  # N of the stages of S
MOST_BLOCKS = 80  # in stage 3
Line = tuple[str, int, int]  # block, width, how many


@dataclass(frozen=True)
class Ablation:
    """A row of one of the tables.

    make: the network of so many blocks in stage 3 and of so many more than S's in stage 2. depths: these two. Where
    there is a reference they are those whose latency came nearest to its: see docs/results/avx2 for how near, on what
    machine; of Table 2 most are guesses. Else they are those of S, or of the variant that the row is.
    """

    table: str
    row: str  # as the table names it
    make: Callable[[int, int], Variant]
    depths: tuple[int, int]
    reference: str | None = None  # the variant whose latency it is brought to; not its own
    printed: dict[str, float] = field(default_factory=dict)  # tensorrt_ms, top1, det_box_ap, seg_miou

    @property
    def variant(self) -> Variant:
        return self.make(*self.depths)

    def at(self, third: int, more: int) -> Variant:
        """The network of these depths, named so that `create_model` finds it whatever the usual ones are."""
        if self.reference is None:
            return self.variant
        return replace(self.make(third, more), name=f"{self.variant.name}@{third},{more}")

    def can_have(self, third: int, more: int) -> bool:
        """Whether there is a network of these depths: each stage keeps a block."""
        return self.reference is not None and 1 <= third <= MOST_BLOCKS and more > -BLOCKS[1]


def _variant(name: str, stages: Any, **changes: Any) -> Variant:
    """S with other stages; its parameters and operations are counted, not written down."""
    return replace(SMALL, name=name, stages=tuple(stages), params=0, gflops=0.0, **changes)


def _split(total: int, parts: int) -> list[int]:
    """As even as whole numbers are, later parts first to have more."""
    return [total * (index + 1) // parts - total * index // parts for index in range(parts)]


def _groups(kind: str, blocks: int, groups: int) -> Stage:
    """Stage 3: so many blocks of a kind in all, in groups with an NTB behind each."""
    pattern = [line for count in _split(blocks, groups) for line in ((kind, 384, count), ("ntb", 512, 1))]
    return Stage(tuple(line for line in pattern if line[2]), 1, REDUCTIONS[2])


# ---- Table 1: which blocks a stage has: C NCBs alone, T NTBs alone, H NCBs and an NTB behind them --------------------


def _stage(letter: str, number: int, blocks: int) -> Stage:
    ncb, ntb = ("ncb", NCB_WIDTHS[number], blocks), ("ntb", NTB_WIDTHS[number], blocks)
    pattern: dict[str, tuple[Line, ...]] = {"C": (ncb,), "T": (ntb,), "H": (ncb, (*ntb[:2], 1))}
    return Stage(pattern[letter], 1, REDUCTIONS[number])


def _table1(letters: str, third: int, more: int) -> Variant:
    counts = (BLOCKS[0], BLOCKS[1] + more, third, BLOCKS[3])
    stages = [_stage(letter, number, count) for number, (letter, count) in enumerate(zip(letters, counts, strict=True))]
    return _variant(f"table1_{letters.lower()}", stages)


def _row1(letters: str, third: int, more: int, ms: float, top1: float, box_ap: float, miou: float) -> Ablation:
    printed = {"tensorrt_ms": ms, "top1": top1, "det_box_ap": box_ap, "seg_miou": miou}
    name = letters.replace("H", "H_N")
    return Ablation("table1", name, lambda n, m: _table1(letters, n, m), (third, more), SMALL.name, printed)


# ---- Table 2: N and L in stage 3 -------------------------------------------------------------------------------------


def _table2(name: str, groups: int, third: int, more: int) -> Variant:
    first, second, _, fourth = SMALL.stages
    ncb, *ntb = second.pattern
    second = replace(second, pattern=((*ncb[:2], ncb[2] + more), *ntb))
    return _variant(f"table2_{name}", (first, second, _groups("ncb", third, groups), fourth))


def _row2(name: str, row: str, groups: int, third: int, more: int, reference: str | None, **printed: float) -> Ablation:
    return Ablation("table2", row, lambda n, m: _table2(name, groups, n, m), (third, more), reference, printed)


# ---- Table 7: other blocks in NCB's place ----------------------------------------------------------------------------


def _table7(kind: str, third: int, more: int) -> Variant:
    first, second, _, fourth = ([(kind if line[0] == "ncb" else line[0], *line[1:]) for line in stage.pattern]
                                for stage in SMALL.stages)  # fmt: skip
    second[0] = (*second[0][:2], second[0][2] + more)
    stages = [Stage(tuple(lines), 1, sr) for lines, sr in zip((first, second, fourth), (8, 4, 1), strict=True)]
    stages.insert(2, _groups(kind, third, 2))
    return _variant(f"table7_{kind}", stages, expand={kind: 0, **SMALL.expand})  # other blocks have their own


def _row7(kind: str, row: str, third: int, more: int, ms: float, top1: float, box_ap: float, miou: float) -> Ablation:
    printed = {"tensorrt_ms": ms, "top1": top1, "det_box_ap": box_ap, "seg_miou": miou}
    reference = SMALL.name if kind != "ncb" else None
    return Ablation("table7", row, lambda n, m: _table7(kind, n, m), (third, more), reference, printed)


# ---- Tables 8 and 9: the share of attention; norm and activation -----------------------------------------------------


def _row8(mix: float, ms: float, top1: float, box_ap: float, miou: float) -> Ablation:
    printed = {"tensorrt_ms": ms, "top1": top1, "det_box_ap": box_ap, "seg_miou": miou}
    made = _variant(f"table8_r{round(100 * mix):03}", SMALL.stages, mix=mix)
    return Ablation("table8", f"r = {mix:g}", lambda n, m: made, (8, 0), printed=printed)


def _row9(norm: str, activation: str, **printed: float) -> Ablation:
    made = _variant(f"table9_{norm}_{activation}", SMALL.stages, norm=norm, activation=activation)
    row = f"{ {'batch': 'BN', 'layer': 'LN'}[norm] } + { {'relu': 'ReLU', 'gelu': 'GELU'}[activation] }"
    return Ablation("table9", row, lambda n, m: made, (8, 0), printed=printed)


_OURS = {"tensorrt_ms": 7.7, "top1": 82.4, "det_box_ap": 45.8, "seg_miou": 47.0}  # of S: Tables 4 to 6
_BASE = {"tensorrt_ms": 10.5, "top1": 83.3, "det_box_ap": 47.2, "seg_miou": 48.7}
_LARGE = {"tensorrt_ms": 13.0, "top1": 83.6, "det_box_ap": 48.0, "seg_miou": 49.0}
ABLATIONS = (
    _row1("CCCC", 15, 0, 7.8, 82.1, 44.1, 43.7),
    _row1("CCCT", 13, 0, 7.8, 82.4, 44.7, 45.6),
    _row1("CCTT", 9, -2, 7.8, 81.5, 44.0, 45.2),
    _row1("CTTT", 6, 0, 8.0, 80.6, 42.6, 44.7),
    _row1("CCCH", 13, 1, 7.7, 82.1, 44.6, 45.2),
    _row1("CCHH", 9, 2, 7.7, 82.3, 45.2, 46.3),
    _row1("CHHH", 9, 0, 7.7, 82.3, 45.5, 46.5),
    _row1("HHHH", 9, 0, 7.8, 81.7, 44.5, 45.9),
    _row2("chhh_small", "C, H, H, H as small", 1, 10, 1, "nextvit_small"),
    _row2("chhh_base", "C, H, H, H as base", 1, 22, 0, "nextvit_base"),
    _row2("chhh_large", "C, H, H, H as large", 1, 34, 0, "nextvit_large"),
    _row2("n1", "N = 1, L = 5", 5, 5, 0, "nextvit_small"),
    _row2("n2", "N = 2, L = 3", 3, 6, 0, "nextvit_small"),
    _row2("n4", "N = 4, L = 2: small", 2, 8, 0, None, **_OURS),
    _row2("n10", "N = 10, L = 1", 1, 10, 0, "nextvit_small"),
    _row2("n4_base", "N = 4, L = 4: base", 4, 16, 0, None, **_BASE),
    _row2("n4_large", "N = 4, L = 6: large", 6, 24, 0, None, **_LARGE),
    _row7("bottleneck", "BottleNeck Block", 80, 2, 7.8, 81.9, 44.5, 46.1),
    _row7("convnext", "ConvNeXt Block", 3, 1, 7.8, 79.6, 41.4, 44.1),
    _row7("lsa", "LSA Block", 2, -2, 8.4, 78.2, 38.7, 40.3),
    _row7("poolformer", "PoolFormer Block", 4, 0, 7.6, 80.9, 42.3, 44.3),
    _row7("local_mhra", "Local MHRA Block", 2, 0, 7.8, 80.5, 42.4, 43.8),
    _row7("ncb", "NCB (ours)", 8, 0, 7.7, 82.4, 45.8, 47.0),
    _row8(0.0, 6.6, 80.9, 43.1, 42.7),
    _row8(0.25, 6.9, 81.3, 45.0, 45.6),
    _row8(0.5, 7.3, 82.2, 45.4, 46.4),
    _row8(0.75, 7.7, 82.4, 45.8, 47.0),
    _row8(1.0, 8.2, 82.1, 45.4, 45.8),
    _row9("batch", "relu", **_OURS),
    _row9("batch", "gelu"),
    _row9("layer", "relu"),
    _row9("layer", "gelu"),
)


def ablation_variant(name: str) -> Variant | None:
    """The network of a row by its name, "table1_ccct", or of other depths, "table1_ccct@12,1"; None: there is none."""
    base, _, depths = name.partition("@")
    found = next((ablation for ablation in ABLATIONS if ablation.variant.name == base), None)
    if found is None or not depths:
        return found.variant if found else None
    asked = re.fullmatch(r"(\d{1,3}),(-?\d{1,2})", depths)
    if asked is None or not found.can_have(int(asked[1]), int(asked[2])):
        return None
    return replace(found.make(int(asked[1]), int(asked[2])), name=name)
