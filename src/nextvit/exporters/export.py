"""export: write, open again, measure and compare; only then the file takes its name."""

import copy
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from nextvit import __version__
from nextvit.backbone import NextViT
from nextvit.data.images import ImageSource
from nextvit.detector import Detector
from nextvit.errors import AccuracyError, DiskFull, NotConverted, OutOfMemory, ParityError, UserError
from nextvit.exporters.calibration import Calibration, read_calibration
from nextvit.exporters.example import write_example
from nextvit.exporters.form import WINDOWED, StageOutputs, export_form
from nextvit.exporters.job import Job, Written
from nextvit.exporters.object_parity import ObjectParity, compare_objects
from nextvit.exporters.parity import Parity, StageComparison, compare, compare_stages
from nextvit.exporters.preprocessing import Preprocessing
from nextvit.exporters.program import LEAST_OF_DETECTOR, quiet
from nextvit.exporters.quantization import Accuracy, accuracy, all_answers
from nextvit.exporters.rounding import finetune
from nextvit.extras import need
from nextvit.files import replacing
from nextvit.foreign import ForeignClassifier
from nextvit.formats import FORMATS, Format, Free, format_named, format_of
from nextvit.metadata import Metadata
from nextvit.networks import Dense, Network, of_size
from nextvit.progress import say
from nextvit.runtime.open import open_session
from nextvit.runtime.session import Session
from nextvit.runtime.torch_session import TorchSession
from nextvit.segmenter import Segmenter
from nextvit.trust import remember

KNOWN = (UserError, AccuracyError, ParityError, OutOfMemory, DiskFull)  # errors that fixed sides would not mend
PYRAMID_ALONE = (
    "{} cannot choose boxes, so the file is backbone and feature pyramid alone; proposals, boxes and masks are to be "
    "made of its five maps elsewhere. ONNX and OpenVINO files are whole"
)


@dataclass(frozen=True)
class ExportReport:
    """What was written, how it was checked, and what came out."""

    path: str
    format: str
    precision: str
    bytes: int  # of all its files
    seconds: float
    parity: Parity | ObjectParity | None  # None: it could not be run here
    stages: tuple[StageComparison, ...] = ()  # where asked for
    not_run: str | None = None  # why, e.g. "needs macOS"
    accuracy: Accuracy | None = None  # of int8
    float_layers: tuple[str, ...] = ()  # of int8: those that are computed in float
    notes: tuple[str, ...] = ()

    @property
    def checked(self) -> Parity:
        """The parity of a file that was run, of one that gives arrays."""
        if not isinstance(self.parity, Parity):
            raise RuntimeError(f"{self.path} was not run ({self.not_run}), or gives objects")
        return self.parity

    def to_dict(self) -> dict[str, object]:
        told = None if self.accuracy is None else self.accuracy.to_dict()
        parity = None if self.parity is None else self.parity.to_dict()
        return {**asdict(self), "parity": parity, "accuracy": told}


def export(
    model: Network,
    path: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    precision: str = "fp32",
    calibration: str | os.PathLike[str] | Sequence[ImageSource] | None = None,
    max_drop: float | None = 0.5,
    qat_epochs: int = 0,
    dynamic: bool = True,
    preprocess: bool = False,
    class_map: bool = False,
    stages: bool = False,
) -> ExportReport:
    """Write a model in the format that the ending of `path` names, and prove that the file answers as the model does.

    image_size: pixels a side, recorded as the size to preprocess to; None: the model's own (224 for a fresh one).
    precision: "fp32", "fp16", "bf16" or "int8", where the format has it.
    calibration: for int8: a folder of images, `demo`, or a list of images as predict takes them.
    max_drop: for int8: points of top-1, mIoU or box AP that may be lost against the float model (of agreement with it,
        where the images have no known classes, masks or objects); layers are taken back to float to keep it. None:
        write what comes out, and report it.
    qat_epochs: for int8: passes of quantisation-aware fine-tuning over up to 3,000 of the images, before calibration.
    dynamic: batch, height and width stay free; else batch 1 and image_size are fixed.
    preprocess: the file takes uint8 images of any size and prepares them itself.
    class_map: of segmentation: the file gives the class of each pixel of its input, int32 (B, H, W), not logits at a
        quarter of its sides.
    stages: also compare what each stage gives, to find where a format goes wrong.

    Beside the file lie the report, as JSON, and a folder `PATH.example` with an image, the answer that is expected, and
    programs that run the file on it. Raises UserError for an ending that is no format or a model that cannot be
    exported, MissingExtra where a library is missing, ParityError where the file's outputs differ from the model's and
    AccuracyError where int8 loses more than max_drop; then nothing is left under `path`.
    """
    path = Path(path)
    fmt = _checked(model, path, precision, calibration is not None, max_drop, qat_epochs, preprocess, class_map, stages)
    writer = import_module(f"nextvit.exporters.{fmt.name}")
    model = of_size(model, image_size)
    metadata = model.metadata.with_image_size(image_size)
    metadata = replace(metadata, version=__version__, precision=precision, gives_classes=class_map)
    start = time.perf_counter()
    one_size = _takes_one_size(model)
    free = fmt.left_open(metadata.preprocess.image_size, dynamic, preprocess)
    free = Free(batch=free.batch, sides=free.sides and (preprocess or not one_size))
    notes: tuple[str, ...] = ()
    if metadata.task == "detect":
        free = Free(batch=False, sides=free.sides and metadata.preprocess.image_size >= LEAST_OF_DETECTOR)
        if not fmt.detects:
            metadata = replace(metadata, gives_maps=True)
            notes = (PYRAMID_ALONE.format(fmt.name),)
    metadata = _of_one_size(metadata) if metadata.task != "classify" and not free.sides else metadata
    images = None if calibration is None else read_calibration(calibration, model, metadata, tune=qat_epochs > 0)
    notes = (*images.notes, *notes) if images else notes
    metadata = replace(metadata, takes_pixels=preprocess)
    plain = copy.deepcopy(model).eval().cpu().float()
    with replacing(path) as unfinished:
        form = export_form(plain, fixed=preprocess or not free.sides)
        job = Job(form, unfinished, metadata, free, images)
        if images is not None and qat_epochs:
            first, last = finetune(form, plain, images.train, qat_epochs)
            told = f"{qat_epochs} epochs on {len(images.train)} images: {first:.3g} to {last:.3g} nats from its answers"
            kept = "" if last < first else "; it did not help, and the weights are as they were"
            notes = (*notes, f"fine-tuned in int8 to answer as the model does, {told}{kept}")
        by_stage: tuple[StageComparison, ...] = ()
        try:
            written, measured, job = _write(writer, plain, job, images, max_drop)
            parity = _compared(plain, written, free, precision)
        except Exception as error:  # each library has several kinds for sizes that cannot be left open
            mendable = isinstance(model, ForeignClassifier) and free.sides and not preprocess and not qat_epochs
            if not mendable or (isinstance(error, KNOWN) and not isinstance(error, NotConverted)):
                raise
            free = Free(batch=free.batch, sides=False)
            job = replace(job, form=export_form(plain, fixed=True), free=free)
            written, measured, job = _write(writer, plain, job, images, max_drop)
            parity = _compared(plain, written, free, precision)
        if parity is not None:
            if stages:
                by_stage = _compare_stages(writer, plain, fmt, job)
            _insist(parity, path, by_stage)
        size = sum(file.stat().st_size for file in unfinished.parent.rglob("*") if file.is_file())
        if metadata.in_channels == 3:
            file = (written.opened or unfinished).name
            write_example(unfinished.with_name(f"{path.name}.example"), file, fmt.name, plain, metadata, parity)
        if fmt.program:
            remember(unfinished)
        if dynamic and fmt.free.sides and not free.sides:
            notes = (*notes, f"the sides are fixed: {_why_fixed(model, fmt, metadata.preprocess.image_size)}")
        report = ExportReport(
            str(path),
            fmt.name,
            precision,
            bytes=size,
            seconds=time.perf_counter() - start,
            parity=parity,
            stages=by_stage,
            not_run=written.not_run,
            accuracy=measured,
            float_layers=tuple(writer.INT8.float_layers(written.opened, job.plan)) if measured else (),
            notes=notes,
        )
        unfinished.with_name(f"{path.name}.json").write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    return report


def _of_one_size(metadata: Metadata) -> Metadata:
    """The record of a file of one size; a detector's images are fitted into a square of it."""
    p = metadata.preprocess
    if metadata.task == "detect":
        p = replace(p, long_side=p.image_size)
    return replace(metadata, fixed_sides=True, preprocess=p)


def _checked(
    model: Network,
    path: Path,
    precision: str,
    calibrated: bool,
    max_drop: float | None,
    qat_epochs: int,
    preprocess: bool,
    class_map: bool,
    stages: bool,
) -> Format:
    """The format that is asked for; refused before any work starts where it cannot be."""
    fmt = format_of(path)
    if fmt is None:
        endings = ", ".join(f"{f.suffix} ({f.name})" for f in FORMATS)
        raise UserError(f"{path} does not end as a format does; the endings are {endings}.")
    if not isinstance(model, Network):
        raise UserError(f"export takes a model of nextvit.create_model, not {type(model).__name__}.")
    if isinstance(model, NextViT) and model.features_only:
        raise UserError("a features_only model gives four maps; export the whole network, which ends in logits.")
    if class_map and not isinstance(model, Segmenter):
        raise UserError("a class of each pixel is what segmentation gives; leave --class-map out.")
    if preprocess and isinstance(model, Dense):
        raise UserError(f"files for task {model.metadata.task!r} do not prepare images; leave --preprocess out.")
    if qat_epochs and isinstance(model, Detector):
        raise UserError("detectors are not fine-tuned for int8; leave --qat-epochs out.")
    if precision == "int8" and isinstance(model, Detector) and not fmt.detects:
        raise UserError(f"int8 of a detector is for whole files (ONNX, OpenVINO); {fmt.name} files hold a part of it.")
    if stages and isinstance(model, Detector):
        raise UserError("a detector's file gives objects and no stages to compare; leave --stages out.")
    fmt.check(precision, preprocess)
    if preprocess:
        if model.metadata.in_channels != 3:
            raise UserError(
                f"this model takes {model.metadata.in_channels} input channels; only RGB images are prepared."
            )
        Preprocessing(model.metadata.preprocess)  # says what has no graph
    if (precision == "int8") != calibrated:
        what = "alone takes calibration images" if calibrated else "needs calibration images"
        raise UserError(f"int8 {what}; give a folder of images like those that the model will see, or `demo`.")
    if qat_epochs and precision != "int8":
        raise UserError(f"fine-tuning for int8 is of no use in {precision}; leave --qat-epochs out.")
    if qat_epochs < 0:
        raise UserError(f"qat_epochs must be 0 or more, not {qat_epochs}.")
    if max_drop is not None and not max_drop >= 0:
        raise UserError(f"max_drop must be 0 or more points, not {max_drop}.")
    with quiet():  # some remark on what else is installed as they are imported
        for module in fmt.needs:
            need(module, extra=fmt.extra)
        if precision == "int8":
            module, extra = import_module(f"nextvit.exporters.{fmt.name}").INT8.needs
            need(module, extra=extra)
    return fmt


def _open(path: Path) -> Session:
    """A file that was written a moment ago."""
    return open_session(path, device="cpu", trust=True)


def _compared(model: Network, written: Written, free: Free, precision: str) -> Parity | ObjectParity | None:
    """None: nothing was written that runs here."""
    if written.opened is None:
        return None
    session = _open(written.opened)
    if session.metadata.task == "detect" and not session.metadata.gives_maps:
        return compare_objects(model, session, sides=free.sides, precision=precision)
    return compare(model, session, free=free, precision=precision)


def _compare_stages(writer: ModuleType, model: Network, fmt: Format, job: Job) -> tuple[StageComparison, ...]:
    """Write a second file whose output is all stages', of one size, and compare them; it is not kept."""
    form = export_form(model, fixed=True)
    form.load_state_dict(job.form.state_dict())  # fine-tuned, it may be
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"stages{fmt.suffix}")
        closed = Free(batch=False, sides=False)
        plan = replace(job.plan, max_drop=None)  # outputs are no logits, so no accuracy can be held
        job = job.of_network()
        metadata = replace(job.metadata, gives_classes=False, fixed_sides=False)
        stages = replace(job, form=StageOutputs(form), path=path, free=closed, plan=plan, metadata=metadata)
        written = writer.write(stages)
        return compare_stages(model, _open(written.opened))


def _insist(parity: Parity | ObjectParity, path: Path, stages: Sequence[StageComparison]) -> None:
    where = "; ".join(f"{stage.name} {stage.relative:.0e}" for stage in stages)
    if isinstance(parity, ObjectParity):
        if not parity.ok:
            raise ParityError(f"{path} was not written: {parity.told}.")
    elif not parity.ok:
        same = "" if parity.maps else f"; same first label for {parity.top1_agreement:.1f} % of {parity.images} images"
        raise ParityError(
            f"{path} was not written: its outputs differ from the model's by {parity.max_abs:.3g} "
            f"({parity.relative:.1e} of the largest, {parity.to_spread:.1e} of their spread{same}); "
            + (f"relative difference after each stage: {where}." if where else "--stages shows where.")
        )


def _takes_one_size(model: Network) -> bool:
    """Whether its file can have no free sides: of windows torch finds that out itself, after minutes."""
    windowed = any(type(module).__name__ == WINDOWED for module in model.modules())
    return windowed or (isinstance(model, ForeignClassifier) and model.fixed_size)


def _why_fixed(model: Network, fmt: Format, image_size: int) -> str:
    if (isinstance(model, ForeignClassifier) or _takes_one_size(model)) and image_size >= fmt.open_from:
        return f"{model.metadata.variant} does not leave them open"
    least = max(fmt.open_from, LEAST_OF_DETECTOR) if model.metadata.task == "detect" else fmt.open_from
    return f"{fmt.name} leaves them open from {least} pixels up only"


def _write(
    writer: ModuleType, model: Network, job: Job, images: Calibration | None, max_drop: float | None
) -> tuple[Written, Accuracy | None, Job]:
    """Write a file; in int8, if that loses too much, again with more in float. -> the file, what it loses, its job."""
    written = writer.write(job)
    if images is None or written.opened is None:
        return written, None, job
    eager = TorchSession(model, device="cpu", threads=None, precision="fp32")
    eager.metadata = replace(eager.metadata, preprocess=job.metadata.preprocess)
    floats = all_answers(eager, images.measure, "measure the float model")
    truth = images.measure.truth

    def measure() -> Accuracy:
        taken = replace(images.measure, metadata=job.metadata)
        found = all_answers(_open(written.opened), taken, "measure the int8 file")
        return accuracy(images.measure, truth, floats, found)

    measured = measure()
    if max_drop is None or measured.drop <= max_drop:
        return written, measured, job
    for plan in writer.INT8.plans(job.form, images, max_drop, floats if truth is None else truth):
        say(f"int8 loses {measured.drop:.2f} points, {max_drop:g} are allowed; leaving more of it in float ...")
        job = replace(job, plan=plan)
        written = writer.write(job)
        measured = measure()
        if measured.drop <= max_drop:
            return written, measured, job
    raise AccuracyError(
        f"{job.path.name} was not written: in int8 it loses {measured.drop:.2f} points of {measured.metric} on "
        f"{measured.images} images, and at most {max_drop:g} are allowed; calibrate on more images like those that the "
        "model will see, fine-tune with --qat-epochs, or accept it with --force."
    )


def default_path(model: str | os.PathLike[str], metadata: Metadata, format_name: str) -> Path:
    """VARIANT-SIZE-PRECISION, `-pixels` where it prepares images, and the ending: beside a weight file, else here."""
    suffix = format_named(format_name).suffix
    kind = metadata.precision + "-pixels" * metadata.takes_pixels + "-classes" * metadata.gives_classes
    variant = "-".join(part for part in (metadata.variant.replace(":", "-"), metadata.head) if part)
    name = f"{variant}-{metadata.preprocess.image_size}-{kind}{suffix}"
    return Path(model).with_name(name) if Path(model).is_file() else Path(name)
