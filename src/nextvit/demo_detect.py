"""`make demo-detect`: the whole line for detection, on scenes made of the images that ship with the package."""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nextvit import plots, report
from nextvit.benchmark import Row, benchmark
from nextvit.create import open_checkpoint
from nextvit.data.objects import ObjectSplit, object_split
from nextvit.data.scenes import scenes_folder
from nextvit.demo import begun_anew, file_cells, last_parts, latency_parts, step, training_parts
from nextvit.devices import cpu_count
from nextvit.errors import exit_code
from nextvit.evaluate import ObjectEvaluation, evaluate_objects
from nextvit.exporters.export import ExportReport, export
from nextvit.exporters.object_parity import ObjectParity
from nextvit.recipe import read_recipe
from nextvit.run import Machine
from nextvit.runtime.open import open_session
from nextvit.runtime.predictor import Predictor
from nextvit.runtime.session import Session
from nextvit.runtime.torch_session import TorchSession
from nextvit.tasks.detect import SURE, Detections
from nextvit.train import train

SCENES = (800, 60)  # to train on, and to judge by: a detector takes longer than other networks
SHOWN = 8  # scenes
MOST_LOST = 2.0  # points of box AP, in int8


def main(weights: Path, run: Path) -> None:
    """Fine-tune, evaluate, export, quantise, check, measure, report; everything lies in the folder `run` afterwards.

    weights: of a classifier of garments, as `make demo` leaves them.
    """
    begin = time.perf_counter()
    recipe = read_recipe("demo_detect", [f"weights={weights}"])
    threads = cpu_count()
    begun_anew(run)
    torch.set_num_threads(threads)
    data = str(scenes_folder(*SCENES) / "coco")

    with step("train nextvit_nano with Mask R-CNN on scenes of garments, from the classifier's weights"):
        result = train(data, recipe, run, machine=Machine(threads=threads))
        assert isinstance(result, ObjectEvaluation)
        report.write_run_plots(run, result)
    model = open_checkpoint(run / "model.safetensors")
    split = object_split(data, "val", model.metadata.labels)

    with step("export to ONNX, and to OpenVINO in int8; compare; evaluate the files"):
        eager = TorchSession(model, device="cpu", threads=threads, precision="fp32", kind="eager")
        scores = {"torch, eager": result}
        exports: list[ExportReport] = []
        sessions: list[tuple[str, Session]] = [("eager", eager)]
        for name, precision in (("model.onnx", "fp32"), ("model-int8.xml", "int8")):
            images = data if precision == "int8" else None
            exports.append(export(model, run / name, precision=precision, calibration=images, max_drop=MOST_LOST))
            sessions.append((name, open_session(run / name, device="cpu", threads=threads)))
            scores[name] = evaluate_objects(sessions[-1][1], split, model.metadata)
        write_samples(split, Predictor(sessions[-1][1]), run / "plots" / "samples.png")

    with step("measure latency"):
        rows = benchmark(sessions)
        report.write_latency(rows, run / "plots" / "latency.csv")

    seconds = time.perf_counter() - begin
    page = run / "report.html"
    write_report(page, run, scores, exports, rows, seconds)
    print(f"nextvit_nano with Mask R-CNN: {result.told}, {len(split)} scenes")
    for e in exports:
        print(f"{e.path}: {scores[Path(e.path).name].told}")
    print("\n".join(report.latency_lines(rows)))
    print(f"done in {seconds:.0f} s; the report: {page}")
    print("next, for a folder of your own in COCO's layout:")
    print("  .venv/bin/nextvit train FOLDER --task detect --output runs/mine")


def write_samples(split: ObjectSplit, predictor: Predictor, path: Path) -> None:
    """An even selection of the split: the truth over the image, and the answer."""
    pictures: list[Image.Image] = []
    captions: list[tuple[str, bool]] = []
    for index in np.linspace(0, len(split) - 1, SHOWN).astype(int).tolist():
        image, objects = split.labelled(index)
        answer = predictor.detect(image)
        truth = Detections(
            boxes=objects.boxes,
            classes=objects.labels,
            scores=np.ones(len(objects), np.float32),
            masks=np.zeros((len(objects), 28, 28), np.float32),
            labels=split.labels,
            size=(image.height, image.width),
        )
        pictures += [truth.drawn(image), answer.drawn(image, SURE)]
        captions += [
            (f"truth: {len(objects)}", True),
            (f"int8: {int((answer.scores >= SURE).sum())} above {SURE:.0%}", True),
        ]
    plots.samples(pictures, captions, path, columns=4)


def write_report(
    page: Path,
    run: Path,
    scores: dict[str, ObjectEvaluation],
    exports: list[ExportReport],
    rows: list[Row],
    seconds: float,
) -> None:
    """report.html: what was measured, with its plots inside."""
    result, folder = scores["torch, eager"], run / "plots"
    box, mask = (result.metrics.scores[kind] for kind in ("box", "mask"))
    quantised = exports[-1]
    assert quantised.accuracy is not None
    classes = [
        {"class": label, "box AP": _percent(a), "mask AP": _percent(b)}
        for label, a, b in zip(result.split.labels, box.per_class, mask.per_class, strict=True)
    ]
    files = [{"file": name, **row} for name, score in scores.items() for row in report.score_rows(score)]
    parity = []
    for e in exports:
        assert isinstance(e.parity, ObjectParity)
        agreeing = {"objects of the model": e.parity.detections, "the same": f"{e.parity.agreement:.2f} %"}
        parity.append(file_cells(e, e.parity.setup) | agreeing)
    parts = [
        report.paragraph(f"AP50 {_percent(box.ap50)}", "big"),
        report.paragraph(
            f"of the boxes, and AP {_percent(box.ap)}, by nextvit_nano with Mask R-CNN on {len(result.split)} scenes "
            "of garments and photographs that it never saw, fine-tuned from a classifier of garments. The epoch was "
            "chosen on these scenes: the last one that is not clearly worse than the best."
        ),
        report.picture(folder / "samples.png", "scenes, with their truth and with the int8 file's answers"),
        report.html_table(classes),
        report.html_table(files),
        report.picture(folder / "precision.png", "precision at each recall"),
        *training_parts(run),
        report.heading("The exported files answer as the model does"),
        report.html_table(parity),
        report.paragraph(
            f"int8, on {quantised.accuracy.images} scenes: box AP, {report.lost(quantised.accuracy.drop)}; "
            f"{len(quantised.float_layers)} layers are left in float. Of the same objects as the float model's an int8 "
            "file is asked for an overlap of a half."
        ),
        *latency_parts(run, rows),
        *last_parts(
            seconds,
            "nextvit data convert VOC_OR_YOLO --output mine",
            "nextvit train mine --task detect --output runs/mine",
            "nextvit export runs/mine/model.safetensors --to onnx",
            "nextvit predict runs/mine/model.onnx IMAGE... --save-images pictures",
        ),
    ]
    report.write_html(page, "Next-ViT, detection, from images to a deployed model", parts)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


if __name__ == "__main__":
    places = [Path(argument) for argument in sys.argv[1:]] or [Path("runs/demo/model.safetensors"), Path("runs/detect")]
    sys.exit(exit_code(lambda: main(*places), debug=False))
