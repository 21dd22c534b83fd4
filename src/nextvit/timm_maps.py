"""Networks of timm as backbones: four maps at strides 4, 8, 16, 32."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nextvit.errors import UserError
from nextvit.extras import need

PREFIX = "timm:"  # before the name of a network of timm's
STRIDES = (4, 8, 16, 32)
PROBE = 224  # pixels a side: what every network of timm's takes


class TimmMaps(nn.Module):
    """(B, in_channels, H, W) -> four maps (B, C, H / stride, W / stride) of `widths` channels, finest first."""

    def __init__(self, name: str, in_channels: int = 3):
        super().__init__()
        timm = need("timm", extra="train")
        if not timm.is_model(name):
            raise UserError(f"timm has no network {name!r}; timm.list_models() names those that it has.")
        try:
            strides = timm.create_model(name, features_only=True).feature_info.reduction()
            last = {stride: index for index, stride in enumerate(strides)}
            if not last.keys() >= set(STRIDES):
                raise ValueError(f"its maps are at strides {', '.join(map(str, last))}")
            indices = tuple(last[stride] for stride in STRIDES)
            self.body = timm.create_model(name, features_only=True, out_indices=indices, in_chans=in_channels)
            with torch.no_grad():
                maps = self.body.eval()(torch.zeros(1, in_channels, PROBE, PROBE))
        except (RuntimeError, ValueError, AttributeError, AssertionError) as error:
            raise UserError(f"{PREFIX}{name} gives no maps at strides 4, 8, 16, 32: {error}.") from error
        self.widths: tuple[int, ...] = tuple(self.body.feature_info.channels())
        self.channels_last = maps[0].shape[1] != self.widths[0]  # Swin's maps are (B, H, W, C)
        self.train()

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.body(x)
        return [x.permute(0, 3, 1, 2) for x in maps] if self.channels_last else list(maps)


def from_classifier(tensors: Mapping[str, Tensor], backbone: TimmMaps) -> dict[str, Tensor]:
    """The backbone's tensors among those of timm's classifier of the same name, whose names have dots for some `_`."""
    same = {key.replace(".", "_"): tensor for key, tensor in tensors.items()}
    wanted = {key: key.removeprefix("body.").replace(".", "_") for key in backbone.state_dict()}
    return {key: same[name] for key, name in wanted.items() if name in same}
