"""ONNX: one file, its metadata inside."""

from pathlib import Path

from nextvit.backbone import NextViT
from nextvit.exporters.graph import onnx_graph
from nextvit.extras import need
from nextvit.files import OPEN_SEAL, close_seal
from nextvit.metadata import Metadata
from nextvit.runtime.onnxruntime_session import METADATA_KEY


def write(folded: NextViT, path: Path, metadata: Metadata, *, dynamic: bool) -> None:
    """Write the folded model to `path`."""
    onnx = need("onnx", extra="onnx")
    model = onnx_graph(folded, image_size=metadata.preprocess.image_size, dynamic=dynamic, extra="onnx")
    onnx.helper.set_model_props(model, {METADATA_KEY: metadata.to_json(), "sha256": OPEN_SEAL})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    close_seal(path)
