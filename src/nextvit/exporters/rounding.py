"""int8 as torch can simulate it: to tell which parts of a network suffer, and to fine-tune a network under it."""

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nextvit.devices import pick_device
from nextvit.exporters.calibration import Images
from nextvit.networks import Network
from nextvit.progress import track

BATCH = 16
LEARNING_RATE = 1e-4  # at the start; it falls to 0 along half a cosine
COMPARED = 256  # images at most that tell whether it helped
LARGEST_GRADIENT = 5.0  # norm, as in training


class RoundedWeight(nn.Module):
    """A weight in 255 levels around 0, a scale for each output channel; gradients pass as if it were not rounded."""

    def forward(self, weight: Tensor) -> Tensor:
        scales = weight.detach().flatten(1).abs().amax(1).clamp(min=1e-12) / 127
        zeros = torch.zeros(len(scales), dtype=torch.int32, device=weight.device)
        return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -127, 127)


def _round_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """An input in 256 levels from its least to its largest value, 0 among them."""
    low, high = min(float(inputs[0].detach().min()), 0.0), max(float(inputs[0].detach().max()), 0.0)
    scale = max(high - low, 1e-12) / 255
    zero = round(-low / scale) if math.isfinite(scale) else 0
    return torch.fake_quantize_per_tensor_affine(inputs[0], scale, zero, 0, 255)


@contextlib.contextmanager
def rounded(network: nn.Module) -> Iterator[None]:
    """With weights and inputs of the convolutions and linear layers rounded to 8 bits."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_pre_hook(_round_input) for layer in layers]
    try:
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", RoundedWeight())
        yield
    finally:
        for layer, hook in zip(layers, hooks, strict=True):
            hook.remove()
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def finetune(form: Network, model: Network, images: Images, epochs: int, seed: int = 0) -> tuple[float, float]:
    """Quantisation-aware fine-tuning: the weights of the export form learn to give the model's answers under rounding.

    The model is the teacher, so no labels are needed; every image is seen as it is or mirrored, at random. Returns the
    mean Kullback-Leibler divergence (nats) from the model's answers before and after; where it did not fall, the
    weights are as they were.
    """
    device, generator = pick_device("auto"), torch.Generator().manual_seed(seed)
    teacher, kept = copy.deepcopy(model).to(device), copy.deepcopy(form.state_dict())
    form.to(device).requires_grad_(True)
    orders = [torch.randperm(len(images), generator=generator) for _ in range(epochs)]
    batches = [indices for order in orders for indices in order.split(BATCH)]
    optimizer = torch.optim.AdamW(form.parameters(), lr=LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))

    def loss_on(batch: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(batch).log_softmax(1)
        answers = target.numel() // target.shape[1]  # images, or pixels of the logits
        return F.kl_div(form(batch).log_softmax(1), target, reduction="sum", log_target=True) / answers

    def load(indices: Tensor) -> Tensor:
        return torch.cat([torch.from_numpy(images[int(index)]) for index in indices]).to(device)

    def divergence() -> float:
        chosen = torch.linspace(0, len(images) - 1, min(len(images), COMPARED)).long().split(BATCH)
        with torch.no_grad():
            return sum(float(loss_on(load(indices))) * len(indices) for indices in chosen) / sum(map(len, chosen))

    with rounded(form):
        before = divergence()
        for indices in track(batches, total=len(batches), label="fine-tune in int8", unit="steps"):
            batch, mirrored = load(indices), torch.rand(len(indices), generator=generator) < 0.5
            batch[mirrored] = batch[mirrored].flip(3)
            loss = loss_on(batch)
            if not math.isfinite(loss.detach()):
                break
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(form.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
        after = divergence()
    form.to("cpu").requires_grad_(False)
    if not after < before:
        form.load_state_dict(kept)
    return before, after
