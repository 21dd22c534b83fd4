"""`make demo-segment`: the whole line for segmentation, on scenes made of the images that ship with the package."""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nextvit import plots, report
from nextvit.benchmark import Row, benchmark
from nextvit.create import open_checkpoint
from nextvit.data.masks import MaskSplit, mask_split
from nextvit.demo import begun_anew, file_cells, last_parts, latency_parts, step, training_parts
from nextvit.devices import cpu_count
from nextvit.errors import exit_code
from nextvit.evaluate import MaskEvaluation, evaluate_masks
from nextvit.exporters.export import ExportReport, export
from nextvit.metrics import PixelConfusion
from nextvit.recipe import read_recipe
from nextvit.run import Machine
from nextvit.runtime.open import open_session
from nextvit.runtime.predictor import Predictor
from nextvit.runtime.session import Session
from nextvit.runtime.torch_session import TorchSession
from nextvit.tasks.segment import Segmentation, palette
from nextvit.train import train

SHOWN = 8  # scenes
MOST_LOST = 1.0  # points of mIoU, in int8


def main(weights: Path, run: Path) -> None:
    """Fine-tune, evaluate, export, quantise, check, measure, report; everything lies in the folder `run` afterwards.

    weights: of a classifier of garments, as `make demo` leaves them.
    """
    begin = time.perf_counter()
    recipe = read_recipe("demo_segment", [f"weights={weights}"])
    threads = cpu_count()
    begun_anew(run)
    torch.set_num_threads(threads)

    with step("train nextvit_nano with Semantic FPN on scenes of garments, from the classifier's weights"):
        validation = train("demo", recipe, run, machine=Machine(threads=threads))
        report.write_run_plots(run, validation)
    model = open_checkpoint(run / "model.safetensors")
    split = mask_split("demo", "val", model.metadata.labels)

    with step("evaluate; export to ONNX, OpenVINO and OpenVINO in int8, compare, evaluate the files"):
        eager = TorchSession(model, device="cpu", threads=threads, precision="fp32", kind="eager")
        result = evaluate_masks(eager, split, model.metadata, boundary=True)
        scores = {"torch, eager": result}
        exports: list[ExportReport] = []
        sessions: list[tuple[str, Session]] = [("eager", eager)]
        for name, precision in (("model.onnx", "fp32"), ("model.xml", "fp32"), ("model-int8.xml", "int8")):
            images = "demo" if precision == "int8" else None
            exports.append(export(model, run / name, precision=precision, calibration=images, max_drop=MOST_LOST))
            sessions.append((name, open_session(run / name, device="cpu", threads=threads)))
            scores[name] = evaluate_masks(sessions[-1][1], split, model.metadata, boundary=True)
        write_samples(split, Predictor(sessions[-1][1]), run / "plots" / "samples.png")

    with step("measure latency"):
        rows = benchmark(sessions)
        report.write_latency(rows, run / "plots" / "latency.csv")

    seconds = time.perf_counter() - begin
    page = run / "report.html"
    write_report(page, run, scores, background_alone(split), exports, rows, seconds)
    print(f"mIoU of nextvit_nano with Semantic FPN: {result.metrics.miou:.1f} %, ", end="")
    print(f"all background {background_alone(split).miou:.1f} %, {len(split)} scenes")
    for e in exports:
        print(f"{e.path}: mIoU {scores[Path(e.path).name].metrics.miou:.1f} %, ", end="")
        print(f"{e.checked.top1_agreement:.2f} % of the pixels as the model has them")
    print("\n".join(report.latency_lines(rows)))
    print(f"done in {seconds:.0f} s; the report: {page}")
    print("next, for a folder of your own with images and masks:")
    print("  .venv/bin/nextvit train FOLDER --task segment --output runs/mine")


def background_alone(split: MaskSplit) -> PixelConfusion:
    """What the answer that nothing is there gets."""
    metrics = PixelConfusion(len(split.labels))
    for index in range(len(split)):
        _, labels = split.labelled(index)
        metrics.update(np.zeros_like(labels), labels)
    return metrics


def write_samples(split: MaskSplit, predictor: Predictor, path: Path) -> None:
    """An even selection of the split: the image, its truth, the answer, and the answer over the image."""
    pictures: list[Image.Image] = []
    captions: list[tuple[str, bool]] = []
    for index in np.linspace(0, len(split) - 1, SHOWN).astype(int).tolist():
        image, labels = split.labelled(index)
        answer = predictor.segment(image)
        pictures += [image, Segmentation(labels, split.labels).image(), answer.image(), answer.overlay(image)]
        right = 100 * float((answer.classes == labels).mean())
        captions += [(text, True) for text in ("image", "truth", f"int8: {right:.0f} % right", "laid over")]
    colours = dict(zip(split.labels, palette(len(split.labels)).tolist(), strict=True))
    plots.samples([picture.convert("RGB") for picture in pictures], captions, path, legend=colours)


def write_report(
    page: Path,
    run: Path,
    scores: dict[str, MaskEvaluation],
    trivial: PixelConfusion,
    exports: list[ExportReport],
    rows: list[Row],
    seconds: float,
) -> None:
    """report.html: what was measured, with its plots inside."""
    result = scores["torch, eager"]
    m, folder = result.metrics, run / "plots"
    quantised = exports[-1]
    assert quantised.accuracy is not None
    classes = [
        {"class": label, "IoU": "-" if iou is None else f"{iou:.1f} %", "all background": f"{base or 0:.1f} %"}
        for label, iou, base in zip(result.split.labels, m.ious, trivial.ious, strict=True)
    ]
    files = [
        {
            "file": name,
            "mIoU": f"{score.metrics.miou:.2f} %",
            "boundary mIoU": f"{score.metrics.boundary_miou:.2f} %",
            "pixel accuracy": f"{score.metrics.accuracy:.2f} %",
        }
        for name, score in scores.items()
    ]
    parity = [
        {
            **file_cells(e, e.checked.setup),
            "largest difference": f"{e.checked.max_abs:.1e}",
            "relative": f"{e.checked.relative:.1e}",
            "pixels of the same class": f"{e.checked.top1_agreement:.2f} %",
        }
        for e in exports
    ]
    parts = [
        report.paragraph(f"{m.miou:.1f} %", "big"),
        report.paragraph(
            f"mIoU of nextvit_nano with Semantic FPN on {len(result.split)} scenes of garments and photographs that "
            "it never saw, fine-tuned from a classifier of garments. Saying background everywhere gets "
            f"{trivial.miou:.1f} %, and {trivial.accuracy:.1f} % of the pixels; the network has {m.accuracy:.1f} % of "
            "them. The epoch was chosen on these scenes: the last one that is not clearly worse than the best."
        ),
        report.picture(folder / "samples.png", "scenes, truth and answers"),
        report.html_table(classes),
        *training_parts(run),
        report.picture(folder / "confusion.png", "confusion matrix of pixels"),
        report.heading("The exported files answer as the model does"),
        report.html_table(parity),
        report.html_table(files),
        report.paragraph(
            f"int8, on the centres of {quantised.accuracy.images} scenes: mIoU, "
            f"{report.lost(quantised.accuracy.drop)}; {len(quantised.float_layers)} layers are left in float."
        ),
        *latency_parts(run, rows),
        *last_parts(
            seconds,
            "nextvit train FOLDER --task segment --output runs/mine",
            "nextvit eval runs/mine/model.safetensors FOLDER",
            "nextvit export runs/mine/model.safetensors --to onnx",
            "nextvit predict runs/mine/model.safetensors IMAGE... --save-masks masks",
        ),
    ]
    report.write_html(page, "Next-ViT, segmentation, from images to a deployed model", parts)


if __name__ == "__main__":
    places = [Path(argument) for argument in sys.argv[1:]] or [
        Path("runs/demo/model.safetensors"),
        Path("runs/segment"),
    ]
    sys.exit(exit_code(lambda: main(*places), debug=False))
