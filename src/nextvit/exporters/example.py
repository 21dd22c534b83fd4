"""An example beside an exported file: an image, what the model answers to it, and short programs that check it."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np
import torch
from PIL import Image

from nextvit.data.images import normalise, pixels, preprocess
from nextvit.data.scenes import compose
from nextvit.exporters.form import as_exported
from nextvit.exporters.object_parity import LOOSEST, ObjectParity
from nextvit.exporters.parity import Parity, real_images
from nextvit.metadata import Metadata
from nextvit.networks import Network, as_arrays, as_asked
from nextvit.tasks.detect import prepared

PHOTOGRAPH = 10  # of `real_images`: the first that is no garment
HINTS = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32"}  # of OpenVINO, for what is left in float


# How an image becomes the input, in each language: (normalised and cut already, as it is)
PYTHON_IMAGE = (
    """pixels = np.asarray(Image.open(here / "image.png"), np.float32)  # (H, W, 3), 0..255, of the model's size
image = ((pixels / 255 - expected["mean"]) / expected["std"]).transpose(2, 0, 1)[None]  # (1, 3, H, W)
image = np.ascontiguousarray(image, np.float32)""",
    """image = np.asarray(Image.open(here / "image.png"))[None].copy()  # uint8 (1, H, W, 3), of any size""",
)
JAVASCRIPT_IMAGE = (
    """const values = new Float32Array(3 * height * width); // (1, 3, H, W); the image has the model's size
for (let i = 0; i < height * width; i++)
  for (let c = 0; c < 3; c++)
    values[c * height * width + i] = (pixels[3 * i + c] / 255 - expected.mean[c]) / expected.std[c];
const image = new ort.Tensor("float32", values, [1, 3, height, width]);""",
    """const image = new ort.Tensor("uint8", new Uint8Array(pixels), [1, height, width, 3]); // of any size""",
)
CPP_IMAGE = (
    """  const float mean[] = {$mean}, deviation[] = {$std};
  ov::Tensor image(ov::element::f32, {1, 3, height, width});  // the image has the model's size
  for (size_t i = 0; i < height * width; ++i)
    for (size_t c = 0; c < 3; ++c)
      image.data<float>()[c * height * width + i] = (pixels[3 * i + c] / 255.0f - mean[c]) / deviation[c];""",
    """  ov::Tensor image(ov::element::u8, {1, height, width, 3}, pixels.data());  // of any size""",
)


@dataclass(frozen=True)
class Python:
    """How a Python program opens a file of one format and runs it: `model`, `image` -> `logits`."""

    packages: str
    imports: str
    run: str


RUN_ONNX = Python(
    "onnxruntime numpy pillow",
    "import onnxruntime",
    'logits = onnxruntime.InferenceSession(model).run(None, {"image": image})[0][0]',
)
PYTHON = {
    "onnx": RUN_ONNX,
    "tensorrt": RUN_ONNX,
    "openvino": Python(
        "openvino numpy pillow",
        "import openvino",
        "core = openvino.Core()\n"
        "network = core.read_model(model)\n"
        "network.reshape([$shape])  # one size is faster than free ones\n"
        'compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "$hint"})\n'
        "logits = compiled(image)[0][0]",
    ),
    "executorch": Python(
        "executorch numpy pillow",
        "import torch\nfrom executorch.runtime import Runtime",
        'method = Runtime.get().load_program(model).load_method("forward")\n'
        "logits = method.execute([torch.from_numpy(image)])[0].numpy()[0]",
    ),
    "torch": Python(
        "torch numpy pillow",
        "import torch",
        "with torch.inference_mode():\n"
        "    logits = torch.export.load(model).module()(torch.from_numpy(image)).numpy()[0]",
    ),
    "aotinductor": Python(
        "torch numpy pillow",
        "import torch",
        "with torch.inference_mode():\n"
        "    logits = torch._inductor.aoti_load_package(model)(torch.from_numpy(image)).numpy()[0]",
    ),
    "coreml": Python(
        "coremltools numpy pillow (on macOS)",
        "import coremltools",
        "package = coremltools.models.MLModel(model)  # it takes the image itself\n"
        'logits = package.predict({"image": Image.open(here / "image.png")})["logits"][0]',
    ),
}


OBJECTS = {  # how a detector is run: -> boxes, labels, scores, masks; imports beside those above
    "onnx": ("", 'boxes, labels, scores, masks = onnxruntime.InferenceSession(model).run(None, {"image": image})'),
    "openvino": (
        "",
        "core = openvino.Core()\n"
        'compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "$hint"})\n'
        "found = compiled(image)\n"
        "boxes, labels, scores, masks = (found[place] for place in range(4))",
    ),
    "torch": (
        "\nimport torchvision  # its operators are in the program",
        "with torch.inference_mode():\n"
        "    found = torch.export.load(model).module()(torch.from_numpy(image))\n"
        "boxes, labels, scores, masks = (values.numpy() for values in found)",
    ),
}


def write_example(
    folder: Path, file: str, format_name: str, model: Network, metadata: Metadata, parity: Parity | ObjectParity | None
) -> None:
    """Write image.png, image.rgb, logits.f32, expected.json and the programs that the format has.

    file: name of the exported file, in the folder above. Expected are the logits of the model in float; the tolerance
    is the bound of the precision, for int8 half as much again as parity found, or none where it could not be run. Of
    segmentation, classes.png is expected, of detection boxes, and the program is in Python alone; there is none for a
    part of a network.
    """
    if metadata.gives_maps:
        return
    folder.mkdir()
    if metadata.task == "detect":
        _write_objects(folder, file, format_name, model, metadata, parity)
        return
    assert not isinstance(parity, ObjectParity)
    if metadata.task == "segment":
        _write_dense(folder, file, format_name, model, metadata, parity)
        return
    p, taken = metadata.preprocess, int(metadata.takes_pixels)
    photograph = real_images()[PHOTOGRAPH]
    image = preprocess(photograph, p)
    with torch.inference_mode():
        logits = model(torch.from_numpy(image[None])).numpy()[0]
    tolerance = None
    if parity is not None:
        tolerance = parity.bound.relative * parity.size if parity.bound else 1.5 * parity.max_abs
    shown = np.asarray(photograph) if metadata.takes_pixels else pixels(image, p)
    Image.fromarray(shown).save(folder / "image.png")
    (folder / "image.rgb").write_bytes(shown.tobytes())
    (folder / "logits.f32").write_bytes(logits.astype("<f4").tobytes())
    expected = {
        "size": list(shown.shape[:2]),
        "mean": p.mean,
        "std": p.std,
        "labels": metadata.labels,
        "tolerance": tolerance,
        "logits": [float(value) for value in logits],
    }
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
    height, width = shown.shape[:2]
    shape = "1, -1, -1, 3" if metadata.takes_pixels else f"1, 3, {height}, {width}"
    hint = HINTS[metadata.precision]
    file = json.dumps(file)[1:-1]  # as a string of Python, JavaScript and C++ has it
    if format_name in PYTHON:
        python = PYTHON[format_name]
        run = Template(python.run).substitute(hint=hint, shape=shape)
        _fill(
            "python",
            folder / "run.py",
            file=file,
            packages=python.packages,
            imports=python.imports,
            image=PYTHON_IMAGE[taken],
            run=run,
        )
    if format_name == "onnx":
        _fill("javascript", folder / "run.mjs", file=file, image=JAVASCRIPT_IMAGE[taken])
    if format_name == "openvino":
        _fill(
            "cpp",
            folder / "run.cpp",
            file=file,
            height=str(height),
            width=str(width),
            shape=shape,
            image=Template(CPP_IMAGE[taken]).substitute(
                mean=", ".join(f"{value}f" for value in map(float, p.mean)),
                std=", ".join(f"{value}f" for value in map(float, p.std)),
            ),
            tolerance=f"{-1.0 if tolerance is None else tolerance}f",
            hint=f"ov::element::{hint}",
        )


def _write_dense(
    folder: Path, file: str, format_name: str, model: Network, metadata: Metadata, parity: Parity | None
) -> None:
    """The same of segmentation: where nine of ten pixels or more have the class that is expected, it is right.

    In int8 half as many again may differ as parity found.
    """
    p = metadata.preprocess
    shown = real_images()[PHOTOGRAPH].resize((p.image_size, p.image_size), Image.Resampling.BICUBIC)
    with torch.inference_mode():
        network = as_exported(model, metadata)
        found = network(torch.from_numpy(normalise(np.asarray(shown), p)[None]))[0]
    classes = found if metadata.gives_classes else found.argmax(0)
    least = 0.0
    if parity is not None:
        least = parity.bound.agreement if parity.bound else 100 - 1.5 * (100 - parity.top1_agreement)
        least = min(least, 90.0) if not parity.live else least
    shown.save(folder / "image.png")
    Image.fromarray(classes.numpy().astype(np.uint8)).save(folder / "classes.png")
    expected = {"mean": p.mean, "std": p.std, "labels": metadata.labels, "least": least}
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
    if format_name in PYTHON:
        python, side = PYTHON[format_name], p.image_size
        run = Template(python.run).substitute(hint=HINTS[metadata.precision], shape=f"1, 3, {side}, {side}")
        _fill(
            "python_classes",
            folder / "run.py",
            file=json.dumps(file)[1:-1],
            packages=python.packages,
            imports=python.imports,
            image=PYTHON_IMAGE[0],
            run=run.replace('["logits"]', f'["{"classes" if metadata.gives_classes else "logits"}"]'),
        )


def _write_objects(
    folder: Path,
    file: str,
    format_name: str,
    model: Network,
    metadata: Metadata,
    parity: Parity | ObjectParity | None,
) -> None:
    """The same of detection, on a scene: objects are those expected by the bounds that parity was held to."""
    p, least = metadata.preprocess, 0.0
    image, _ = prepared(Image.fromarray(compose("val", 0).image), metadata)
    with torch.inference_mode():
        (found,) = as_arrays(as_asked(model)(torch.from_numpy(image)))
    bound = LOOSEST
    if isinstance(parity, ObjectParity) and parity.live:
        bound = parity.bound or LOOSEST
        least = bound.agreement if parity.bound else max(0.0, 100 - 2 * (100 - parity.agreement))
    Image.fromarray(pixels(image[0], p)).save(folder / "image.png")
    expected = {
        "mean": p.mean,
        "std": p.std,
        "names": metadata.labels,
        **{name: found[name].tolist() for name in ("boxes", "labels", "scores")},
        "overlap": bound.overlap,
        "score": bound.score,
        "least": 0.9 * least / 100,  # of one image
    }
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
    if format_name in OBJECTS:
        python, (more, run) = PYTHON[format_name], OBJECTS[format_name]
        _fill(
            "python_objects",
            folder / "run.py",
            file=json.dumps(file)[1:-1],
            packages=python.packages + " torchvision" * bool(more),
            imports=python.imports + more,
            image=PYTHON_IMAGE[0],
            run=Template(run).substitute(hint=HINTS[metadata.precision]),
        )


def _fill(template: str, path: Path, **values: str) -> None:
    text = (resources.files("nextvit.exporters") / "snippets" / f"{template}.txt").read_text(encoding="utf-8")
    path.write_text(Template(text).substitute(values), encoding="utf-8")
