"""Few images: fine-tuning after other classes beside training from scratch, with five seeds.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 python benchmarks/finetune.py --output finetune.csv

nextvit_nano learns five classes of the garments that ship with the package, from all their images. The other five then
have 20 images each, as `--recipe finetune` takes them: once from those weights, once from random ones. Both are counted
on 1,000 held-out images of the five, that chose nothing.
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
    parser.add_argument("--rates", nargs="+", type=float, default=[None], help="instead of the recipe's own")
    parser.add_argument("--epochs", type=int, default=6, help="on the first five classes")
    parser.add_argument("--output", type=Path, default=Path("finetune.csv"))
    flags = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as place:
        root, machine = Path(place), Machine(workers=0)
        large, few = write(root / "large", "train", True, None), write(root / "few", "train", False, FEW)
        for split, source in (("train", "train"), ("val", "train"), ("test", "val")):
            write(root / "held-out" / split, source, False, None)
        train(large, read_recipe("demo", [f"schedule.epochs={flags.epochs}"]), root / "before", machine=machine)
        for seed in flags.seeds:
            for weights in (str(root / "before" / "model.safetensors"), "none"):
                for rate in flags.rates:
                    chosen = [*SIZE, f"weights={weights}", f"seed={seed}", "model=nextvit_nano"]
                    chosen += [f"optimizer.lr={rate}"] * (rate is not None)
                    run = root / f"{seed}-{rate}-{weights == 'none'}"
                    recipe = read_recipe("finetune", chosen)
                    train(few, recipe, run, machine=machine)
                    start = "random weights" if weights == "none" else "five other classes"
                    score = round(top1(run, root / "held-out"), 2)
                    rows.append({"start": start, "seed": seed, "rate": rate or "recipe's", "top1": score})
                    write_rows(flags.output, rows)
                    print(rows[-1], flush=True)
    for start in dict.fromkeys(row["start"] for row in rows):
        for rate in dict.fromkeys(row["rate"] for row in rows):
            scores = [row["top1"] for row in rows if (row["start"], row["rate"]) == (start, rate)]
            print(f"{start}, rate {rate}: top-1 {np.mean(scores):.2f} +- {np.std(scores, ddof=1):.2f} %")
