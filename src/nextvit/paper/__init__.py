"""What the paper prints in its tables, a row a network, and the network that each row is about."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

from nextvit.ablations import ABLATIONS, Ablation

ANCHOR = "nextvit_small"  # of the paper's claims, and what all is measured beside
TABLES = ("table4", "table5", "table6")  # of networks side by side, whose trade-off is Figure 1
ABLATION_TABLES = ("table1", "table2", "table7", "table8", "table9")
ACCURACY = {  # of each table: columns of figures that a network is good by, with their names
    "table4": {"top1": "top-1, %"},
    "table5": {"fpn_miou": "mIoU with Semantic FPN, %", "upernet_miou_ms": "mIoU with UperNet, multi-scale, %"},
    "table6": {"box_ap_1x": "box AP, 1x", "box_ap_3x": "box AP, 3x + MS", "mask_ap_1x": "mask AP, 1x"},
    **dict.fromkeys(
        ABLATION_TABLES, {"top1": "top-1, %", "det_box_ap": "box AP, 1x", "seg_miou": "mIoU with Semantic FPN, %"}
    ),
}
PRINTED = {"tensorrt_ms": "TensorRT, ms (printed)", "coreml_ms": "CoreML, ms (printed)"}  # its latencies
SIZES = {  # pixels a side, the usual ones; of Tables 5 and 6 the backbones' alone
    **dict.fromkeys(("table4", *ABLATION_TABLES), 224),
    **dict.fromkeys(("table5", "table6"), 512),
}


@dataclass(frozen=True)
class PaperRow:
    """A row of one of the tables. A figure that is not printed is not in `printed`."""

    table: str
    name: str
    network: str  # a MODEL
    image_size: int  # pixels a side, at which its latency was measured
    printed: dict[str, float]  # by the names of the CSV file's columns

    @property
    def key(self) -> str:
        """A name of its own within its table."""
        return f"{self.name} {self.image_size}"


@cache
def paper_rows(table: str) -> tuple[PaperRow, ...]:
    """The rows of a table as printed, with its mistakes (see EXPLAINED)."""
    if table in ABLATION_TABLES:
        return tuple(ablation_row(a, a.depths) for a in ABLATIONS if a.table == table)
    text = (resources.files("nextvit.paper") / f"{table}.csv").read_text(encoding="utf-8")
    found = []
    for row in csv.DictReader(text.splitlines()):
        name, network, _ = (row.pop(key) for key in ("model", "network", "group"))
        size = int(row.pop("image_size", SIZES[table]))
        printed = {key: float(value) for key, value in row.items() if value}
        found.append(PaperRow(table, name, network, size, printed))
    return tuple(found)


def ablation_row(ablation: Ablation, depths: tuple[int, int]) -> PaperRow:
    """A row of an ablation with its network of these depths."""
    third, more = depths
    told = f", {third} blocks" + f" and {more:+} in stage 2" * bool(more) if ablation.reference else ""
    network = ablation.at(third, more).name
    return PaperRow(ablation.table, ablation.row + told, network, SIZES[ablation.table], ablation.printed)


# Why a printed figure and the network's own differ by more than 2 %, by table, row and column. Where attention products
# are the difference, the table of costs says so itself.
_ROUNDED = "it is printed with one digit"
_CLASSIFIER = "printed with the classifier of ImageNet, 1.03 million that nothing reads"
_FOUR_CONVOLUTIONS = "printed for a box head of four convolutions and one linear layer; with it they are {}"
EXPLAINED = {
    ("table4", "RegNetY-8G 224", "params_m"): "a slip of the paper: the figure of the row above",
    ("table4", "MobileViTv2-1.0 256", "flops_g"): "a slip of the paper: the figure of the column before",
    ("table4", "MobileViTv2-2.0 256", "flops_g"): "unknown; the narrower one agrees with what is known of it (1.8)",
    ("table4", "DeiT-T 224", "params_m"): "printed of the distilled network, whose second classifier makes it 5.91",
    ("table4", "DeiT-T 224", "flops_g"): _ROUNDED,
    ("table4", "Swin-T 224", "params_m"): "rounded upwards",
    ("table4", "CMT-T 160", "flops_g"): _ROUNDED,
    ("table4", "CMT-XS 192", "flops_g"): _ROUNDED,
    ("table4", "ResNet152 224", "flops_g"): "a slip of the paper: it is 11.6",
    ("table4", "CSWin-T 224", "params_m"): "unknown; the released code has 22.3, too",
    ("table4", "CoaT Mini 224", "params_m"): "rounded",
    ("table4", "UniFormer-S 224", "params_m"): "unknown; its own paper prints 22",
    ("table4", "EfficientFormer-L7 224", "flops_g"): "a slip of the paper: it is 10.2",
    ("table4", "EfficientNet-B5 456", "flops_g"): "unknown; B3, of the same code, agrees within 2 %",
    ("table4", "CMT-S 224", "params_m"): "unknown; the released code has 26.3, too",
    ("table4", "Next-ViT-L 384", "flops_g"): "a slip of the paper: the figure for 224 pixels",
    ("table5", "ResNet101 512", "upernet_params_m"): "probably a slip: 86 would agree",
    (
        "table5",
        "PoolFormer-S24 512",
        "fpn_params_m",
    ): "unknown; the same head on the other four PoolFormers agrees to 0.2 %",
    (
        "table5",
        "CSWin-T 512",
        "upernet_params_m",
    ): "probably a slip: it is Swin-T's figure, and CSWin-S agrees to 0.1 %",
    ("table5", "UniFormer-S 512", "upernet_flops_g"): "probably a slip: with attention products 1003; 1008 would agree",
    ("table5", "Next-ViT-S 512", "fpn_params_m"): _CLASSIFIER,
    ("table5", "Next-ViT-B 512", "fpn_params_m"): _CLASSIFIER,
    ("table5", "Next-ViT-L 512", "fpn_flops_g"): "a slip of the paper: two digits are swapped, it is 311",
    ("table6", "ResNeSt50 512", "params_m"): _FOUR_CONVOLUTIONS.format(47.6),
    ("table6", "ResNeSt50 512", "flops_g"): _FOUR_CONVOLUTIONS.format(401),
    ("table6", "ResNeSt101 512", "flops_g"): _FOUR_CONVOLUTIONS.format(499),
    (
        "table6",
        "CMT-S 512",
        "params_m",
    ): "unknown; neck and heads of Mask R-CNN have 20 million beside the backbone's 25",
    ("table6", "Twins-SVT-L 512", "params_m"): "probably a slip: it is about what RetinaNet on it has",
    (
        "table6",
        "Next-ViT-S 512",
        "params_m",
    ): "a slip of the paper: it is the latency; 51.8 train, the classifier included",
}


@dataclass(frozen=True)
class Claim:
    """That one network takes less time than another one of about its accuracy, or as much: both rows of one table."""

    table: str
    faster: str  # keys of rows
    slower: str
    similar: bool = False  # they are said to take about the same
    text: str = ""  # what the text says, where it gives a figure


CLAIMS = (  # of the paper's text; how much faster is in its tables
    Claim("table4", "Next-ViT-S 224", "ResNet101 224", similar=True, text="at the same latency"),
    Claim("table4", "Next-ViT-S 224", "ConvNeXt-T 224"),
    Claim("table4", "Next-ViT-S 224", "Twins-SVT-S 224"),
    Claim("table4", "Next-ViT-S 224", "CSWin-T 224", text="3.6x faster"),
    Claim("table4", "Next-ViT-B 224", "UniFormer-S 224"),
    Claim("table4", "Next-ViT-B 224", "EfficientFormer-L7 224"),
    Claim("table4", "Next-ViT-L 224", "CSWin-S 224"),
    Claim("table4", "Next-ViT-L 224", "ConvNeXt-B 224", text="1.4x faster"),
    Claim("table4", "Next-ViT-L 224", "TRT-ViT-D 224", text="15 % less"),
    Claim("table5", "Next-ViT-S 512", "Twins-SVT-S 512"),
    Claim("table5", "Next-ViT-B 512", "EfficientFormer-L7 512"),
    Claim("table5", "Next-ViT-L 512", "UniFormer-B 512", text="1.6x faster"),
    Claim("table5", "Next-ViT-L 512", "CSWin-S 512"),
    Claim("table6", "Next-ViT-S 512", "Twins-SVT-S 512", text="3.2x faster"),
    Claim("table6", "Next-ViT-B 512", "EfficientFormer-L7 512"),
    Claim("table6", "Next-ViT-L 512", "CSWin-S 512", text="79 % faster"),
    Claim("table6", "Next-ViT-L 512", "UniFormer-B_h14 512"),
)
