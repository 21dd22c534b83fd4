"""`make demo`: the whole line on the images that ship with the package, and a report of what was measured."""

import csv
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nextvit import __version__, plots, report
from nextvit.benchmark import Row, benchmark
from nextvit.create import open_classifier
from nextvit.data.images import read_image
from nextvit.data.loader import batches, eval_transform
from nextvit.data.sets import read_split
from nextvit.data.split import Split
from nextvit.devices import cpu_count
from nextvit.errors import exit_code
from nextvit.evaluate import Evaluation, evaluate
from nextvit.exporters.export import ExportReport, export
from nextvit.metrics import TopK
from nextvit.progress import say
from nextvit.recipe import read_recipe
from nextvit.run import Machine
from nextvit.runtime.open import open_session
from nextvit.runtime.predictor import Predictor
from nextvit.runtime.session import Session, Setup
from nextvit.runtime.torch_session import TorchSession
from nextvit.train import train

SHOWN = 32  # sample predictions


def main(run: Path) -> None:
    """Train, evaluate, fold, export, check, measure, report; everything lies in the folder `run` afterwards."""
    begin = time.perf_counter()
    recipe = read_recipe("demo")
    threads = cpu_count()
    begun_anew(run)
    torch.set_num_threads(threads)

    with step("train nextvit_nano on the shipped garments"):
        validation = train("demo", recipe, run, machine=Machine(threads=1 if threads == 2 else threads))
        report.write_run_plots(run, validation)
    best = run / "model.safetensors"
    model = open_classifier(best)
    test = read_split("demo", "test", model.metadata.labels)

    with step("evaluate on held-out images; a linear model beside it"):
        torch.set_num_threads(threads)
        predictor = Predictor(TorchSession(model, device="cpu", threads=threads, precision="fp32"))
        result, logits = evaluate_keeping_logits(predictor, test)
        linear = linear_model(read_split("demo", "train"), test)
        report.write_confusion(result, run / "plots" / "confusion-test.png", "held-out images")
        write_samples(test, logits, run / "plots" / "samples.png")

    exports: list[ExportReport] = []
    scores = {"torch, folded": result}
    with step("fold, export to ONNX and OpenVINO, compare on real images, evaluate the files"):
        for suffix in (".onnx", ".xml"):
            path = run / f"model{suffix}"
            exports.append(export(model, path))
            exported = Predictor(open_session(path, device="cpu", threads=threads))
            scores[exported.session.setup.runtime], _ = evaluate_keeping_logits(exported, test)

    with step("measure latency: eager, folded, ONNX Runtime, OpenVINO"):
        sessions: list[tuple[str, Session]] = [
            ("eager", TorchSession(model, device="cpu", threads=threads, precision="fp32", kind="eager")),
            ("folded", predictor.session),
            *((Path(e.path).name, open_session(e.path, device="cpu", threads=threads)) for e in exports),
        ]
        rows = benchmark(sessions, image_size=224)
        report.write_latency(rows, run / "plots" / "latency.csv")

    seconds = time.perf_counter() - begin
    page = run / "report.html"
    write_report(page, run, result, linear, exports, scores, rows, seconds)
    m, base = result.metrics, linear
    print(f"held-out top-1: nextvit_nano {m.top1:.1f} % (standard error {m.standard_error:.1f}), ", end="")
    print(f"a linear model {base.top1:.1f} % ({base.standard_error:.1f}), {m.images} images")
    for e in exports:
        print(
            f"{e.path}: {e.checked.relative:.0e} relative difference, {e.checked.top1_agreement:.1f} % same first label"
        )
    print("\n".join(report.latency_lines(rows)))
    print(f"done in {seconds:.0f} s; the report: {page}")
    print("next, for a folder of your own with a folder of images for each class:")
    print("  .venv/bin/nextvit train FOLDER --output runs/mine")
    print("  .venv/bin/nextvit export runs/mine/model.safetensors --to onnx")


def begun_anew(run: Path) -> None:
    """An earlier demo's folder goes away."""
    if (run / "recipe.yaml").exists():
        shutil.rmtree(run)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    say(f"== {what}")
    start = time.perf_counter()
    yield
    say(f"   {time.perf_counter() - start:.0f} s")


def evaluate_keeping_logits(predictor: Predictor, split: Split) -> tuple[Evaluation, np.ndarray]:
    """An evaluation, and all logits (images, classes) in the order of the split."""
    kept: list[np.ndarray] = []

    def run(images: np.ndarray) -> np.ndarray:
        kept.append(predictor.run(images))
        return kept[-1]

    source = batches(split, eval_transform(predictor.metadata), batch_size=50)
    return evaluate(run, source, split, total=-(-len(split) // 50)), np.concatenate(kept)


def linear_model(training: Split, test: Split) -> TopK:
    """Multinomial logistic regression on the pixels, the yardstick of the garments: L-BFGS, weight decay 1e-3."""

    def pixels(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        grey = [np.asarray(read_image(file).convert("L"), np.float32).ravel() / 255 for file in split.files]
        return torch.from_numpy(np.stack(grey)), torch.tensor(split.targets)

    images, targets = pixels(training)
    layer = nn.Linear(images.shape[1], len(training.labels))
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer(images), targets) + 1e-3 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    images, targets = pixels(test)
    metrics = TopK(len(test.labels))
    with torch.inference_mode():
        metrics.update(layer(images).numpy(), targets.numpy())
    return metrics


def write_samples(split: Split, logits: np.ndarray, path: Path) -> None:
    """Pictures of an even selection of the split, each with its answer."""
    chosen = np.linspace(0, len(split) - 1, SHOWN).astype(int)
    captions = []
    for index in chosen:
        answer, truth = split.labels[logits[index].argmax()], split.labels[split.targets[index]]
        captions.append((answer if answer == truth else f"{answer}\nnot {truth}", answer == truth))
    plots.samples([read_image(split.files[i]) for i in chosen], captions, path)


def write_report(
    page: Path,
    run: Path,
    result: Evaluation,
    linear: TopK,
    exports: list[ExportReport],
    scores: dict[str, Evaluation],
    rows: list[Row],
    seconds: float,
) -> None:
    """report.html: what was measured, with its plots inside."""
    m = result.metrics
    parity = [
        {
            **file_cells(e, e.checked.setup),
            "inputs": e.checked.images,
            "largest difference": f"{e.checked.max_abs:.1e}",
            "mean": f"{e.checked.mean_abs:.1e}",
            "relative": f"{e.checked.relative:.1e}",
            "same first label": f"{e.checked.top1_agreement:.1f} %",
            "spread over images": f"{e.checked.spread:.2f}",
        }
        for e in exports
    ]
    accuracy = [
        {
            "runtime": name,
            "top-1": f"{s.metrics.top1:.2f} %",
            "top-5": f"{s.metrics.top5:.2f} %",
            "loss": f"{s.metrics.loss:.4f}",
        }
        for name, s in scores.items()
    ]
    folder = run / "plots"
    parts = [
        report.paragraph(f"{m.top1:.1f} %", "big"),
        report.paragraph(
            f"top-1 of nextvit_nano, trained from scratch, on {m.images} garment photographs it never saw; one "
            f"standard error is {m.standard_error:.1f} points. A linear model on the pixels gets {linear.top1:.1f} % "
            f"(standard error {linear.standard_error:.1f}). The epoch was chosen on a part of the training set."
        ),
        report.picture(folder / "samples.png", "sample predictions"),
        *training_parts(run),
        report.heading("Held-out images"),
        report.picture(folder / "confusion-test.png", "confusion matrix"),
        report.heading("The exported files answer as the model does"),
        report.paragraph(
            "Compared on photographs and garments, at several sizes and batches: batch, height, width stay free."
        ),
        report.html_table(parity),
        report.html_table(accuracy),
        *latency_parts(run, rows),
        *last_parts(
            seconds,
            "nextvit train FOLDER --output runs/mine",
            "nextvit eval runs/mine/model.safetensors FOLDER",
            "nextvit export runs/mine/model.safetensors --to onnx",
            "nextvit predict runs/mine/model.safetensors IMAGE...",
        ),
    ]
    report.write_html(page, "Next-ViT, from images to a deployed model", parts)


# ---- what the reports of all tasks have ------------------------------------------------------------------------------


def training_parts(run: Path) -> list[str]:
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        epochs = [{key: f"{float(value):.5g}" for key, value in row.items()} for row in csv.DictReader(file)]
    curves = report.picture(run / "plots" / "curves.png", "learning curves")
    return [report.heading("Training"), curves, report.html_table(epochs)]


def file_cells(exported: ExportReport, setup: Setup) -> dict[str, object]:
    """What a table of exported files begins with. setup: that it was checked by."""
    return {
        "file": Path(exported.path).name,
        "megabytes": f"{exported.bytes / 1e6:.1f}",
        "checked by": f"{setup.runtime}, {setup.precision}",
    }


def latency_parts(run: Path, rows: list[Row]) -> list[str]:
    wait = os.environ.get("OMP_WAIT_POLICY", "not set")
    note = f"Interleaved rounds on this machine; OMP_WAIT_POLICY {wait}. Only ratios within this run can be compared."
    return [
        report.heading("Latency"),
        report.picture(run / "plots" / "latency.png", "latency"),
        report.html_table(report.latency_records(rows)),
        report.paragraph(note, "note"),
    ]


def last_parts(seconds: float, *commands: str) -> list[str]:
    return [
        report.heading("Next: a folder of your own"),
        report.preformatted("\n".join(commands)),
        report.paragraph(f"nextvit {__version__}, torch {torch.__version__}, made in {seconds:.0f} s.", "note"),
    ]


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")), debug=False))
