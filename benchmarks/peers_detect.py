"""Mask R-CNN on nextvit_nano beside timm's ResNet-like networks of about its operations, on the shipped scenes.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 python benchmarks/peers_detect.py --output peers_detect.csv

Each is first a classifier of the garments that ship with the package, by the recipe of `make demo`, then the backbone
of a detector, by the recipe of `make demo-detect`: the same images, steps and seeds for all. AP is that of the epoch
that the run keeps, on scenes that none is trained on; by the first 60 of them each run has chosen its epoch. A row that
is in the file already is not computed again.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from peers import cost, network, resumed, train
from safetensors.torch import save_file

from nextvit.create import open_checkpoint
from nextvit.data.objects import object_split
from nextvit.data.scenes import scenes_folder
from nextvit.data.sets import read_split
from nextvit.demo_detect import SCENES
from nextvit.evaluate import evaluate_objects
from nextvit.foreign import TIMM
from nextvit.metadata import Preprocess
from nextvit.recipe import read_recipe
from nextvit.run import Machine
from nextvit.runtime.torch_session import TorchSession
from nextvit.train import train as fine_tune

DEMO = read_recipe("demo_detect")
MODELS = ("nextvit_nano", "regnetx_008", "resnet10t")


def row(name: str, seed: int, epochs: int, steps: int, scenes: int) -> dict[str, object]:
    classes = len(read_split("demo", "train").labels)
    recipe = read_recipe("demo", [f"schedule.epochs={epochs}", f"seed={seed}"])
    torch.manual_seed(seed)
    classifier = network(name, classes)
    params, macs = cost(classifier)
    train(classifier, recipe, Preprocess(image_size=recipe.images.size, crop=1.0))
    with tempfile.TemporaryDirectory() as place:
        weights = Path(place) / "classifier.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in classifier.state_dict().items()}, weights)
        model = name if name.startswith("nextvit") else TIMM + name
        values = {"model": model, "weights": weights, "seed": seed, "schedule.steps_per_epoch": steps}
        recipe = read_recipe("demo_detect", [f"{key}={value}" for key, value in values.items()])
        run = Path(place) / "run"
        begun = time.perf_counter()
        fine_tune(str(scenes_folder(*SCENES) / "coco"), recipe, run, machine=Machine(threads=torch.get_num_threads()))
        seconds = time.perf_counter() - begun
        detector = open_checkpoint(run / "model.safetensors")
    judged = object_split(str(scenes_folder(SCENES[0], scenes) / "coco"), "val", detector.metadata.labels)
    session = TorchSession(detector, device="cpu", threads=torch.get_num_threads(), precision="fp32")
    metrics = evaluate_objects(session, judged, detector.metadata).metrics
    box, mask = metrics.scores["box"], metrics.scores["mask"]
    return {
        "model": name,
        "seed": seed,
        "epochs": epochs,
        "steps": steps,
        "scenes": scenes,
        "params_million": round(params / 1e6, 2),
        "gmacs_224": round(macs, 2),
        "box_ap50": round(box.ap50, 1),
        "box_ap": round(box.ap, 1),
        "mask_ap50": round(mask.ap50, 1),
        "mask_ap": round(mask.ap, 1),
        "train_seconds": round(seconds),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=15, help="of the classifier")
    parser.add_argument(
        "--steps", type=int, default=DEMO.schedule.steps_per_epoch, help="of each epoch of the detector"
    )
    parser.add_argument("--scenes", type=int, default=200, help="to judge by")
    parser.add_argument("--output", type=Path, default=Path("peers_detect.csv"))
    flags = parser.parse_args()
    resumed(
        flags.output,
        [
            {"model": name, "seed": seed, "epochs": flags.epochs, "steps": flags.steps, "scenes": flags.scenes}
            for seed in flags.seeds
            for name in flags.models
        ],
        row,
    )
