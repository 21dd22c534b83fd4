"""Mask R-CNN on nextvit_small at 800 x 1280: exported files beside eager PyTorch and torchvision's own, and training.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 python benchmarks/detection.py

Weights are random, with nothing taken for background and the last layer of classes made so large that every network
finds a hundred objects, the most that they give, so that a hundred masks are computed. Files take any size; the
runtimes compile them for this one. torchvision's networks are its `maskrcnn_resnet50_fpn_v2`, and its Mask R-CNN on
ResNet101, whose BatchNorm has the statistics of the image: with its usual frozen ones random weights give values of
10^9, of which no box is made. The training step is the loss, backward and AdamW on two crops with as many boxes and
masks for both sides, beside torchvision's Mask R-CNN on the same backbone. Each table compares with its first row; a
ratio below 1 means less time.
"""

import argparse
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import nextvit
from nextvit.benchmark import benchmark
from nextvit.data.images import read_image
from nextvit.data.objects import object_split
from nextvit.describe import table
from nextvit.heads.boxes import Sampling
from nextvit.metadata import Metadata
from nextvit.progress import say
from nextvit.runtime.open import open_session
from nextvit.runtime.session import Setup
from nextvit.runtime.torch_session import TorchSession

SIZE, CLASSES, MOST = (800, 1280), 80, 100
EXPORTED = 320  # pixels that files are compared at when they are written
CROP, BATCH, OBJECTS, BOXES, MASKS = 320, 2, 8, 128, 32  # of the training step


class Call:
    """A session whose call is any function."""

    def __init__(self, name: str, setup: Setup, function: Callable[[], object]):
        self.metadata, self.setup, self.function = Metadata(name), setup, function

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        self.function()
        return batch


def eager_setup(name: str) -> Setup:
    return Setup(name, "cpu", "fp32", torch.get_num_threads())


def loud(layer: nn.Linear, background: int, find: Callable[[], int]) -> None:
    """Make a layer of classes larger until its network finds as many objects as it gives."""
    with torch.no_grad():
        layer.bias[background] = -1e6
    for _ in range(20):
        if find() >= MOST:
            return
        with torch.no_grad():
            layer.weight.mul_(2)
    say(f"note: a network finds {find()} objects and not {MOST}")


def report(rows: list) -> None:
    print("\n".join(table([
        {"network": row.model, "ms": f"{row.median_ms:.0f} ({row.p25_ms:.0f} to {row.p75_ms:.0f})",
         "time / first": f"{row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f})",
         "times faster": f"{1 / row.ratio:.2f} ({1 / row.ratio_high:.2f} to {1 / row.ratio_low:.2f})"}
        for row in rows
    ])), flush=True)  # fmt: skip


# ---- deployment ------------------------------------------------------------------------------------------------------


def deployed(name: str, folder: Path, rounds: int) -> None:
    torch.manual_seed(0)
    model = nextvit.create_model(name, task="detect", num_classes=CLASSES).eval()
    image = np.random.default_rng(0).standard_normal((1, 3, *SIZE), np.float32)
    with torch.inference_mode():
        loud(model.roi_head.bbox_head.fc_cls, -1, lambda: len(model(torch.from_numpy(image))[0]["boxes"]))
    images = [read_image(file) for file in object_split("demo", "train").files[:40]]
    threads = torch.get_num_threads()
    eager = TorchSession(model, device="cpu", threads=threads, precision="fp32", kind="eager")
    sessions = [("eager", Call("eager", eager.setup, lambda: eager(image)))]
    for ending, precision in ((".onnx", "fp32"), (".xml", "fp32"), (".xml", "bf16"), (".xml", "int8")):
        how = {"calibration": images, "max_drop": None} if precision == "int8" else {}
        path = folder / f"{precision}{ending}"
        try:
            nextvit.export(model, path, image_size=EXPORTED, precision=precision, **how)
        except nextvit.errors.NotHere as error:  # a CPU without bf16
            say(f"left out: {error}")
            continue
        session = open_session(path, threads=threads)
        print(f"{path.name}: {len(session(image)[0]['boxes'])} objects", flush=True)
        shown = f"{session.setup.runtime.partition(' ')[0]} {precision}"
        sessions.append((shown, Call(shown, session.setup, lambda session=session: session(image))))
    for other, network in (("torchvision ResNet50 v2", resnet50()), ("torchvision ResNet101", resnet101())):
        x = [torch.rand(3, *SIZE)]
        run = torch.inference_mode()(network)
        loud(network.roi_heads.box_predictor.cls_score, 0, lambda run=run, x=x: len(run(x)[0]["boxes"]))
        print(f"{other}: {len(run(x)[0]['boxes'])} objects")
        sessions.append((other, Call(other, eager_setup(other), lambda run=run, x=x: run(x))))
    report(benchmark(sessions, image_size=64, rounds=rounds))


def resnet50() -> nn.Module:
    return maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=CLASSES + 1).eval()


def resnet101() -> nn.Module:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet101", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
    )
    network = MaskRCNN(backbone, CLASSES + 1)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics are those of the one pass that follows
    with torch.no_grad():
        backbone.train()(network.transform([torch.rand(3, *SIZE)])[0].tensors)
    return network.eval()


# ---- training --------------------------------------------------------------------------------------------------------


class OnSameBackbone(nn.Module):
    """The backbone of ours with torchvision's pyramid."""

    out_channels = 256

    def __init__(self, name: str):
        super().__init__()
        self.body = nextvit.create_model(name, features_only=True)
        self.fpn = FeaturePyramidNetwork(list(self.body.widths), 256, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(number), found) for number, found in enumerate(self.body(x))))


def trained(name: str, rounds: int) -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.standard_normal((BATCH, 3, CROP, CROP), np.float32))
    targets = []
    for _ in range(BATCH):
        corner = rng.uniform(0, CROP - 100, (OBJECTS, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(30, 100, (OBJECTS, 2))], 1).astype(np.float32)
        masks = np.zeros((OBJECTS, CROP, CROP), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
            mask[y1:y2, x1:x2] = 1
        labels = torch.from_numpy(rng.integers(0, CLASSES, OBJECTS))
        targets.append({"boxes": torch.from_numpy(boxes), "labels": labels, "masks": torch.from_numpy(masks)})
    ours = nextvit.create_model(name, task="detect", num_classes=CLASSES).train()
    ours.sampling = Sampling(boxes=BOXES, masks=MASKS)
    theirs = MaskRCNN(
        OnSameBackbone(name), CLASSES + 1, min_size=CROP, max_size=CROP, box_batch_size_per_image=BOXES,
        rpn_post_nms_top_n_train=1000,
    ).train()  # fmt: skip
    for module in theirs.backbone.body.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    shifted = [{**target, "labels": target["labels"] + 1} for target in targets]
    steps = {
        "torchvision": step(theirs, lambda: theirs(list(images), shifted)),
        "nextvit": step(ours, lambda: ours(images, targets)),
    }
    print(f"training step, {BATCH} crops of {CROP} pixels, {OBJECTS} objects each:")
    sessions = [(name, Call(name, eager_setup(name), run)) for name, run in steps.items()]
    report(benchmark(sessions, image_size=64, rounds=rounds))


def step(model: nn.Module, losses: Callable[[], dict[str, Tensor]]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        sum(losses().values()).backward()
        optimizer.step()

    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--model", default="nextvit_small")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        deployed(flags.model, Path(place), flags.rounds)
        trained(flags.model, flags.rounds)
