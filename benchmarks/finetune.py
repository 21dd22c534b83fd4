"""Few images: fine-tuning after other classes beside training from scratch, with five seeds.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 python benchmarks/finetune.py --output finetune.csv

nextvit_nano learns five classes of the garments that ship with the package, from all their images, augmented as
in1k_300e augments. The other five then have 20 images each, 16 to train on and 4 to validate, as `--recipe finetune`
takes them: once from those weights, once from random ones. Both are counted on the 1,000 held-out images of the five,
that chose nothing.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from nextvit.create import open_checkpoint
from nextvit.data.demo_images import garments
from nextvit.data.loader import batches, eval_transform
from nextvit.data.sets import read_split
from nextvit.evaluate import evaluate
from nextvit.files import write_rows
from nextvit.recipe import read_recipe
from nextvit.run import Machine
from nextvit.train import train

FIRST = ("t-shirt", "trouser", "coat", "sandal", "bag")
FEW = 20
PRETRAINING = [
    *("images.crop_area=0.35", "images.crop_aspect=1.333", "images.randaugment=rand-m9-mstd0.5-inc1"),
    *("mixing.mixup=0.8", "mixing.cutmix=1.0", "label_smoothing=0.1"),
]
SIZE = ["images.size=32", "images.crop=1.0"]


def write(folder: Path, split: str, first: bool, count: int | None) -> Path:
    for label, tiles in garments(split).items():
        if (label in FIRST) == first:
            (folder / label).mkdir(parents=True)
            for index, tile in enumerate(tiles[:count]):
                tile.save(folder / label / f"{index:04}.png")
    return folder


def top1(run: Path, test: Path) -> float:
    model = open_checkpoint(run / "model.safetensors").eval()
    split = read_split(test, "test", model.metadata.labels)

    def forward(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    source = batches(split, eval_transform(model.metadata), batch_size=100)
    return evaluate(forward, source, split, total=-(-len(split) // 100)).metrics.top1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--pretraining-epochs", type=int, default=15)
    parser.add_argument("--epochs", type=int, help="with 20 images a class; left out: as the recipe decides")
    parser.add_argument("--output", type=Path, default=Path("finetune.csv"))
    flags = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as place:
        root, machine = Path(place), Machine(workers=0)
        large, few = write(root / "large", "train", True, None), write(root / "few", "train", False, FEW)
        for split, source in (("train", "train"), ("val", "train"), ("test", "val")):
            write(root / "held-out" / split, source, False, None)
        pretraining = read_recipe("demo", [f"schedule.epochs={flags.pretraining_epochs}", *PRETRAINING])
        train(large, pretraining, root / "before", machine=machine)
        starts = {"five other classes": str(root / "before" / "model.safetensors"), "random weights": "none"}
        for seed in flags.seeds:
            for start, weights in starts.items():
                chosen = [*SIZE, f"weights={weights}", f"seed={seed}", "model=nextvit_nano"]
                chosen += [] if flags.epochs is None else [f"schedule.epochs={flags.epochs}"]
                run = root / f"{start} {seed}"
                train(few, read_recipe("finetune", chosen), run, machine=machine)
                rows.append({"start": start, "seed": seed, "top1": round(top1(run, root / "held-out"), 2)})
                write_rows(flags.output, rows)
                print(rows[-1], flush=True)
    for start in starts:
        scores = [row["top1"] for row in rows if row["start"] == start]
        spread = f" +- {np.std(scores, ddof=1):.2f}" if len(scores) > 1 else ""
        print(f"{start}: top-1 {np.mean(scores):.2f}{spread} %")
