"""The verbs: parse, call, print, exit code. Each imports what it needs when it runs."""

import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextvit.errors import UserError, exit_code
from nextvit.formats import FORMATS, RUN

if TYPE_CHECKING:
    from nextvit.runtime.session import Session

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Next-ViT from a folder of images to a deployed model: train, evaluate, export, check, measure.",
)

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after folders of images.")
app.add_typer(data_app, name="data")

USAGE_ERROR: Any = typer.BadParameter.__base__  # what typer raises for a wrong flag, argument or verb

# ---- flags that mean the same wherever they stand --------------------------------------------------------------------

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A variant's name, a checkpoint, or an exported file.")]
Weights = Annotated[
    str | None,
    typer.Option(help="With a variant's name: a weight file, a published tag such as in1k, or hf-hub:org/name."),
]
Output = Annotated[Path | None, typer.Option(help="Where to write.")]
RECIPES = (
    "default, demo, distill, finetune, in1k_300e, in1k_300e_paper, in1k_384, proxy; demo_segment, finetune_segment, "
    "fpn_80k, fpn_80k_paper, proxy_segment, upernet_160k; demo_detect, finetune_detect, maskrcnn_1x, maskrcnn_3x_ms, "
    "proxy_detect; or a YAML file"
)
RecipeName = Annotated[str, typer.Option(help=f"{RECIPES}.")]
Task = Annotated[str | None, typer.Option(help="classify, segment or detect; left out: the recipe's own.")]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps; of exported files what their runtime has (docs/export.md).")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; left out: the runtime's own choice.")]
AllThreads = Annotated[int | None, typer.Option(min=1, help="CPU threads; left out: one a core.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
ImageSize = Annotated[int | None, typer.Option(min=32, help="Side of the input in pixels; left out: the model's own.")]
Precision = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16, where the device computes in it; else fp32.")]
Hint = Annotated[str, typer.Option(help="latency; or with OpenVINO throughput: parts of a batch side by side.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of everything that is drawn at random.")]
Trust = Annotated[bool, typer.Option("--trust", help="Open a .pt2 that was not exported here: it runs as a program.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


# ---- the verbs -------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: nextvit info nextvit_small")
def info(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A variant or any file; left out: all variants.")
    ] = None,
    image_size: ImageSize = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The variants; or one model's structure, parameters and FLOPs, and what a file holds."""
    from nextvit.create import is_variant
    from nextvit.describe import describe_file, describe_foreign, describe_variant, describe_variants
    from nextvit.foreign import is_foreign

    if model is None:
        _show(describe_variants(), as_json)
    elif is_variant(model) or not (is_foreign(model) or os.path.lexists(model)):
        _show(describe_variant(model, image_size or 224), as_json)
    elif is_foreign(model):
        _show(describe_foreign(model, image_size), as_json)
    else:
        _show(describe_file(Path(model), image_size, trust=trust), as_json)


@app.command(epilog="Example: nextvit train demo --recipe demo --output runs/first")
def train(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="A folder with train/ and val/, of classes, with masks, or as COCO's; or `demo`."
        ),
    ],
    task: Annotated[str | None, typer.Option(help="classify, segment or detect; left out: the recipe's own.")] = None,
    model: Annotated[str | None, typer.Option(help="The variant; left out: the recipe's own.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help=f"{RECIPES}. Left out: default, finetune_segment or finetune_detect, by --task.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the images.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="FILE, published TAG or none; left out: the published weights where there are any, else none."
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run folder, as that run had it.")] = None,
    output: Annotated[Path | None, typer.Option(help="The run folder; left out: a new one below runs/.")] = None,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    threads: Threads = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that load images; 0: none of their own.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step.")] = None,
    image_size: ImageSize = None,
    seed: Seed = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Only operators that repeat exactly.")] = False,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any value of recipe.yaml, e.g. optimizer.lr=5e-4."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="With torch.compile: slower to start, then faster.")
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="With torchrun: weights in shards over the processes (FSDP2).")
    ] = False,
    log: Annotated[
        list[str] | None, typer.Option(metavar="SERVICE", help="wandb or mlflow, beside metrics.csv and TensorBoard.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Record where the time of some steps goes.")] = False,
    allow_bad: Annotated[
        bool, typer.Option("--allow-bad", help="Train although over 1 % of the images cannot be read.")
    ] = False,
    strict_data: Annotated[
        bool, typer.Option("--strict-data", help="Do not, if any cannot, or if one is in train and val both.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train or fine-tune on a folder of images, and keep all of it in a run folder."""
    from nextvit.data.sets import task_of
    from nextvit.extras import need

    for library in ("yaml", "pydantic", "torchvision", "matplotlib"):
        need(library, extra="train")  # now, not after hours of training
    from nextvit.recipe import of_task, parse_recipe, read_recipe, with_image_size
    from nextvit.report import write_run_plots
    from nextvit.run import Machine, new_run_folder
    from nextvit.train import train as run_training

    flags = {
        "model": model,
        "weights": weights,
        "schedule.epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
    }
    values = {key: value for key, value in flags.items() if value is not None}
    if resume is not None:
        if output is not None or values or recipe or task or image_size:
            raise UserError("--resume goes on as that run had it; leave out flags that would change it, or use --set.")
        try:
            text = (resume / "recipe.yaml").read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{resume} is no run folder: it has no recipe.yaml; give the folder that `train` wrote."
            ) from error
        chosen, run = parse_recipe(text, str(resume / "recipe.yaml")), resume
    else:
        name = recipe or (f"finetune_{task}" if task in ("segment", "detect") else "default")
        chosen = of_task(read_recipe(name, override or [], values), task, name if recipe else "the default recipe")
        if task is None and chosen.task == "classify" != (laid_out := task_of(data)):
            raise UserError(f"{data} is laid out for the task {laid_out}; say --task {laid_out}, or --task classify.")
        if image_size is not None:
            chosen = with_image_size(chosen, image_size)
        run = output or new_run_folder(data, chosen)
    machine = Machine(
        device=device,
        precision=precision,
        threads=threads,
        workers=workers,
        deterministic=deterministic,
        compile=compiled,
        shard=shard,
        logs=tuple(log or ()),
        profile=profile,
        allow_bad=allow_bad,
        strict_data=strict_data,
    )
    result = run_training(
        data, chosen, run, resume=resume is not None, changes=(override or []) if resume else (), machine=machine
    )
    if os.environ.get("RANK", "0") != "0":
        return
    write_run_plots(run, result)
    best = run / "model.safetensors"
    _show(
        {"run": str(run), "model": str(best), "val": result.to_dict()},
        as_json,
        [
            f"{best}: val {_told(result)}",
            f"next: nextvit export {best} --to onnx",
            f"      nextvit predict {best} IMAGE...",
        ],
    )


@data_app.command(name="check", epilog="Example: nextvit data check photos --output check.html")
def data_check(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A folder as `train` takes it, or `demo`.")],
    task: Annotated[
        str | None, typer.Option(help="classify, segment or detect; left out: by what lies beside the images.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="FILE.html: the same as a page.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 2 if training would go wrong.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Decode every image, and find what is unreadable, in two splits, twice there, missing, uneven or too small."""
    from dataclasses import asdict

    from nextvit.data.check import check
    from nextvit.data.sets import TASKS, read_split, read_splits, task_of
    from nextvit.report import check_lines, write_check

    if task not in (None, *TASKS):
        raise UserError(f"--task takes {' or '.join(TASKS)}, not {task!r}.")
    splits = read_splits(data, task or task_of(data))
    if not splits:
        read_split(data, "train", task=task or "classify")  # says what is missing
    found = check(splits)
    if output is not None:
        write_check(found, data, output)
    _show({**asdict(found), "serious": found.serious}, as_json, check_lines(found))
    if strict and found.serious:
        raise UserError(f"{data} is not fit to train on as it is; each finding says why.")


@data_app.command(name="pack", epilog="Example: nextvit data pack photos --output photos-shards")
def data_pack(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A folder as `train` takes it, or `demo`.")],
    output: Annotated[
        str, typer.Option(metavar="PLACE", help="A new folder, or a URL that fsspec knows, such as s3://bucket/name.")
    ],
    shard_size: Annotated[int, typer.Option(min=1, help="MB in a shard.")] = 256,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the images as they are into WebDataset shards, which every verb takes as DATA."""
    from nextvit.data.sets import read_splits, task_of
    from nextvit.data.shards import pack

    if (task := task_of(data)) != "classify":
        raise UserError(f"shards hold images of classes, and {data} is laid out to {task}; it is read as it is.")
    counts = pack(read_splits(data), output, shard_mb=shard_size)
    _show({"output": output, "images": counts}, as_json, [*_counted(counts), f"next: nextvit train {output}"])


@data_app.command(name="index", epilog="Example: nextvit data index s3://bucket/shards")
def data_index(
    data: Annotated[str, typer.Argument(metavar="PLACE", help="A folder of .tar files, or a URL that fsspec knows.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make WebDataset shards that others packed readable: writes index.json beside them."""
    from nextvit.data.shards import write_index

    counts = write_index(data)
    _show({"index": data, "images": counts}, as_json, [*_counted(counts), f"next: nextvit train {data}"])


@data_app.command(name="convert", epilog="Example: nextvit data convert VOCdevkit/VOC2012 --output voc")
def data_convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder of Pascal VOC's or YOLO's: images with boxes or polygons.")
    ],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Lay images with objects out as COCO's, which is what detection takes."""
    from nextvit.data.convert import convert

    counts = convert(source, output)
    told = [*_counted(counts), f"next: nextvit train {output} --task detect"]
    _show({"output": str(output), "images": counts}, as_json, told)


@data_app.command(name="get", epilog="Example: nextvit data get flowers102 --output flowers102")
def data_get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="imagenette, flowers102 or pets.")],
    output: Annotated[Path | None, typer.Option(help="A new folder; left out: named as the set.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a public set of images and lay it out as `train` takes it."""
    from nextvit.data.public import fetch

    folder = output or Path(name)
    counts = fetch(name, folder)
    _show({"output": str(folder), "images": counts}, as_json, [*_counted(counts), f"next: nextvit train {folder}"])


@app.command(name="eval", epilog="Example: nextvit eval runs/first/model.safetensors demo")
def evaluate(
    model: Model,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A folder as `train` takes it, or `demo`.")],
    split: Annotated[
        str | None, typer.Option(help="train, val or test; left out: test where there is one, else val.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Test size in pixels; several, as in 192,224,256, make a row each.")
    ] = None,
    crop: Annotated[
        str | None, typer.Option(help="official (256 to 224), timm, or a number; left out: the file's own.")
    ] = None,
    real: Annotated[
        Path | None, typer.Option(metavar="FILE", help="real.json of ImageNet-ReaL: also count by its labels.")
    ] = None,
    scales: Annotated[
        str | None, typer.Option(help="Segmentation: also at other scales, such as 0.5,0.75,1,1.25,1.5,1.75.")
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Segmentation: each image mirrored, too.")] = False,
    window: Annotated[
        int | None, typer.Option(min=32, help="Segmentation: through a window of so many pixels that slides.")
    ] = None,
    boundary: Annotated[bool, typer.Option("--boundary", help="Segmentation: mIoU of the boundaries as well.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="A folder for the confusion matrix, and the classes one by one.")
    ] = None,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = None,
    threads: Threads = None,
    batch_size: BatchSize = 32,
    hint: Hint = "latency",
    allow_bad: Annotated[
        bool, typer.Option("--allow-bad", help="Accept images that cannot be read; they are left out.")
    ] = False,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Accuracy of a classifier, mIoU of a segmentation network, COCO's AP of a detector; of exported files alike."""
    from nextvit.data.loader import batches, eval_transform
    from nextvit.data.sets import default_eval_split, read_split
    from nextvit.devices import cpu_count
    from nextvit.evaluate import evaluate as run_evaluation
    from nextvit.evaluate import prepared_for, real_labels
    from nextvit.extras import need
    from nextvit.report import evaluation_lines, write_evaluation
    from nextvit.runtime.open import open_session
    from nextvit.runtime.predictor import Predictor

    if output is not None:
        need("matplotlib", extra="plots")  # now, not after the last image
    session = open_session(
        model, weights=weights, device=device, threads=threads, precision=precision, hint=hint, trust=trust
    )
    only_masks = {"--scales": scales, "--flip": flip, "--window": window, "--boundary": boundary}
    only_labels = {"--image-size": image_size, "--crop": crop, "--real": real}
    task = session.metadata.task
    others: list[dict[str, Any]] = [only_masks] * (task != "segment") + [only_labels] * (task != "classify")
    if misplaced := [flag for flags in others for flag, value in flags.items() if value]:
        raise UserError(f"{misplaced[0]} has no meaning for the task {task!r}; leave it out.")
    if task == "detect":
        _evaluate_objects(model, session, data, split, output, allow_bad, as_json)
        return
    if task == "segment":
        views = tuple(_numbers("--scales", scales)) if scales else (1.0,)
        _evaluate_masks(model, session, data, split, views, flip, window, boundary, output, allow_bad, as_json)
        return
    predictor = Predictor(session)
    _warn_of_random_weights(model, weights)
    part = read_split(data, split or default_eval_split(data), predictor.labels)
    accepted = real_labels(real, part) if real is not None else None
    sizes = _counts("--image-size", image_size) if image_size else [None]
    records = [prepared_for(predictor.metadata, size, crop) for size in sizes]
    loaders = min(8, cpu_count()) if predictor.session.setup.device.startswith("cuda") else 0
    if predictor.metadata.takes_pixels:
        batch_size = 1  # images of any size do not stack
    results = []
    for record in records:
        source = batches(part, eval_transform(record), batch_size=batch_size, workers=loaders)
        label = f"evaluate at {record.preprocess.image_size}" if len(records) > 1 else "evaluate"
        total = -(-len(part) // batch_size)
        result = run_evaluation(predictor.run, source, part, total=total, label=label, real=accepted)
        if result.rejected and not allow_bad:
            raise _not_all(result.rejected, len(part))
        results.append((record.preprocess, result))
    if output is not None:
        write_evaluation(results, output)
    p, first = results[0]
    told = {"model": model, "setup": vars(predictor.session.setup), "preprocess": vars(p), **first.to_dict()}
    if len(results) > 1:
        told["sizes"] = [{"preprocess": vars(p), **result.to_dict()} for p, result in results]
    _show(told, as_json, evaluation_lines(results, predictor.session.setup))


@app.command(epilog="Example: nextvit predict runs/first/model.safetensors photos/ --output answers.jsonl")
def predict(
    model: Model,
    source: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Images, folders, globs.")],
    output: Annotated[
        Path | None, typer.Option(help="FILE.jsonl or FILE.csv; left out: JSON Lines on standard output.")
    ] = None,
    save_images: Annotated[
        Path | None,
        typer.Option(help="Also write each image, with its label, classes or objects on it, into this folder."),
    ] = None,
    save_masks: Annotated[
        Path | None, typer.Option(help="Segmentation: also a PNG of the class of each pixel, into this folder.")
    ] = None,
    save_polygons: Annotated[
        Path | None, typer.Option(help="Segmentation: also each class's regions as GeoJSON, into this folder.")
    ] = None,
    save_coco: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Detection: also all objects as COCO's results.")
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(min=64, help="Segmentation: images as they are, in tiles of so many pixels: for very large ones."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an --output that was interrupted, after its last whole row.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 2 if any file cannot be used.")] = False,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = None,
    threads: Threads = None,
    batch_size: BatchSize = 16,
    hint: Hint = "latency",
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer images: one row a file, in order, with labels, the classes of pixels or objects, or why there is none."""
    from nextvit.data.sources import expand
    from nextvit.extras import need
    from nextvit.progress import say, track
    from nextvit.results import (
        collecting,
        draw,
        interrupted_rows,
        open_results,
        picture_name,
        write_coco,
        write_mask,
        write_polygons,
    )
    from nextvit.runtime.open import open_session
    from nextvit.runtime.predictor import Predictor
    from nextvit.tasks.detect import Detections
    from nextvit.tasks.segment import Segmentation

    files = expand(source)
    session = open_session(
        model, weights=weights, device=device, threads=threads, precision=precision, hint=hint, trust=trust
    )
    predictor = Predictor(session)
    predictor.insist_on_answers()
    only = {"segment": {"--save-masks": save_masks, "--save-polygons": save_polygons, "--tile": tile}}
    only |= {"detect": {"--save-coco": save_coco}}
    given = [flag for task, flags in only.items() if task != predictor.task for flag, value in flags.items() if value]
    if given:
        raise UserError(f"{given[0]} has no meaning for the task {predictor.task!r}; leave it out.")
    folders = [folder for folder in (save_images, save_masks, save_polygons) if folder is not None]
    if len({os.path.abspath(folder) for folder in folders}) < len(folders):
        raise UserError("pictures, masks and polygons have the same names; give each a folder of its own.")
    if save_coco is not None and resume:
        raise UserError("--save-coco needs the objects of all files, so it does not go with --resume.")
    if predictor.task == "detect":
        need("faster_coco_eval.core.mask", extra="detect")  # now, not after the first image
    if save_polygons is not None:
        need("cv2", extra="segment")  # now, not after the first image
    _warn_of_random_weights(model, weights)
    done, good = interrupted_rows(output, files) if resume else (0, 0)
    if done:
        say(f"going on after {done} of {len(files)} files.")
    rows: list[dict[str, Any]] = []
    objects: list[tuple[Path, Detections]] = []
    collect = as_json and str(output or "-") == "-"  # one object on standard output, and nothing else there
    with collecting(rows) if collect else open_results(output, go_on=done > 0) as write:
        answers = track(
            predictor.stream(files[done:], batch_size=batch_size, tile=tile),
            total=len(files),
            label="predict",
            unit="images",
            done=done,
        )
        for number, (file, result) in enumerate(answers, done + 1):
            write(file, result)
            if not isinstance(result, str):
                good += 1
                name = picture_name(number, file)
                if save_images is not None:
                    draw(file, result, save_images / f"{name}.png")
                if isinstance(result, Detections) and save_coco is not None:
                    objects.append((file, result))
                if isinstance(result, Segmentation) and save_masks is not None:
                    write_mask(result, save_masks / f"{name}.png")
                if isinstance(result, Segmentation) and save_polygons is not None:
                    write_polygons(result, save_polygons / f"{name}.geojson")
    if save_coco is not None:
        write_coco(save_coco, objects)
    bad = len(files) - good
    if as_json:
        counts = {"files": len(files), "answered": good, "rejected": bad}
        _show({**counts, "answers": rows} if collect else {**counts, "output": str(output)}, True)
    if not good or (strict and bad):
        raise UserError(f"{bad} of {len(files)} files could not be read; each row says why.")
    if bad:
        print(f"note: {bad} of {len(files)} files could not be read; each row says why.", file=sys.stderr)


@app.command(epilog="Example: nextvit export runs/first/model.safetensors --to onnx")
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A variant's name or a checkpoint.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help=f"{', '.join(f.name for f in FORMATS)}.")],
    output: Annotated[
        Path | None, typer.Option(help="The file; left out: named for variant, size and precision.")
    ] = None,
    weights: Weights = None,
    image_size: ImageSize = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16 or int8, where the format has it.")] = "fp32",
    calibration: Annotated[
        str | None, typer.Option(metavar="DATA", help="For int8: a folder of images like those to come, or `demo`.")
    ] = None,
    max_drop: Annotated[
        float, typer.Option(min=0, help="For int8: points of accuracy that may be lost; layers stay float to keep it.")
    ] = 0.5,
    qat_epochs: Annotated[
        int, typer.Option(min=0, help="For int8: passes of quantisation-aware fine-tuning over the calibration images.")
    ] = 0,
    force: Annotated[bool, typer.Option("--force", help="Write int8 whatever it loses; the report says it.")] = False,
    static: Annotated[
        bool, typer.Option("--static", help="Fix batch 1 and the image size; else all three stay free.")
    ] = False,
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="The file takes uint8 images of any size and prepares them itself.")
    ] = False,
    class_map: Annotated[
        bool, typer.Option("--class-map", help="Segmentation: the file gives the class of each pixel, not logits.")
    ] = False,
    stages: Annotated[
        bool, typer.Option("--stages", help="Compare what each stage gives too, to find where a file goes wrong.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fold, write, and prove on real images that the file answers as the model does; else it is not kept."""
    from nextvit.exporters.export import default_path
    from nextvit.exporters.export import export as run_export
    from nextvit.formats import format_named, format_of
    from nextvit.report import export_lines
    from nextvit.runtime.open import open_network

    fmt = format_named(to)
    if output is not None and format_of(output) != fmt:
        raise UserError(f"--to {to} writes {fmt.suffix} files; --output {output} ends otherwise.")
    network = open_network(model, weights)
    metadata = network.metadata.with_image_size(image_size)
    metadata = replace(metadata, precision=precision, takes_pixels=preprocess, gives_classes=class_map)
    path = output or default_path(model, metadata, to)
    report = run_export(
        network,
        path,
        image_size=image_size,
        precision=precision,
        calibration=calibration,
        max_drop=None if force else max_drop,
        qat_epochs=qat_epochs,
        dynamic=not static,
        preprocess=preprocess,
        class_map=class_map,
        stages=stages,
    )
    _show(report.to_dict(), as_json, export_lines(report))


@app.command(epilog="Example: nextvit benchmark nextvit_nano --runtimes eager,folded,onnx,openvino --image-size 224")
def benchmark(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL...]", help="Variants, checkpoints, exported files; all is compared to the first."
        ),
    ] = None,
    runtimes: Annotated[
        str,
        typer.Option(
            help="For variants and checkpoints, of eager, folded, compiled, graph (NVIDIA GPUs alone); or of "
            f"{', '.join(RUN)}, exported first."
        ),
    ] = "folded",
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of fp32, bf16, fp16: a row for each that the runtime has; left out: the file's own, or fp32."
        ),
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Images a call; several, as in 1,8,32, make a row each.")] = "1",
    image_size: ImageSize = None,
    rounds: Annotated[int, typer.Option(min=8, help="Interleaved rounds, each measures every row once.")] = 20,
    weights: Weights = None,
    device: Device = "auto",
    threads: Annotated[
        str | None, typer.Option(help="CPU threads; several, as in 1,2, make a row each; left out: all cores.")
    ] = None,
    hint: Annotated[
        str, typer.Option(help="Of latency, throughput (OpenVINO: parts of a batch side by side): a row for each.")
    ] = "latency",
    memory: Annotated[
        bool, typer.Option("--memory", help="Also the size of the file, the time to open it and the memory it takes.")
    ] = False,
    images: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Also where the time of an image goes, on these files; may be repeated."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Instead of models: how fast `train` would get the images of DATA."),
    ] = None,
    recipe: RecipeName = "default",
    workers: Annotated[
        str | None, typer.Option(help="With --data: loading processes; left out: 0, 1 and one for each core.")
    ] = None,
    seed: Seed = None,
    output: Annotated[Path | None, typer.Option(help="FILE.csv; a plot is drawn beside it.")] = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Latency, throughput and memory of models, runtimes and precisions side by side, in one interleaved run."""
    if data is not None:
        if model:
            raise UserError("--data measures how images are loaded, without a model; leave the models out.")
        others = (runtimes, precision, batch_size, weights, device, threads, hint, memory, images, trust)
        if others != ("folded", None, "1", None, "auto", None, "latency", False, None, False):
            raise UserError("--data goes with --recipe, --workers, --image-size, --rounds, --seed and --output alone.")
        _benchmark_loading(data, recipe, image_size, seed, workers, rounds, output, as_json)
        return
    if workers is not None or recipe != "default":
        raise UserError("--recipe and --workers go with --data.")
    if not model:
        raise UserError("give a model to measure, or --data to measure how images are loaded.")
    from nextvit.benchmark import benchmark as run_benchmark
    from nextvit.candidates import open_candidates, with_footprints, with_pipelines
    from nextvit.data.sources import expand
    from nextvit.devices import cpu_count
    from nextvit.pipeline import measure_pipelines
    from nextvit.report import latency_lines, write_latency

    batches = _counts("--batch-size", batch_size)
    files = expand(images) if images else []
    with open_candidates(
        model,
        runtimes=runtimes.split(","),
        precisions=precision.split(",") if precision else [None],
        weights=weights,
        device=device,
        threads=_counts("--threads", threads) if threads else [cpu_count()],
        image_size=image_size,
        hints=hint.split(","),
        trust=trust,
    ) as candidates:
        sessions = [(candidate.model, candidate.session) for candidate in candidates]
        pipelines = measure_pipelines([session for _, session in sessions], files, image_size) if files else []
        rows = run_benchmark(sessions, batches=batches, image_size=image_size, rounds=rounds, seed=seed or 0)
        if pipelines:
            rows = with_pipelines(rows, pipelines)
        if memory:
            rows = with_footprints(rows, candidates)
    _show({"rows": [row.to_dict() for row in rows]}, as_json, latency_lines(rows))
    if output is not None:
        write_latency(rows, output)


@app.command(epilog="Example: nextvit reproduce table4 --only Next-ViT --only ResNet101 --runtimes openvino")
def reproduce(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="table1, 2, 4 to 9; figure1, of 4, 5 and 6; or all.")],
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Rows whose name has this in it alone; may be repeated."),
    ] = None,
    costs: Annotated[
        bool, typer.Option("--costs", help="Parameters and operations, and no latency: nothing is measured.")
    ] = False,
    train: Annotated[
        list[str] | None,
        typer.Option(metavar="DATA", help="Train every row on it: demo, or ImageNet, ADE20K, COCO, one by one."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="On demo: of classify, segment, detect; left out: classify.")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Trainings of each row; left out: 3 on demo, 1 on other images.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A value of the recipes that rows are trained by."),
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(metavar="DATA", help="Evaluate every row that has weights on these images.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Weight files to evaluate, each named as its MODEL is.")
    ] = None,
    runtimes: Annotated[
        str | None, typer.Option(help="Of torch, onnx, openvino, coreml, cuda, tensorrt; left out: all that are here.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of fp32, fp16, bf16, int8; left out: all that a runtime has.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Images a call; several, as in 1,8, make a column each.")] = "1",
    rounds: Annotated[int, typer.Option(min=8, help="Interleaved rounds of a row and its anchor.")] = 12,
    threads: AllThreads = None,
    output: Annotated[
        Path, typer.Option(help="A folder; what it holds from an earlier run is not measured again.")
    ] = Path("reproduced"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The paper's tables on this machine: costs counted, latencies measured, beside what is printed."""
    from nextvit.extras import need

    need("pydantic", extra="train")  # what is imported next reads recipes and records with it
    need("plotly", extra="plots")  # before what takes hours
    need("scipy.stats", extra="peers")
    from nextvit.accuracies import place_of, study_of
    from nextvit.data.sets import task_of
    from nextvit.describe import table as as_table
    from nextvit.paper import ABLATION_TABLES, TABLES, paper_rows
    from nextvit.reproduce import chosen_setups
    from nextvit.reproduced import rerun, summary, write_readme
    from nextvit.tradeoff import figure1

    known = sorted((*TABLES, *ABLATION_TABLES))
    if what not in (*known, "figure1", "all"):
        raise UserError(f"there is no {what!r} to reproduce; take one of {', '.join(known)}, figure1, all.")
    setups = chosen_setups(*(asked.split(",") if asked else () for asked in (runtimes, precision)))
    batches = _counts("--batch-size", batch_size)
    if not train and (task or seeds or overrides):
        raise UserError("--task, --seeds and --set are about training; give --train DATA, or leave them out.")
    study = study_of(train, task.split(",") if task else (), seeds, overrides or ()) if train else None
    if weights is not None and (evaluate is None or not weights.is_dir()):
        raise UserError("--weights is a folder of weight files, and goes with --evaluate DATA.")
    if evaluate is not None:
        place_of(evaluate, task_of(evaluate))  # refused before anything is measured
    done = {}
    for table in {"figure1": TABLES, "all": known}.get(what, (what,)):
        rows = [row for row in paper_rows(table) if not only or any(part.lower() in row.name.lower() for part in only)]
        if rows:
            done[table] = rerun(
                table,
                rows,
                output,
                setups=setups,
                batches=batches,
                threads=threads,
                rounds=rounds,
                costs_alone=costs,
                study=study,
                evaluated=(evaluate, weights) if evaluate else None,
            )
    if not done:
        raise UserError(f"no row of {what} has {' or '.join(map(repr, only or []))} in its name.")
    lines = [
        line for one in done.values() for line in (*as_table(one.lines()), f"the page, with all of it: {one.page}")
    ]
    side_by_side = [(done[table].rows, done[table].found) for table in TABLES if table in done]
    try:
        if what in ("figure1", "all") and side_by_side:
            figure1(side_by_side, output / "figure1.png")
            lines.append(f"the figure: {output / 'figure1.png'}, as .svg, and to point at, {output / 'figure1.html'}")
    except UserError as error:
        if what == "figure1":
            raise
        lines.append(f"no figure: {error}")
    finally:
        write_readme(output)
    _show({table: summary(one) for table, one in done.items()}, as_json, lines)


@app.command(epilog="Example: nextvit fit --device-runtime openvino --precision fp32 --budget 10ms")
def fit(
    budget: Annotated[str, typer.Option(metavar="TIME", help="Milliseconds for one image, as in 10ms.")],
    device_runtime: Annotated[str, typer.Option(help="torch, onnx, openvino, coreml, cuda or tensorrt.")] = "openvino",
    precision: Annotated[str, typer.Option(help="Of fp32, fp16, bf16, int8 one that the runtime has.")] = "fp32",
    sizes: Annotated[str | None, typer.Option(help="Pixels a side to choose from, as in 160,224.")] = None,
    frames: Annotated[str | None, typer.Option(help="Variants whose widths to choose from, with commas.")] = None,
    mix: Annotated[float, typer.Option(min=0, max=1, help="r, the share of E-MHSA in an NTB.")] = 0.75,
    rounds: Annotated[int, typer.Option(min=8, help="Interleaved rounds of each measurement.")] = 12,
    threads: AllThreads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The network with the most promise within a budget of latency, from what blocks cost on this device."""
    from dataclasses import asdict

    from nextvit.describe import table
    from nextvit.devices import cpu_count
    from nextvit.fit import FRAMES, SIZES, Device, budget_of, build, fit, fitted_row
    from nextvit.reproduce import chosen_setups, machine

    wanted = budget_of(budget)
    ((runtime, kind),) = chosen_setups([device_runtime], [precision])
    chosen = tuple(frames.split(",")) if frames else FRAMES
    if unknown := [name for name in chosen if name not in FRAMES]:
        raise UserError(f"there are no widths of {unknown[0]!r}; take of {', '.join(FRAMES)}.")
    places = tuple(_counts("--sizes", sizes, least=64)) if sizes else SIZES
    device = Device(runtime, kind, threads or cpu_count(), machine())
    found = fit(wanted, device, frames=chosen, sizes=places, mix=mix, rounds=rounds)
    fitted = [build(candidate, device, rounds) for candidate in found]
    kept = next((one for one in fitted if one.measured_ms <= wanted), None)
    lines = table([fitted_row(one) for one in fitted])
    if kept is None:
        lines.append(
            f"none keeps {wanted:g} ms when it is measured; allow more, or ask again for less: "
            f"{round(wanted * 0.95, 3):g}ms"
        )
    else:
        c = kept.candidate
        lines.append(f"next: nextvit train FOLDER --model {c.configuration.name} --image-size {c.image_size}")
    shown = {"candidates": [fitted_row(one) for one in fitted], "device": asdict(device)}
    _show({**shown, "chosen": None if kept is None else fitted_row(kept)}, as_json, lines)


@app.command(epilog="Example: nextvit explain runs/first/model.safetensors photo.png --output explained")
def explain(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A variant, `timm:NAME`, or a weight file.")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Images, or folders of them.")],
    weights: Weights = None,
    beside: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Another network, shown beside it; may be repeated.")
    ] = None,
    label: Annotated[
        str | None, typer.Option("--class", metavar="NAME", help="Evidence for this class, not for the own answer.")
    ] = None,
    stage: Annotated[int | None, typer.Option(min=1, help="Whose maps are weighed; left out: by the task.")] = None,
    output: Annotated[Path, typer.Option(help="A folder for the pictures and their page.")] = Path("explained"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a network looks at: heat maps of its answers, and the frequencies of its maps."""
    from nextvit.data.images import ImageRejected, printable, read_image
    from nextvit.data.sources import expand
    from nextvit.explain import NotFound, heat, spectra
    from nextvit.explained import titles, write_explained
    from nextvit.progress import track
    from nextvit.runtime.open import open_network

    names = [model, *(beside or [])]
    networks = [open_network(name, weights if number == 0 else None) for number, name in enumerate(names)]
    for number, name in enumerate(names):
        _warn_of_random_weights(name, weights if number == 0 else None)
    files, heats, read, bad = expand(images), [], [], []
    for file in track(files, total=len(files), label="explain", unit="images"):
        try:
            image = read_image(file)
            row = [heat(network, image, label=label, stage=stage) for network in networks]
        except ImageRejected as error:
            bad.append(str(error))
        except NotFound as error:
            bad.append(f"{printable(file)}: {error}")
        else:
            heats.append(row)
            read.append(file)
    if not read:
        raise UserError(f"none of {len(files)} images can be explained: {bad[0]}")
    found = []
    for network, name in zip(networks, names, strict=True):  # read again: whole images of a folder need not fit
        again = track(map(read_image, read), total=len(read), label=f"frequencies of {name}", unit="images")
        found.append(spectra(network, again))
    called = titles(names, [network.metadata.variant for network in networks])
    page = write_explained(called, [str(file) for file in read], heats, found, output)
    answers = {str(file): [one.answer for one in row] for file, row in zip(read, heats, strict=True)}
    lines = [f"{printable(file)}: {'; '.join(row)}" for file, row in answers.items()]
    lines += [f"left out: {why}" for why in bad]
    _show({"answers": answers, "left_out": bad, "page": str(page)}, as_json, [*lines, f"the page: {page}"])


def _benchmark_loading(
    data: str,
    name: str,
    image_size: int | None,
    seed: int | None,
    workers: str | None,
    rounds: int,
    output: Path | None,
    as_json: bool,
) -> None:
    from nextvit.data.sets import read_split
    from nextvit.devices import cpu_count
    from nextvit.loading import measure_loading, measure_parts
    from nextvit.recipe import read_recipe, with_image_size
    from nextvit.report import loading_lines, write_loading

    recipe = read_recipe(name, values={} if seed is None else {"seed": seed})
    if image_size is not None:
        recipe = with_image_size(recipe, image_size)
    split = read_split(data, "train", task=recipe.task)
    counts = _counts("--workers", workers, least=0) if workers else sorted({0, 1, cpu_count()})
    parts = measure_parts(split, recipe)
    rows = measure_loading(split, recipe, workers=counts, rounds=rounds)
    shown = {"images": len(split), "recipe": name, "image_size": recipe.side, "parts": vars(parts)}
    _show({**shown, "rows": [row.to_dict() for row in rows]}, as_json, loading_lines(rows, parts, recipe, rounds))
    if output is not None:
        write_loading(rows, output)


# ---- what the verbs share --------------------------------------------------------------------------------------------


def _evaluate_masks(
    model: str,
    session: "Session",
    data: str,
    split: str | None,
    scales: tuple[float, ...],
    flip: bool,
    window: int | None,
    boundary: bool,
    output: Path | None,
    allow_bad: bool,
    as_json: bool,
) -> None:
    """`eval` of a segmentation network."""
    from nextvit.data.masks import mask_split
    from nextvit.data.sets import default_eval_split
    from nextvit.evaluate import evaluate_masks
    from nextvit.report import mask_evaluation_lines, write_mask_evaluation
    from nextvit.tasks.segment import View

    part = mask_split(data, split or default_eval_split(data, "segment"), session.metadata.labels or None)
    if part.faults and not allow_bad:
        raise UserError(f"{part.faults[0]} Mend it, or leave such out with --allow-bad.")
    if len(part.labels) != session.metadata.num_classes:
        raise UserError(f"{data} has {len(part.labels)} classes, and {model} {session.metadata.num_classes}.")
    view, p = View(scales, flip, window), session.metadata.preprocess
    result = evaluate_masks(session, part, session.metadata, view, boundary=boundary)
    if result.rejected and not allow_bad:
        raise _not_all(result.rejected, len(part))
    if output is not None:
        write_mask_evaluation(result, output)
    told = {"model": model, "setup": vars(session.setup), "preprocess": vars(p), "view": vars(view)}
    _show({**told, **result.to_dict()}, as_json, mask_evaluation_lines(result, p, view, session.setup))


def _evaluate_objects(
    model: str, session: "Session", data: str, split: str | None, output: Path | None, allow_bad: bool, as_json: bool
) -> None:
    """`eval` of a detector."""
    from nextvit.data.objects import object_split
    from nextvit.data.sets import default_eval_split
    from nextvit.errors import first_few
    from nextvit.evaluate import evaluate_objects
    from nextvit.report import object_evaluation_lines, write_object_evaluation
    from nextvit.runtime.predictor import Predictor

    predictor = Predictor(session)
    part = object_split(data, split or default_eval_split(data, "detect"), session.metadata.labels or None)
    if (wrong := part.faults + part.misshapen) and not allow_bad:
        raise UserError(f"{len(wrong)} entries of {part.name} are none: {first_few(wrong)}. Mend them, or --allow-bad.")
    if len(part.labels) != session.metadata.num_classes:
        raise UserError(f"{data} has {len(part.labels)} classes, and {model} {session.metadata.num_classes}.")
    predictor.insist_on_answers()
    result = evaluate_objects(predictor.run, part, session.metadata)
    if result.rejected and not allow_bad:
        raise _not_all(result.rejected, len(part))
    if output is not None:
        write_object_evaluation(result, output)
    p = session.metadata.preprocess
    told = {"model": model, "setup": vars(session.setup), "preprocess": vars(p)}
    _show({**told, **result.to_dict()}, as_json, object_evaluation_lines(result, p, session.setup))


def _not_all(rejected: Sequence[tuple[int, str]], images: int) -> UserError:
    return UserError(
        f"{len(rejected)} of {images} images cannot be read, so there is no figure for all of them: {rejected[0][1]} "
        "Mend them, or leave them out with --allow-bad."
    )


def _warn_of_random_weights(model: str, weights: str | None) -> None:
    from nextvit.create import is_variant
    from nextvit.foreign import is_foreign

    if (is_variant(model) or is_foreign(model)) and weights is None:
        print(f"warning: {model} has random weights here; give a checkpoint, or --weights.", file=sys.stderr)


def _numbers(flag: str, text: str) -> list[float]:
    """Numbers above 0, with commas between them."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0 < number < 100 for number in found):
        raise UserError(f"{flag} takes numbers above 0, with commas between them, not {text!r}.")
    return found


def _counts(flag: str, text: str, *, least: int = 1) -> list[int]:
    """Whole numbers, with commas between them."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= least for part in parts):
        raise UserError(f"{flag} takes whole numbers from {least}, with commas between them, not {text!r}.")
    return [int(part) for part in parts]


def _counted(counts: dict[str, int]) -> list[str]:
    return [f"{name}: {count} images" for name, count in counts.items()]


def _told(result: Any) -> str:
    m = result.metrics
    if "box_ap" in result.numbers:
        return f"{result.told} ({len(result.split) - len(result.rejected)} images)"
    if "miou" in result.numbers:
        return f"mIoU {m.miou:.2f} % ({len(result.split) - len(result.rejected)} images)"
    return f"top-1 {m.top1:.2f} % (standard error {m.standard_error:.2f}, {m.images} images)"


def _show(values: Any, as_json: bool, lines: Sequence[str] | None = None) -> None:
    """Print a result: one JSON object, or lines for a person."""
    if as_json:
        print(json.dumps(values))
    else:
        from nextvit.describe import as_lines

        print("\n".join(lines if lines is not None else as_lines(values)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code: 0 done, 2 the user can mend it, 1 anything else, 130 after SIGINT."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # a process of its own: SIGTERM ends it as an exception does, so nothing is left half-written
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)

    def run() -> object:
        try:
            return app(given, prog_name="nextvit", standalone_mode=False)
        except USAGE_ERROR as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # a group of verbs alone: its help is the answer
                print(error.format_message(), file=sys.stderr)
                return 2
            sentence = error.format_message().rstrip(".")
            raise UserError(f"{sentence}; `nextvit VERB --help` tells what it takes.") from error
        except typer.Abort as error:
            raise KeyboardInterrupt from error
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1

    return exit_code(run, debug="--debug" in given)
