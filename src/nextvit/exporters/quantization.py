"""Post-training int8: by NNCF for graphs of OpenVINO and ONNX; what stays float; and what it costs in accuracy."""

import contextlib
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nextvit.average_precision import AveragePrecision, Scores
from nextvit.backbone import Stacked
from nextvit.data.images import read_image
from nextvit.data.objects import Objects
from nextvit.exporters.calibration import Calibration, Images
from nextvit.exporters.rounding import rounded
from nextvit.extras import need
from nextvit.heads.units import Unit
from nextvit.metadata import Metadata
from nextvit.metrics import PixelConfusion
from nextvit.progress import say, track
from nextvit.runtime.session import Session
from nextvit.tasks.detect import SURE, Detections, detect
from nextvit.tasks.segment import enlarged_argmax

RESIDUALS = r"(backbone\.)?stages\.\d+\.blocks\.\d+/Add.*"  # names of the additions that make the residual stream
RANKED, FEWEST_RANKED = 64, 4  # images that tell which layers are sensitive,
RANKED_PIXELS = RANKED * 224**2  # and at most so many pixels of them
OUTSIDE = r"model/.*"  # names of what is computed outside of all layers
ENDS = ("stem", "head", "body", "conv_seg")  # parts beside blocks and units; body: a network of timm's
SHARES = (1 / 8, 1 / 4, 1 / 2)  # of the parts that are left in float, in turn


@dataclass(frozen=True)
class Plan:
    """What stays float. As it comes, nothing that NNCF can quantise does, which is the fastest."""

    float_residual: bool = False  # the residual stream is not rounded to 8 bits at each addition
    max_drop: float | None = None  # points; the most sensitive layers go back to float until no more are lost
    truth: np.ndarray | None = None  # int (N,): the class of each image to measure that on
    float_parts: tuple[str, ...] = ()  # modules that stay float: the stem, blocks, the head


FASTEST = Plan()


@dataclass(frozen=True)
class Int8:
    """How a format is quantised."""

    needs: tuple[str, str]  # a module, and the extra that brings it
    plans: Callable[[nn.Module, Calibration, float, np.ndarray], Iterator[Plan]]  # what to try after FASTEST, in turn
    float_layers: Callable[[Path, Plan], list[str]]  # of a written file: what is computed in float


def parts_in_float(path: Path, plan: Plan) -> list[str]:
    """Of formats whose runtime gives no report: the parts that the plan left out."""
    return list(plan.float_parts)


def nncf_plans(form: nn.Module, calibration: Calibration, max_drop: float, truth: np.ndarray) -> Iterator[Plan]:
    """What to try in turn with NNCF where all int8 loses too much, from the fastest to the most accurate."""
    if calibration.measure.metadata.task == "detect":
        yield from detector_plans()
        return
    yield Plan(float_residual=True)
    yield Plan(float_residual=True, max_drop=max_drop, truth=truth)


def onnx_plans(form: nn.Module, calibration: Calibration, max_drop: float, truth: np.ndarray) -> Iterator[Plan]:
    """The same for ONNX graphs, in which NNCF cannot restore accuracy itself: sensitive parts stay float."""
    if calibration.measure.metadata.task == "detect":
        yield from detector_plans()
        return
    yield Plan(float_residual=True)
    for plan in part_plans(form, calibration, max_drop, truth):
        yield replace(plan, float_residual=True)


def detector_plans() -> Iterator[Plan]:
    """The same for a detector, from its end on: what chooses boxes needs exact ones most."""
    yield Plan(float_residual=True)
    for parts in (("roi_head.bbox_head",), ("roi_head", "rpn_head"), ("roi_head", "rpn_head", "neck")):
        yield Plan(float_residual=True, float_parts=parts)


def part_plans(form: nn.Module, calibration: Calibration, max_drop: float, truth: np.ndarray) -> Iterator[Plan]:
    """What to try in turn with quantisers that only can leave out: more and more of the sensitive parts stay float."""
    ranked = sensitive_parts(form, calibration.calibrate)
    for share in SHARES:
        yield Plan(float_parts=tuple(ranked[: math.ceil(share * len(ranked))]))


def sensitive_parts(form: nn.Module, images: Images) -> list[str]:
    """Stem, blocks and heads; first the one that moves the logits most when it alone is rounded to int8.

    Rounded are weights (a scale a channel) and inputs (one scale) of its convolutions and linear layers.
    """
    parts = {
        name: module
        for name, module in form.named_modules()
        if isinstance(module, Stacked | Unit) or name.rpartition(".")[2] in ENDS
    }
    height, width = next(iter(images)).shape[2:]
    count = max(FEWEST_RANKED, min(RANKED, RANKED_PIXELS // (height * width)))
    batch = torch.from_numpy(np.concatenate([image for image, _ in zip(images, range(count), strict=False)]))
    with torch.inference_mode():
        exact = form(batch)
        moved = {}
        for name, part in track(parts.items(), total=len(parts), label="find the sensitive parts"):
            with rounded(part):
                moved[name] = float((form(batch) - exact).square().mean())
    return sorted(parts, key=lambda name: -moved[name])


@dataclass(frozen=True)
class Accuracy:
    """Of an int8 file on the images to measure on, beside its float model."""

    metric: str  # "top-1", "mIoU" or "box AP"; "agreement" with the float model where the truth is not known
    images: int
    float_value: float  # percent
    int8_value: float  # percent
    agreement: float  # percent of images, or of pixels, with the float model's first label; see `agreeing` for objects

    @property
    def drop(self) -> float:
        """Points lost."""
        return self.float_value - self.int8_value

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "drop": self.drop}


def quantize(graph: Any, calibration: Calibration, plan: Plan) -> Any:
    """An int8 copy of an ov.Model or an onnx.ModelProto with input `image`, its nodes named for their layers."""
    need("nncf", extra="int8")
    ranges = import_module("nncf.quantization.range_estimator").RangeEstimatorParametersSet
    try:
        # Ranges of the least squared error: NNCF's means of extremes cut off what the network needs.
        return _quantized(graph, calibration, plan, ranges.HISTOGRAM)
    except ValueError as error:
        if "bins" not in str(error):  # of a histogram of values that are nearly all the same
            raise
        say("note: some activations hardly vary over the calibration images, so their extremes are taken as ranges.")
        return _quantized(graph, calibration, plan, ranges.MINMAX)


def _quantized(graph: Any, calibration: Calibration, plan: Plan, ranges: Any) -> Any:
    nncf = need("nncf", extra="int8")
    nncf.set_log_level(logging.ERROR)
    # NNCF's correction of biases makes ONNX graphs much worse (97 % same labels, not 99.7 %) and changes nothing in
    # OpenVINO's.
    advanced = nncf.AdvancedQuantizationParameters(
        activations_range_estimator_params=ranges, disable_bias_correction=True
    )
    options: dict[str, Any] = {
        "preset": nncf.QuantizationPreset.PERFORMANCE,
        "ignored_scope": nncf.IgnoredScope(patterns=_left_alone(plan, calibration.measure.metadata), validate=False),
        "subset_size": len(calibration.calibrate),
    }
    samples = nncf.Dataset(calibration.calibrate, lambda image: {"image": image})
    with contextlib.redirect_stdout(sys.stderr):  # its progress; standard output is kept for results
        if plan.max_drop is None or plan.truth is None:
            return nncf.quantize(graph, samples, advanced_parameters=advanced, **options)
        images, truth = calibration.measure, plan.truth

        def validate(model: Any, indices: Iterable[int]) -> tuple[float, list[list[np.ndarray]]]:
            chosen = list(indices)
            seen = track(chosen, total=len(chosen), label="measure")  # again for all that NNCF puts back to float
            outputs = [model(images[index])[0] for index in seen]  # compiled by OpenVINO
            answers = np.concatenate([answers_of(output, images.metadata) for output in outputs])
            return score(answers, truth[chosen], images.metadata) / 100, [[output] for output in outputs]

        return nncf.quantize_with_accuracy_control(
            graph,
            samples,
            nncf.Dataset(range(len(images)), lambda index: {"image": images[index]}),
            validate,
            max_drop=plan.max_drop / 100,
            advanced_quantization_parameters=advanced,
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(ranking_subset_size=RANKED),
            **options,
        )


def _left_alone(plan: Plan, metadata: Metadata) -> list[str]:
    """Patterns of the names of nodes that stay float: of a detector what computes boxes, which is in no layer."""
    own = [OUTSIDE] if metadata.task == "detect" else []
    return own + [RESIDUALS] * plan.float_residual + [rf"{re.escape(part)}\..*" for part in plan.float_parts]


def answers_of(output: np.ndarray, metadata: Metadata) -> np.ndarray:
    """Classes of a batch of outputs: int (B,), or of segmentation uint8 (B, image_size, image_size)."""
    if metadata.task == "classify":
        return output.argmax(1)
    if output.ndim == 3:
        return output.astype(np.uint8)
    side = metadata.preprocess.image_size
    return np.stack([enlarged_argmax(torch.from_numpy(logits), (side, side)) for logits in output])


def all_answers(session: Session, images: Images, label: str) -> Any:
    """The same of all images, one at a time; of a detector a list of Detections."""
    if images.metadata.task == "detect":
        names = tuple(map(str, range(images.metadata.num_classes)))
        sources = track(images.sources, total=len(images), label=label)
        return [detect(session, read_image(source), images.metadata, names) for source in sources]
    seen = track(images, total=len(images), label=label)
    return np.concatenate([answers_of(session(image), session.metadata) for image in seen])


def score(answers: Any, truth: Any, metadata: Metadata) -> float:
    """Percent: top-1, mIoU, or AP of boxes."""
    if metadata.task == "detect":
        return _box_scores(answers, truth, metadata).ap or 0.0
    if metadata.task == "classify":
        return 100.0 * float((answers == truth).mean())
    counted = PixelConfusion(metadata.num_classes)
    for answer, labels in zip(answers, truth, strict=True):
        counted.update(answer, labels)
    return counted.miou


def _box_scores(answers: Sequence[Detections], truth: Sequence[Objects], metadata: Metadata) -> Scores:
    classes = range(1, metadata.num_classes + 1)
    metrics = AveragePrecision(classes, masks=False)
    for number, (found, objects) in enumerate(zip(answers, truth, strict=True), 1):
        corners = objects.boxes.astype(float)
        sides = corners[:, 2:] - corners[:, :2]
        rows = [
            {"category_id": classes[label], "bbox": [*corner[:2].tolist(), *side.tolist()], "area": float(side.prod())}
            | {"iscrowd": int(crowd)}
            for corner, side, label, crowd in zip(corners, sides, objects.labels, objects.crowd, strict=True)
        ]
        metrics.update(number, found.size, rows, found.as_coco(classes, masks=False))
    return metrics.scores["box"]


def agreeing(floats: Any, int8: Any, metadata: Metadata) -> float:
    """Percent of images or pixels of the same first label; of detection AP at an overlap of a half, where what the
    float model is SURE of is the truth.
    """
    if metadata.task != "detect":
        return 100.0 * float((floats == int8).mean())
    sure = [found.scores >= SURE for found in floats]
    truth = [
        Objects(found.boxes[which], found.classes[which], np.zeros(which.sum(), bool), ({},) * int(which.sum()))
        for found, which in zip(floats, sure, strict=True)
    ]
    found = _box_scores(int8, truth, metadata).ap50
    return 100.0 if found is None else found  # it is sure of nothing


def accuracy(images: Images, truth: Any, floats: Any, int8: Any) -> Accuracy:
    """truth, floats, int8: what is right, and the answers of both; truth None: the float model's are."""
    m = images.metadata
    agreement = agreeing(floats, int8, m)
    if truth is None:
        return Accuracy("agreement", len(images), 100.0, agreement, agreement)
    metric = {"classify": "top-1", "segment": "mIoU", "detect": "box AP"}[m.task]
    return Accuracy(metric, len(images), score(floats, truth, m), score(int8, truth, m), agreement)
