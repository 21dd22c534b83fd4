"""A network that another one learns from."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nextvit.create import open_classifier
from nextvit.errors import UserError
from nextvit.extras import need

FROM_TIMM = "timm:"


def open_teacher(name: str, labels: Sequence[str], device: torch.device) -> Callable[[Tensor], Tensor]:
    """The logits (B, classes) of a checkpoint of ours, or of a published timm network (`timm:NAME`).

    It sees the images as the student does. A checkpoint's classes are matched by name; timm's networks know ImageNet's
    only by number, so their number must agree. Raises UserError where they do not.
    """
    order = None
    if name.startswith(FROM_TIMM):
        timm = need("timm", extra="train")
        try:
            model = timm.create_model(name.removeprefix(FROM_TIMM), pretrained=True)
        except Exception as error:  # whatever the hub, the network or timm's registry says
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the teacher {name} cannot be had from timm: {reason}") from error
        known = model.num_classes
        if known != len(labels):
            raise UserError(f"the teacher {name} has {known} classes and the data has {len(labels)}; take another.")
    else:
        model = open_classifier(name)
        theirs = model.metadata.labels
        if missing := [label for label in labels if label not in theirs]:
            raise UserError(f"the teacher {name} does not know the class {missing[0]!r} of the data; take another.")
        order = torch.tensor([theirs.index(label) for label in labels], device=device)
    model = model.to(device).eval().requires_grad_(False)

    def answer(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(images)
        return logits if order is None else logits[:, order]

    return answer
