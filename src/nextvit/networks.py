"""What `create_model` gives: a classifier, a segmenter or a detector."""

from nextvit.backbone import NextViT
from nextvit.detector import Detector
from nextvit.segmenter import Segmenter
from nextvit.timm_maps import TimmMaps

Dense = Segmenter | Detector  # a backbone with heads on its maps
Network = NextViT | Segmenter | Detector


def backbone_of(network: Network) -> NextViT | TimmMaps:
    """The backbone of a dense network; a classifier is its own."""
    return network.backbone if isinstance(network, Dense) else network
