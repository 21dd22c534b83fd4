"""From images to typed results, on whatever runtime the model is."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nextvit.backbone import SMALLEST_SIDE
from nextvit.data.images import (
    MAX_TILED_PIXELS,
    ImageRejected,
    ImageSource,
    as_taken,
    nearest,
    printable,
    read_image,
)
from nextvit.devices import cpu_count
from nextvit.errors import UserError
from nextvit.heads.units import resized
from nextvit.runtime.open import open_session
from nextvit.runtime.session import Session, joined
from nextvit.tasks import classify
from nextvit.tasks.classify import Classification
from nextvit.tasks.detect import Detections, decode, detect
from nextvit.tasks.segment import Segmentation, class_map, enlarged_argmax, tiled_map

Result = Classification | Segmentation | Detections


class Predictor:
    """A model that takes images as they are; its file says how they are prepared and what its outputs mean."""

    def __init__(self, session: Session):
        self.session = session
        self.metadata = session.metadata

    @property
    def task(self) -> str:
        """ "classify", "segment" or "detect"."""
        return self.metadata.task

    @property
    def labels(self) -> list[str]:
        """Names of the classes, in the order of the outputs; their numbers where the file has no names."""
        return list(self.metadata.labels) or [str(index) for index in range(self.metadata.num_classes)]

    def insist_on_answers(self) -> None:
        """Raise UserError for a file that holds a part of a network."""
        if self.metadata.gives_maps:
            raise UserError(
                "this file is backbone and feature pyramid alone, and what makes objects of its maps is not in it; "
                "`run` gives the maps, an ONNX or OpenVINO file of the network gives objects."
            )

    def run(self, batch: np.ndarray) -> Any:
        """float32 (B, 3, H, W), already normalised -> the raw outputs: (B, classes) logits; of segmentation (B,
        classes, H / 4, W / 4), or int32 (B, H, W) of a file that gives classes; of detection a dict an image: boxes
        (N, 4) in pixels of the batch, labels (N,), scores (N,), masks (N, 28, 28).

        A file that prepares images itself takes uint8 (B, H, W, 3) of any size instead.
        """
        channels, pixels = self.metadata.in_channels, self.metadata.takes_pixels
        wanted, shape, axis = ("uint8", "(B, H, W, 3)", 3) if pixels else ("float32", f"(B, {channels}, H, W)", 1)
        if batch.ndim != 4 or batch.shape[axis] != channels or batch.dtype != wanted:
            raise UserError(f"a batch must be {wanted} of shape {shape}, not {batch.dtype} {batch.shape}.")
        if not len(batch):
            raise UserError("a batch needs one image or more.")
        sides, least = self.metadata.sides(batch.shape), 1 if pixels else SMALLEST_SIDE
        if min(sides) < least:
            raise UserError(f"a batch of {sides[0]} x {sides[1]} pixels is too small; both sides need {least}.")
        side = self.metadata.preprocess.image_size
        if self.metadata.fixed_sides and sides != (side, side):
            raise UserError(f"this file takes {side} x {side} pixels and no other size, not {sides[0]} x {sides[1]}.")
        batch = np.ascontiguousarray(batch)
        size = self.session.fixed_batch
        parts = [batch] if size is None else [batch[start : start + size] for start in range(0, len(batch), size)]
        outputs = joined([self.session(part) for part in parts])
        if self.task == "detect":
            return outputs
        if not self.metadata.gives_classes and outputs.shape[1] != self.metadata.num_classes:
            raise UserError(
                f"the file gives {outputs.shape[1]} outputs, and its metadata names {self.metadata.num_classes} "
                "classes; export it again."
            )
        return outputs

    def prepare(self, image: ImageSource) -> np.ndarray:
        """Decode one image, and preprocess it -> float32 (3, image_size, image_size); where the file does that itself,
        uint8 (H, W, 3). Raises ImageRejected.
        """
        if self.metadata.in_channels != 3:
            raise UserError(
                f"this model takes {self.metadata.in_channels} input channels and no RGB images; use `run`."
            )
        return as_taken(read_image(image), self.metadata)

    def answer(self, prepared: Sequence[np.ndarray]) -> list[Classification]:
        """Of a classifier: one result for each image as `prepare` gives it."""
        if self.metadata.takes_pixels:  # of any size: they do not stack
            logits = np.concatenate([self.run(image[None]) for image in prepared])
        else:
            logits = self.run(np.stack(prepared))
        return classify.decode(logits, self.labels)

    def segment(self, image: ImageSource, *, tile: int | None = None) -> Segmentation:
        """The class of each pixel of one image, at its own size. Raises ImageRejected.

        tile: instead of resizing the image, look at it as it is, in overlapping tiles of so many pixels a side: for
        images of up to a billion pixels, of which nothing but the image and its answer is held.
        """
        if self.task != "segment":
            raise UserError(f"this model is for the task {self.task!r}; use predict.")
        if tile is None:
            found: Segmentation = self._whole(read_image(image))
            return found
        if self.metadata.in_channels != 3:
            raise UserError(f"this model takes {self.metadata.in_channels} input channels and no RGB images; use run.")
        return self._segmented(tiled_map(self.run, read_image(image, most=MAX_TILED_PIXELS), self.metadata, tile))

    def detect(self, image: ImageSource) -> Detections:
        """The objects of one image, in its own pixels. Raises ImageRejected."""
        if self.task != "detect":
            raise UserError(f"this model is for the task {self.task!r}; use predict.")
        return self._whole(read_image(image))

    def _whole(self, image: Image.Image) -> Any:
        """The answer of a dense task to one image."""
        if self.metadata.in_channels != 3:
            raise UserError(f"this model takes {self.metadata.in_channels} input channels and no RGB images; use run.")
        self.insist_on_answers()
        if self.task == "detect":
            return detect(self.run, image, self.metadata, tuple(self.labels))
        return self._segmented(class_map(self.run, image, self.metadata))

    def _segmented(self, classes: np.ndarray) -> Segmentation:
        return Segmentation(classes, tuple(self.labels))

    def decoded(self, outputs: Any, sides: tuple[int, int], size: tuple[int, int]) -> Result:
        """The result of one image of `size` = (H, W) from the raw outputs for it whole, resized to `sides`."""
        if self.task == "detect":
            return decode(outputs[0], sides, size, tuple(self.labels))
        if self.task == "classify":
            return classify.decode(outputs, self.labels)[0]
        if self.metadata.gives_classes:
            return self._segmented(nearest(outputs[0].astype(np.uint8), size))
        logits = resized(torch.from_numpy(outputs), sides)[0]
        return self._segmented(enlarged_argmax(logits, size))

    def predict(self, images: Sequence[ImageSource]) -> Sequence[Result]:
        """One result an image. images: paths, PIL images or uint8 arrays (H, W, 3), any mix. Raises ImageRejected."""
        if isinstance(images, str | bytes) or not isinstance(images, Sequence):
            raise UserError("predict takes a list of images; put a single one into a list.")
        if not images:
            return []
        if self.task != "classify":
            return [self._whole(read_image(image)) for image in images]
        return self.answer([self.prepare(image) for image in images])

    def stream(
        self, files: Sequence[Path], *, batch_size: int = 16, workers: int | None = None, tile: int | None = None
    ) -> Iterator[tuple[Path, Result | str]]:
        """(file, its result, or why there is none) of any number of files, in order.

        Files are decoded and preprocessed in `workers` threads (None: one a core) while the model runs; a few batches
        at most are held. tile: see `segment`; such images are decoded one at a time.
        """
        if self.task != "classify":
            yield from self._stream_whole(files, workers or cpu_count(), tile)
            return
        if self.metadata.takes_pixels:
            batch_size = 1  # whole images, which may be large
        with ThreadPoolExecutor(workers or cpu_count()) as pool:
            ahead = 3 * batch_size
            waiting: deque[tuple[Path, Future[np.ndarray]]] = deque()
            rest = iter(files)
            try:
                while True:
                    waiting.extend(
                        (file, pool.submit(self.prepare, file)) for file in islice(rest, ahead - len(waiting))
                    )
                    if not waiting:
                        return
                    batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
                    yield from self._answers(batch)
            finally:
                pool.shutdown(cancel_futures=True)

    def _stream_whole(
        self, files: Sequence[Path], workers: int, tile: int | None
    ) -> Iterator[tuple[Path, Segmentation | Detections | str]]:
        if tile is not None:
            for file in files:
                try:
                    yield file, self.segment(file, tile=tile)
                except ImageRejected as error:
                    yield file, str(error)
            return
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[tuple[Path, Future[Image.Image]]] = deque()
            rest = iter(files)
            try:
                while True:
                    waiting.extend((file, pool.submit(read_image, file)) for file in islice(rest, 2 - len(waiting)))
                    if not waiting:
                        return
                    file, image = waiting.popleft()
                    try:
                        yield file, self._whole(image.result())
                    except ImageRejected as error:
                        yield file, str(error)
            finally:
                pool.shutdown(cancel_futures=True)

    def _answers(
        self, batch: Sequence[tuple[Path, "Future[np.ndarray]"]]
    ) -> Iterator[tuple[Path, Classification | str]]:
        inputs, reasons = [], {}
        for index, (_, prepared) in enumerate(batch):
            try:
                inputs.append(prepared.result())
            except ImageRejected as error:
                reasons[index] = str(error)
        try:
            found = iter(self.answer(inputs) if inputs else ())
        except ImageRejected as error:  # by a file that takes whole images, one at a time, for its size
            reasons, found = {0: f"{printable(batch[0][0])}: {error}"}, iter(())
        for index, (file, _) in enumerate(batch):
            yield file, reasons[index] if index in reasons else next(found)


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    hint: str = "latency",
    trust: bool = False,
) -> Predictor:
    """Open any checkpoint or exported file as a predictor.

    device: "auto", "cpu", "cuda", ... threads: of the CPU runtime; None: its own choice. precision: "fp32" (also None),
    "bf16" or "fp16", where the device computes in it. hint: with OpenVINO also "throughput": parts of a batch
    are computed side by side. trust: open a `.pt2`, which runs as a program, whoever wrote it.
    Raises UserError for a file that is missing or damaged.
    """
    return Predictor(
        open_session(os.fspath(path), device=device, threads=threads, precision=precision, hint=hint, trust=trust)
    )
