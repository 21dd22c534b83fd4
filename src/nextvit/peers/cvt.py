"""CvT: Introducing Convolutions to Vision Transformers (arXiv 2103.15808), built from transformers."""

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nextvit.extras import need


@dataclass(frozen=True)
class Variant:
    """One column of the paper's Table 2, with its size and cost from Table 3."""

    name: str
    image_size: int  # pixels, of a square image
    depths: tuple[int, int, int]
    params_m: float  # millions
    flops_g: float  # 10^9 multiply-adds for one image


VARIANTS = {
    v.name: v for v in (Variant("cvt_13", 224, (1, 2, 10), 20, 4.5), Variant("cvt_21", 224, (1, 4, 16), 32, 7.1))
}
LAST = "network.classifier"


class CvT(nn.Module):
    """(B, 3, H, W) -> (B, num_classes) logits. Its three stages give maps at strides 4, 8, 16 and none at 32."""

    def __init__(self, variant: Variant, num_classes: int = 1000):
        super().__init__()
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # what it imports on the way is deprecated
        transformers: Any = need("transformers", extra="peers")
        config = transformers.CvtConfig(depth=list(variant.depths), num_labels=num_classes)
        self.network = transformers.CvtForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=x, return_dict=True).logits
        return logits
