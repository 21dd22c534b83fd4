"""Semantic segmentation (paper, 4.2): a backbone with normed maps, Semantic FPN or UperNet on it, and their losses."""

import torch.nn.functional as F
from torch import Tensor, nn

from nextvit.backbone import NextViT
from nextvit.foreign import ForeignMaps
from nextvit.heads.fpn import FPN
from nextvit.heads.semantic_fpn import SemanticFPNHead
from nextvit.heads.units import resized
from nextvit.heads.upernet import FCNHead, UperNetHead
from nextvit.metadata import Metadata

IGNORED = 255  # the label of pixels that no loss and no metric counts
AUXILIARY_WEIGHT = 0.4


class Segmenter(nn.Module):
    """(B, C, H, W) -> (B, classes, ceil(H / 4), ceil(W / 4)) logits; given labels too, the losses.

    backbone: gives four maps at strides 4, 8, 16, 32, of so many channels as `widths` says.
    """

    def __init__(self, backbone: NextViT | ForeignMaps, metadata: Metadata):
        super().__init__()
        self.metadata = metadata
        self.backbone = backbone
        widths = backbone.widths
        if metadata.head == "fpn":
            self.neck: nn.Module = FPN(widths)
            self.decode_head: nn.Module = SemanticFPNHead(metadata.num_classes)
            self.auxiliary_head: FCNHead | None = None
        else:
            self.neck = nn.Identity()
            self.decode_head = UperNetHead(widths, metadata.num_classes)
            self.auxiliary_head = FCNHead(widths[2], metadata.num_classes)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """labels: int64 (B, H, W), IGNORED where there is none -> losses by name; their sum is what training lowers."""
        maps = self.backbone(images)
        logits = self.decode_head(self.neck(maps))
        if labels is None:
            return logits
        losses = {"loss_decode": pixel_loss(logits, labels)}
        if self.auxiliary_head is not None:
            losses["loss_auxiliary"] = AUXILIARY_WEIGHT * pixel_loss(self.auxiliary_head(maps[2]), labels)
        return losses


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits resized to the labels; the mean over all pixels, those that are ignored included."""
    logits = resized(logits.float(), labels.shape[1:])
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()
