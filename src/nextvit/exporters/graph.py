"""The ONNX graph of a folded model: dynamic where asked, slimmed. The ONNX and OpenVINO files are both made from it."""

import logging
import warnings
from typing import Any

import torch

from nextvit.backbone import NextViT
from nextvit.extras import need

OPSET = 20
SMALLEST_PROVEN = {"batch": 1, "height": 64, "width": 64}


def onnx_graph(folded: NextViT, *, image_size: int, dynamic: bool, extra: str) -> Any:
    """An onnx.ModelProto with input `image` (B, C, H, W) and output `logits` (B, classes)."""
    need("onnxscript", extra=extra)
    onnxslim = need("onnxslim", extra=extra)
    channels = folded.metadata.in_channels
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
                folded.cpu().float(),
                (example,),
                dynamo=True,
                dynamic_shapes=dims,
                input_names=["image"],
                output_names=["logits"],
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None  # with dynamo=True there always is one
        return onnxslim.slim(program.model_proto)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
