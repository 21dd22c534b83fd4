"""CoreML: an `.mlpackage` that takes an RGB image and answers with a label. fp32, fp16, int8."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextvit.exporters.calibration import Calibration
from nextvit.exporters.program import Normalised, quantized_network, quiet, refuse, torch_program
from nextvit.exporters.quantization import FASTEST, Plan, part_plans
from nextvit.extras import need
from nextvit.files import OPEN_SEAL, close_seal
from nextvit.formats import Free
from nextvit.metadata import Metadata
from nextvit.runtime.coreml_session import METADATA_KEY, not_here

int8_plans = part_plans
SMALLEST, LARGEST = 64, 2048  # of free sides, pixels


def write(
    form: nn.Module,
    path: Path,
    metadata: Metadata,
    *,
    free: Free,
    calibration: Calibration | None = None,
    plan: Plan = FASTEST,
) -> Path | None:
    """Write an ML program for iOS 17, macOS 14 or later to the folder `path`.

    Input `image`: RGB pixels of the size that preprocessing cuts; scaling and normalisation are in the graph. Outputs
    `label`, `label_probs` (a dictionary) and `logits`. A model of other than three channels takes normalised floats.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with quiet():
        ct = need("coremltools", extra="coreml")
    side, channels = metadata.preprocess.image_size, metadata.in_channels
    shape = (1, channels, side, side)
    network = form
    largest = {"batch": 1, "side": LARGEST}
    if calibration is not None:
        network = quantized_network(network, shape, free, largest, _quantizer(plan), calibration)
    if channels == 3:
        network = Normalised(network, metadata.preprocess.mean, metadata.preprocess.std)
    open_shape = (1, channels, *(ct.RangeDim(SMALLEST, LARGEST, side) for _ in range(2 * free.sides)))
    input_shape = ct.Shape(open_shape if free.sides else shape)
    given = ct.ImageType if channels == 3 else ct.TensorType
    layout = {"color_layout": ct.colorlayout.RGB} if channels == 3 else {}
    precision = ct.precision.FLOAT32 if metadata.precision == "fp32" else ct.precision.FLOAT16
    target = ct.target.iOS17
    try:
        with quiet():
            milprogram = ct.convert(
                torch_program(WithProbabilities(network), shape, free, largest).run_decompositions({}),
                inputs=[given(name="image", shape=input_shape, **layout)],
                outputs=[ct.TensorType(name="probabilities"), ct.TensorType(name="logits")],
                convert_to="milinternal",
                compute_precision=precision,
                minimum_deployment_target=target,
            )
            # The converter puts label and dictionary in the place of the probabilities, and would then look up types of
            # outputs by their old numbers.
            milprogram.functions["main"].set_output_types(None)
            package = ct.convert(
                milprogram,
                classifier_config=ct.ClassifierConfig(
                    _labels(metadata), predicted_feature_name="label", predicted_probabilities_output="probabilities"
                ),
                convert_to="mlprogram",
                compute_precision=precision,
                minimum_deployment_target=target,
            )
    except (ValueError, NotImplementedError, RuntimeError, IndexError) as error:
        raise refuse("coreml", error) from error
    package.user_defined_metadata[METADATA_KEY] = metadata.to_json()
    package.user_defined_metadata["sha256"] = OPEN_SEAL
    package.short_description = f"{metadata.variant}, {metadata.num_classes} classes"
    package.save(str(path))
    close_seal(path)
    return path if not_run() is None else None


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


def float_layers(path: Path, plan: Plan) -> list[str]:
    """Parts of an int8 file that are left in float."""
    return list(plan.float_parts)


def not_run() -> str | None:
    """Why the file cannot be run here."""
    return not_here()
