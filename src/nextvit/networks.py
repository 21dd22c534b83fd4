"""What `create_model` gives: a classifier, of ours or of others, a segmenter or a detector."""

from typing import Any

import numpy as np
import torch
from torch import nn

from nextvit.backbone import NextViT
from nextvit.detector import Detector, Padded
from nextvit.foreign import ForeignClassifier, ForeignMaps
from nextvit.segmenter import Segmenter

Dense = Segmenter | Detector  # a backbone with heads on its maps
Classifier = NextViT | ForeignClassifier
Network = Classifier | Segmenter | Detector


def backbone_of(network: Network) -> NextViT | ForeignClassifier | ForeignMaps:
    """The backbone of a dense network; a classifier is its own."""
    return network.backbone if isinstance(network, Dense) else network


def of_size(network: Network, image_size: int | None, *, fresh: bool = False) -> Network:
    """The network for images of this size: of others' whose size is fixed a new one. fresh: it has not learnt yet."""
    if isinstance(network, ForeignClassifier) and image_size is not None:
        return network.of_size(image_size, fresh=fresh)
    return network


def as_asked(network: Network) -> nn.Module:
    """The network as images are given to it: a detector pads them itself."""
    return Padded(network) if isinstance(network, Detector) else network


def as_arrays(outputs: Any) -> Any:
    """numpy arrays of what a network gives, floats in float32; of a detector a dict for each image, of maps a list."""
    if isinstance(outputs, torch.Tensor):
        found: np.ndarray = (outputs.float() if outputs.is_floating_point() else outputs).cpu().numpy()
        return found
    if isinstance(outputs, dict):
        return {name: as_arrays(value) for name, value in outputs.items()}
    return [as_arrays(one) for one in outputs]
