"""CoreML: an `.mlpackage` that takes an RGB image and answers with a label. fp32, fp16, int8."""

from typing import Any

import torch
from torch import Tensor, nn

from nextvit.exporters.job import Job, Written
from nextvit.exporters.program import Normalised, converting, quantized, quiet, torch_program
from nextvit.exporters.quantization import Int8, Plan, part_plans, parts_in_float
from nextvit.extras import need
from nextvit.files import OPEN_SEAL, close_seal
from nextvit.metadata import Metadata
from nextvit.runtime.coreml_session import METADATA_KEY, not_here

SMALLEST, LARGEST = 64, 2048  # of free sides, pixels


def write(job: Job) -> Written:
    """Write an ML program for iOS 17, macOS 14 or later, a folder.

    Input `image`: RGB pixels of the size that preprocessing cuts; scaling and normalisation are in the graph. Outputs
    `label`, `label_probs` (a dictionary) and `logits`; of segmentation `logits` or `classes`. A model of other than
    three channels takes normalised floats.
    """
    with quiet():
        ct = need("coremltools", extra="coreml")
    metadata, largest = job.metadata, {"batch": 1, "side": LARGEST}
    network = job.network if job.calibration is None else quantized(job, largest, _quantizer(job.plan))
    if metadata.in_channels == 3:
        network = Normalised(network, metadata.preprocess.mean, metadata.preprocess.std)
    target = {
        "compute_precision": ct.precision.FLOAT32 if metadata.precision == "fp32" else ct.precision.FLOAT16,
        "minimum_deployment_target": ct.target.iOS17,
    }
    classifies = metadata.task == "classify"
    outputs = ["probabilities"] * classifies + list(metadata.outputs)
    with converting("coreml"):
        milprogram = ct.convert(
            torch_program(job, WithProbabilities(network) if classifies else network, largest).run_decompositions({}),
            inputs=[_input(ct, job)],
            outputs=[ct.TensorType(name=name) for name in outputs],
            convert_to="milinternal",
            **target,
        )
        classes = None
        if classifies:
            # The converter puts label and dictionary in the place of the probabilities, and would then look up types
            # of outputs by their old numbers.
            milprogram.functions["main"].set_output_types(None)
            classes = ct.ClassifierConfig(
                _labels(metadata), predicted_feature_name="label", predicted_probabilities_output="probabilities"
            )
        package = ct.convert(milprogram, classifier_config=classes, convert_to="mlprogram", **target)
        package.user_defined_metadata[METADATA_KEY] = metadata.to_json()
        package.user_defined_metadata["sha256"] = OPEN_SEAL
        package.short_description = f"{metadata.variant}, {metadata.num_classes} classes"
        package.save(str(job.path))
    close_seal(job.path)
    return Written(job.path if not_here() is None else None, not_here())


def _input(ct: Any, job: Job) -> Any:
    """The description of the input: an RGB image, or with other channels an array."""
    shape: tuple[Any, ...] = job.shape
    if job.free.sides:
        shape = (*shape[:2], *(ct.RangeDim(SMALLEST, LARGEST, side) for side in shape[2:]))
    if job.metadata.in_channels == 3:
        return ct.ImageType(name="image", shape=ct.Shape(shape), color_layout=ct.colorlayout.RGB)
    return ct.TensorType(name="image", shape=ct.Shape(shape))


class WithProbabilities(nn.Module):
    """A classifier that gives its probabilities beside its logits."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(image)
        return logits.softmax(1), logits


def _quantizer(plan: Plan) -> Any:
    """coremltools' configuration for weights and activations, carried out by the quantiser that ExecuTorch has for it.

    coremltools' own traces modules in a way that this network does not allow.
    """
    quantizer = need("executorch.backends.apple.coreml.quantizer", extra="executorch")
    quantization = need("coremltools.optimize.torch.quantization", extra="coreml")
    layers = {
        "quantization_scheme": quantization.QuantizationScheme.symmetric,
        "activation_dtype": torch.quint8,
        "weight_dtype": torch.qint8,
        "weight_per_channel": True,
    }
    left = {name: None for name in plan.float_parts}
    config = quantization.LinearQuantizerConfig.from_dict({"global_config": layers, "module_name_configs": left})
    return quantizer.CoreMLQuantizer(config)


def _labels(metadata: Metadata) -> list[str]:
    """A name for each class; a dictionary needs them all different, and ImageNet has two cranes."""
    names = list(metadata.labels) or [str(index) for index in range(metadata.num_classes)]
    return [name if names.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(names)]


INT8 = Int8(("executorch.backends.apple.coreml.quantizer", "executorch"), part_plans, parts_in_float)
