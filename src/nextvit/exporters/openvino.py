"""OpenVINO IR: an .xml with its metadata, and the weights in a .bin beside it."""

import tempfile
from pathlib import Path

from nextvit.backbone import NextViT
from nextvit.exporters.graph import onnx_graph
from nextvit.extras import need
from nextvit.files import OPEN_SEAL, close_seal
from nextvit.metadata import Metadata
from nextvit.runtime.openvino_session import METADATA_KEY


def write(folded: NextViT, path: Path, metadata: Metadata, *, dynamic: bool) -> None:
    """Write the folded model to `path` (.xml) and its .bin, weights in fp32."""
    ov = need("openvino", extra="openvino")
    onnx = need("onnx", extra="openvino")
    graph = onnx_graph(folded, image_size=metadata.preprocess.image_size, dynamic=dynamic, extra="openvino")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "model.onnx")
        onnx.save(graph, source)
        model = ov.Core().read_model(source)
        model.set_rt_info(metadata.to_json(), [METADATA_KEY, "metadata"])
        model.set_rt_info(OPEN_SEAL, [METADATA_KEY, "sha256"])
        ov.save_model(model, path, compress_to_fp16=False)
    close_seal(path)
