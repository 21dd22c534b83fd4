"""Semantic FPN on nextvit_small at 512 x 512: exported files beside eager PyTorch, where the time goes, and training.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 python benchmarks/segmentation.py

Files are OpenVINO's, of one size, giving logits at a quarter of the sides. Eager PyTorch is the same network as it runs
here (channels last), in PyTorch's own memory layout, and segmentation-models-pytorch's of about its operations. The
peak of a precision is a 1x1 convolution of 1,024 channels, which is a plain matrix product, in the same runtime. Where
the time goes is the runtime's own profile, and for eager PyTorch that of hooks around the parts. The training step is
the training loop's own (normalise, forward, cross entropy over all pixels, backward, AdamW) on two crops, beside
segmentation-models-pytorch's FPN on timm's nextvit_small, of the width that has about the operations of ours, in a
plain loop that does the same. Each table compares with its first row; a ratio below 1 means less time.
"""

import argparse
import copy
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import nncf
import numpy as np
import openvino
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import nextvit
from nextvit.benchmark import benchmark
from nextvit.data.images import read_image
from nextvit.data.loader import Batch
from nextvit.data.masks import mask_split
from nextvit.describe import table
from nextvit.heads.units import resized
from nextvit.metadata import Metadata
from nextvit.processes import ALONE
from nextvit.progress import say
from nextvit.recipe import read_recipe
from nextvit.run import Machine, prepare
from nextvit.runtime.open import open_session
from nextvit.runtime.openvino_session import core
from nextvit.runtime.session import Setup
from nextvit.runtime.torch_session import TorchSession
from nextvit.train import train_step

SIZE, CLASSES, BATCH = 512, 150, 2
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


class Call:
    """A session whose call is any function of a batch."""

    def __init__(self, name: str, function: Callable[[torch.Tensor], object]):
        self.metadata = Metadata(name)
        self.setup = Setup(name, "cpu", "fp32", torch.get_num_threads())
        self.function = function

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        self.function(torch.from_numpy(batch))
        return batch


# ---- deployment ------------------------------------------------------------------------------------------------------


def deployed(model: nn.Module, folder: Path, rounds: int) -> None:
    images = [read_image(file) for file in mask_split("demo", "train").files[:40]]
    files: dict[str, Path] = {}
    for precision in ("fp32", "bf16", "int8"):
        try:
            files[precision] = folder / f"{precision}.xml"
            how = {"calibration": images, "max_drop": None} if precision == "int8" else {}
            nextvit.export(model, files[precision], image_size=SIZE, precision=precision, dynamic=False, **how)
        except nextvit.errors.NotHere as error:  # a CPU without bf16
            say(f"left out: {error}")
            del files[precision]
    threads = torch.get_num_threads()
    eager = TorchSession(model, device="cpu", threads=threads, precision="fp32", kind="eager")
    usual = copy.deepcopy(model).eval().to(memory_format=torch.contiguous_format)
    usual.backbone.layout = torch.contiguous_format
    gmacs = gflops(model)
    other = smp_fpn(gmacs).eval()
    sessions = [
        ("eager", eager),
        ("eager, torch's own layout", Call("eager", torch.inference_mode()(usual))),
        ("eager, smp's FPN on timm", Call("smp", torch.inference_mode()(other))),
    ]
    sessions += [(f"openvino {name}", open_session(path, threads=threads)) for name, path in files.items()]
    rows = benchmark(sessions, image_size=SIZE, rounds=rounds)
    print("\n".join(table([
        {"file": row.model, "ms": f"{row.median_ms:.1f} ({row.p25_ms:.1f} to {row.p75_ms:.1f})",
         "time / eager": f"{row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f})",
         "times faster": f"{1 / row.ratio:.2f} ({1 / row.ratio_high:.2f} to {1 / row.ratio_low:.2f})"}
        for row in rows
    ])))  # fmt: skip
    peaks = {name: peak(name) for name in files}
    print("\n".join(table([
        {"file": f"openvino {name}", "10^9 multiply-adds/s": f"{gmacs / row.median_ms * 1e3:.0f}",
         "a plain matrix product's": f"{peaks[name]:.0f}"}
        for name, row in zip(files, rows[3:], strict=True)
    ])))  # fmt: skip
    parts = [{"file": "eager", **shares(eager_parts(model))}]
    parts += [{"file": f"openvino {name}", **shares(file_parts(path, HINTS[name]))} for name, path in files.items()]
    print("\n".join(table(parts)))


def peak(precision: str, channels: int = 1024, side: int = 64, times: int = 12) -> float:
    """10^9 multiply-adds a second of a 1x1 convolution, the best of some runs."""
    layers = nn.Sequential(*(nn.Conv2d(channels, channels, 1) for _ in range(4)))
    x = torch.randn(1, channels, side, side)
    graph = openvino.convert_model(layers.eval(), example_input=x, input=[tuple(x.shape)])
    if precision == "int8":
        graph = nncf.quantize(graph, nncf.Dataset([x.numpy()]))
    config = {"INFERENCE_PRECISION_HINT": HINTS[precision], "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = core().compile_model(graph, "CPU", config).create_infer_request()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        request.infer([x.numpy()])
        seconds.append(time.perf_counter() - begin)
    return 4 * channels**2 * side**2 / min(seconds) / 1e9


def shares(milliseconds: dict[str, float]) -> dict[str, str]:
    total = sum(milliseconds.values())
    return {name: f"{value:.1f} ms, {100 * value / total:.0f} %" for name, value in milliseconds.items()}


def eager_parts(model: nn.Module, times: int = 8) -> dict[str, float]:
    """Milliseconds of each part, the least of some passes; upsampling is that inside the head."""
    found: dict[str, list[float]] = defaultdict(list)
    begun: dict[nn.Module, float] = {}
    doublings = [module for module in model.decode_head.modules() if isinstance(module, nn.Upsample)]
    named = {"backbone": [model.backbone], "neck": [model.neck], "head": [model.decode_head], "upsampling": doublings}
    hooks = []
    for name, modules in named.items():
        for module in modules:
            hooks.append(module.register_forward_pre_hook(lambda m, _: begun.__setitem__(m, time.perf_counter())))
            end = lambda m, _, __, name=name: found[name].append(time.perf_counter() - begun[m])  # noqa: E731
            hooks.append(module.register_forward_hook(end))
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.inference_mode():
        for _ in range(times):
            model.eval()(x)
    for hook in hooks:
        hook.remove()
    least = {name: 1e3 * min(np.reshape(found[name], (times, -1)).sum(1)) for name in named}
    return least | {"head": least["head"] - least["upsampling"]}


def file_parts(path: Path, hint: str, times: int = 8) -> dict[str, float]:
    """The same by the runtime's profile, summed over the nodes of a part; the least of some runs."""
    config = {"INFERENCE_PRECISION_HINT": hint, "PERF_COUNT": True, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = core().compile_model(core().read_model(path), "CPU", config).create_infer_request()
    x, runs = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), np.float32), []
    for _ in range(times):
        request.infer([x])
        parts = dict.fromkeys(("backbone", "neck", "head", "upsampling"), 0.0)
        for node in request.get_profiling_info():
            milliseconds = node.real_time.total_seconds() * 1e3
            name = "backbone"
            if node.node_name.startswith("decode_head") or "logits" in node.node_name:
                name = "upsampling" if "Resize" in node.node_name else "head"
            elif node.node_name.startswith("neck"):
                name = "neck"
            parts[name] += milliseconds
        runs.append(parts)
    return min(runs, key=lambda parts: sum(parts.values()))


# ---- training --------------------------------------------------------------------------------------------------------


def gflops(network: nn.Module) -> float:
    with torch.inference_mode(), FlopCounterMode(display=False) as counted:
        network.eval()(torch.zeros(1, 3, SIZE, SIZE))
    return counted.get_total_flops() / 2e9


def trained(folder: Path, rounds: int) -> None:
    rng = np.random.default_rng(0)
    samples = torch.from_numpy(rng.integers(0, CLASSES, (BATCH, SIZE, SIZE, 4), np.uint8))
    ours = own_step(samples, folder)
    own = gflops(nextvit.create_model("nextvit_small", task="segment"))
    network = smp_fpn(own)
    print(f"operations at {SIZE} x {SIZE}: ours {own:.1f}, smp's FPN {gflops(network):.1f} 10^9")
    sessions = [("smp", Call("smp", peer_step(network, samples))), ("nextvit", Call("nextvit", ours))]
    for row in benchmark(sessions, image_size=64, rounds=rounds):
        print(
            f"training step, batch {BATCH}, {row.model}: {row.median_ms:.0f} ms, time ratio {row.ratio:.3f} "
            f"({row.ratio_low:.3f} to {row.ratio_high:.3f})",
            flush=True,
        )


def own_step(samples: torch.Tensor, folder: Path) -> Callable[[torch.Tensor], None]:
    """Of the training loop, on a small folder of images in ADE20K's layout."""
    for part in ("training", "validation"):
        for index in range(4):
            for kind, shape, ending in (("images", (40, 40, 3), "jpg"), ("annotations", (40, 40), "png")):
                path = folder / "data" / kind / part / f"{index}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.random.default_rng(index).integers(0, CLASSES, shape, np.uint8)).save(path)
    recipe = read_recipe("fpn_80k", [f"batch_size={BATCH}", "weights=none"])
    machine = Machine(device="cpu", workers=0, allow_bad=True)
    run = prepare(folder / "data", recipe, folder / "run", machine, ALONE, resume=False, changes=())
    run.network.train()

    def step(_: torch.Tensor) -> None:
        run.position.step += 1
        train_step(run, [Batch(samples, torch.full((BATCH,), -1), torch.arange(BATCH), ())], 1e-4)

    return step


def smp_fpn(gmacs: float) -> nn.Module:
    """Of the width whose operations are nearest to these."""
    networks = [
        smp.FPN(
            "tu-nextvit_small",
            encoder_weights=None,
            decoder_pyramid_channels=256,
            decoder_segmentation_channels=width,
            decoder_dropout=0.1,
            classes=CLASSES,
            upsampling=1,
        )
        for width in (128, 160, 192, 224, 256)
    ]
    return min(networks, key=lambda network: abs(gflops(network) - gmacs))


def peer_step(model: nn.Module, samples: torch.Tensor) -> Callable[[torch.Tensor], None]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def step(_: torch.Tensor) -> None:
        images = (samples[..., :3].permute(0, 3, 1, 2).float() - mean) / std
        labels = samples[..., 3].long()
        logits = resized(model(images), (SIZE, SIZE))
        loss = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / labels.numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--model", default="nextvit_small")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        network = nextvit.create_model(flags.model, task="segment", head="fpn")
        deployed(network, Path(place), flags.rounds)
        trained(Path(place), flags.rounds)
