"""The ONNX graph of a folded model: dynamic where asked, slimmed. The ONNX and OpenVINO files are both made from it."""

import logging
import warnings
from typing import Any

import torch

from nextvit.backbone import SMALLEST_SIDE, NextViT
from nextvit.extras import need

OPSET = 20


def onnx_graph(folded: NextViT, *, image_size: int, dynamic: bool, extra: str) -> Any:
    """An onnx.ModelProto with input `image` (B, C, H, W) and output `logits` (B, classes)."""
    need("onnxscript", extra=extra)
    onnxslim = need("onnxslim", extra=extra)
    dims = None
    if dynamic:
        largest = 8192  # a bound lets the exporter prove that no stage runs out of tokens
        size = {
            axis: torch.export.Dim(name, min=SMALLEST_SIDE, max=largest) for axis, name in ((2, "height"), (3, "width"))
        }
        dims = ({0: torch.export.Dim("batch", min=1, max=1024), **size},)
    # A batch of two and unequal sides: an example of 1, or a square one, can be taken for a constant.
    shape = (2, folded.metadata.in_channels, image_size, image_size + 32) if dynamic else None
    example = torch.zeros(shape or (1, folded.metadata.in_channels, image_size, image_size))
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
