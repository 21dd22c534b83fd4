"""The ONNX graph of a model in its export form: dynamic where asked, slimmed, its nodes named as the layers are."""

import ast
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from nextvit.backbone import NextViT
from nextvit.extras import need

OPSET = 20
SMALLEST_PROVEN = {"batch": 1, "height": 64, "width": 64}


def onnx_graph(form: NextViT, *, image_size: int, dynamic: bool, extra: str, half: bool = False) -> Any:
    """An onnx.ModelProto with input `image` (B, C, H, W) and output `logits` (B, classes).

    half: weights and arithmetic in fp16; input and output stay float32. A node that computes a layer has the layer's
    name and its operator: `stages.0.blocks.1.mlp.fc1/Conv`.
    """
    need("onnxscript", extra=extra)
    onnxslim = need("onnxslim", extra=extra)
    channels = form.metadata.in_channels
    example, dims = torch.zeros(1, channels, image_size, image_size), None
    if dynamic:
        # A batch of two and unequal sides: an example of 1, or a square one, can be taken for a constant. Maps of one
        # pixel too, so torch proves the sizes from 64 up; the graph it writes holds from 32 (tests/test_export.py).
        example = torch.zeros(2, channels, 96, 128)
        batch, height, width = (torch.export.Dim(n, min=m, max=8192) for n, m in SMALLEST_PROVEN.items())
        dims = ({0: batch, 2: height, 3: width},)
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Half(form.cpu()) if half else form.cpu().float(),
                (example,),
                dynamo=True,
                dynamic_shapes=dims,
                input_names=["image"],
                output_names=["logits"],
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None  # with dynamo=True there always is one
        graph = program.model_proto
        _name_nodes(graph)
        return onnxslim.slim(graph)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Half(nn.Module):
    """A network in fp16 that takes and gives float32."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.half()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.half())
        return logits.float()


def _name_nodes(model: Any) -> None:
    """Name each node for the module that it comes from; the exporter notes the modules down, innermost last but one."""
    taken: dict[str, int] = {}
    for node in model.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "['']"))
        module = scopes[-2].removeprefix("network").removeprefix(".") if len(scopes) > 1 else ""
        name = f"{module or 'model'}/{node.op_type}"
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}.{taken[name]}"
