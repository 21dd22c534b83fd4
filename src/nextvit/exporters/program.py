"""A torch.export program of a model, and its quantisation by PT2E: what the formats around torch are made of."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nextvit.errors import NotConverted, UserError
from nextvit.exporters.job import Job
from nextvit.exporters.preprocessing import Preprocessing
from nextvit.extras import need
from nextvit.progress import track

LEAST_OF_DETECTOR = 65  # pixels a free side: below, the map at stride 64 has one pixel
LARGEST = {"batch": 8192, "side": 8192}  # of what stays open, where a format plans nothing by it


def torch_program(job: Job, network: nn.Module, largest: dict[str, int] = LARGEST) -> torch.export.ExportedProgram:
    """The program of a network made of the job's form: one input, of the job's shape where it is not free.

    Where the file takes pixels, preprocessing is put in front of the network.

    torch proves free sides from 64 pixels up: below, maps inside have one pixel, which it takes for a constant. (An
    ONNX graph made of the program holds from 32: tests/test_export.py.)
    """
    pixels, dims = job.metadata.takes_pixels, {}
    batch, (height, width) = 1, job.metadata.sides(job.shape)
    if job.free.batch:  # an example of one, or of equal sides, can be taken for a constant
        batch, dims[0] = 2, torch.export.Dim("batch", min=1, max=largest["batch"])
    if job.free.sides:
        height, width = 96, 128
        first, least = (1, 1) if pixels else (2, LEAST_OF_DETECTOR if job.metadata.task == "detect" else 64)
        for place, name in enumerate(("height", "width"), first):
            dims[place] = torch.export.Dim(name, min=least, max=largest["side"])
    example = torch.zeros(job.metadata.input_shape(batch, height, width), dtype=torch.uint8 if pixels else None)
    if pixels:
        network = nn.Sequential(Preprocessing(job.metadata.preprocess), network)
    with quiet():
        return torch.export.export(network, (example,), dynamic_shapes=(dims,) if dims else None)


def quantized(job: Job, largest: dict[str, int], quantizer: Any) -> nn.Module:
    """The job's form with the rounding of a PT2E quantiser in it, its ranges taken from the images to calibrate on."""
    assert job.calibration is not None
    pt2e = need("torchao.quantization.pt2e.quantize_pt2e", extra="executorch")
    images = job.calibration.calibrate
    with quiet():
        prepared = pt2e.prepare_pt2e(torch_program(job.of_network(), job.network, largest).module(), quantizer)
    with torch.no_grad():
        for image in track(images, total=len(images), label="calibrate"):
            prepared(torch.from_numpy(image))
    with quiet():
        return pt2e.convert_pt2e(prepared)


class Normalised(nn.Module):
    """A network that takes pixels in 0..255 instead of what preprocessing makes of them."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.network((image - self.mean) / self.std)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the converters' own remarks, which tell a user nothing that can be acted on."""
    unread = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(unread), contextlib.redirect_stderr(unread):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def converting(format_name: str) -> Iterator[None]:
    """Run a converter quietly; what it cannot take is said in one sentence of its own words: which operator and why."""
    try:
        with quiet():
            yield
    except (UserError, OSError):  # a full disk is no fault of the model
        raise
    except Exception as error:  # converters raise kinds of their own, bare exceptions among them
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise NotConverted(f"{format_name} cannot take this model: {(lines or [type(error).__name__])[0]}") from error
