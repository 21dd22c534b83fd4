"""nextvit_nano beside timm's networks of about its cost: from random weights, one recipe, equal epochs, three seeds.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 python benchmarks/peers.py --output peers.csv

Trains on the 7,500 garments that ship with the package, and counts on the 2,000 held-out ones after the last epoch:
no epoch is chosen by what is reported. A row that is in the file already is not computed again.
"""

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import nextvit
from nextvit.augmentation import Normalise, sample_transform, smoothed
from nextvit.data.loader import batches, eval_transform
from nextvit.data.sets import read_split
from nextvit.evaluate import evaluate
from nextvit.files import write_rows
from nextvit.metadata import Metadata, Preprocess
from nextvit.optimization import learning_rate
from nextvit.progress import track
from nextvit.recipe import Recipe, read_recipe

MODELS = ("nextvit_nano", "resnet10t", "mobilenetv2_140", "pvt_v2_b0")


def network(name: str, classes: int) -> nn.Module:
    if name.startswith("nextvit"):
        return nextvit.create_model(name, num_classes=classes, drop_path_rate=0.0)
    return timm.create_model(name, num_classes=classes).to(memory_format=torch.channels_last)


def cost(model: nn.Module) -> tuple[int, float]:
    """Parameters, and multiply-adds at 224 pixels in 1e9."""
    params = sum(p.numel() for p in model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, 224, 224))
    return params, counter.get_total_flops() / 2e9


def train(model: nn.Module, recipe: Recipe, preprocess: Preprocess) -> float:
    """Seconds that all epochs took."""
    split = read_split("demo", "train")
    decay, rest = ([p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
    groups = [{"params": decay, "weight_decay": recipe.optimizer.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.optimizer.peak, fused=True)
    transform, normalise = sample_transform(recipe.images, preprocess), Normalise(preprocess, torch.device("cpu"))
    epochs, steps = recipe.schedule.epochs, len(split) // recipe.batch_size
    begun = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        order = split.order(recipe.seed, epoch)[: steps * recipe.batch_size]
        source = batches(split, transform, batch_size=recipe.batch_size, order=order, seed=(recipe.seed, epoch))
        for step, batch in enumerate(track(source, total=steps, label=f"epoch {epoch + 1} of {epochs}", unit="steps")):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch + step / steps, epochs, recipe)
            optimizer.zero_grad()
            targets = smoothed(batch.targets, len(split.labels), recipe.label_smoothing)
            F.cross_entropy(model(normalise(batch.images)), targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm)
            optimizer.step()
    return time.perf_counter() - begun


def row(name: str, seed: int, epochs: int) -> dict[str, object]:
    recipe = read_recipe("demo", [f"schedule.epochs={epochs}", f"seed={seed}"])
    test = read_split("demo", "test")
    preprocess = Preprocess(image_size=recipe.images.size, crop=1.0)
    metadata = Metadata("nextvit_nano", num_classes=len(test.labels), preprocess=preprocess)
    torch.manual_seed(seed)
    model = network(name, len(test.labels))
    params, macs = cost(model)
    seconds = train(model, recipe, preprocess)
    model.eval()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    m = evaluate(run, batches(test, eval_transform(metadata), batch_size=100), test, total=20).metrics
    return {
        "model": name,
        "seed": seed,
        "epochs": epochs,
        "params_million": round(params / 1e6, 2),
        "gmacs_224": round(macs, 2),
        "top1": round(m.top1, 2),
        "loss": round(m.loss, 4),
        "train_seconds": round(seconds),
    }


def resumed(path: Path, asked: Sequence[dict[str, object]], row: Callable[..., dict[str, object]]) -> list:
    """The rows of a CSV file, with one for each of `asked`, which are its first columns; what is there is kept."""
    rows: list = []
    if path.exists():
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    for values in asked:
        if not any(all(found[key] == str(value) for key, value in values.items()) for found in rows):
            rows.append({key: str(value) for key, value in row(*values.values()).items()})
            write_rows(path, rows)
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path("peers.csv"))
    flags = parser.parse_args()
    asked = [{"model": name, "seed": seed, "epochs": flags.epochs} for seed in flags.seeds for name in flags.models]
    rows = resumed(flags.output, asked, row)
    for name in flags.models:
        scores = [float(r["top1"]) for r in rows if r["model"] == name and int(r["epochs"]) == flags.epochs]
        print(f"{name:18} top-1 {np.mean(scores):.2f} +- {np.std(scores, ddof=1) if len(scores) > 1 else 0:.2f} %")
