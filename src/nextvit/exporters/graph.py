"""The ONNX graph of a model in its export form: dynamic where asked, slimmed, its nodes named as the layers are."""

import ast
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nextvit.exporters.form import InDtype
from nextvit.exporters.job import Job
from nextvit.exporters.program import quiet, torch_program
from nextvit.extras import need

OPSET = 20
PREFIX = "preprocess/"  # of the names of its nodes
WRAPPERS = re.compile(r"^(network(\.|$))*")  # around the form


def onnx_graph(job: Job, *, half: bool = False) -> Any:
    """The network as an onnx.ModelProto with input `image` (B, C, H, W) and output `logits` (B, classes), for
    segmentation (B, classes, H / 4, W / 4) or `classes` (B, H, W); of a detector of one image the four of its objects.

    half: weights and arithmetic in fp16; input and output stay float32. A node that computes a layer has the layer's
    name and its operator: `stages.0.blocks.1.mlp.fc1/Conv`.
    """
    network = InDtype(job.network, torch.float16) if half else job.network
    return _graph(job.of_network(), network, job.metadata.outputs)


def preprocessing_graph(job: Job) -> Any:
    """What comes before the network where a file takes pixels: `image`, uint8 (B, H, W, 3), to `prepared`."""
    onnx = need("onnx", extra="onnx")
    graph = _graph(job, nn.Identity(), ("prepared",))
    del graph.graph.value_info[:]  # would be renamed whatever it is
    return onnx.compose.add_prefix(graph, PREFIX, rename_inputs=False, rename_outputs=False)


def with_preprocessing(graph: Any, job: Job) -> Any:
    """The network's graph behind that of preprocessing."""
    onnx = need("onnx", extra="onnx")
    for node in graph.graph.node:
        node.input[:] = ["prepared" if name == "image" else name for name in node.input]
    graph.graph.input[0].name = "prepared"
    return onnx.compose.merge_models(preprocessing_graph(job), graph, io_map=[("prepared", "prepared")])


def _graph(job: Job, network: nn.Module, outputs: Sequence[str]) -> Any:
    onnxslim = need("onnxslim", extra="onnx")
    with quiet():
        program = torch.onnx.export(
            torch_program(job, network),
            dynamo=True,
            input_names=["image"],
            output_names=list(outputs),
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None  # with dynamo=True there always is one
        graph = program.model_proto
        _name_nodes(graph)
        return onnxslim.slim(graph)


def _name_nodes(model: Any) -> None:
    """Name each node for the module that it comes from; the exporter notes the modules down, innermost last but one."""
    taken: dict[str, int] = {}
    for node in model.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "['']"))
        module = WRAPPERS.sub("", scopes[-2]) if len(scopes) > 1 else ""
        name = f"{module or 'model'}/{node.op_type}"
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}.{taken[name]}"
