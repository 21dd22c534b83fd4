"""Rows of `nextvit predict`: JSON Lines, CSV, and pictures."""

import csv
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from PIL import Image, ImageDraw, ImageFont

from nextvit import class_names
from nextvit.data.images import MAX_TILED_PIXELS, printable, read_image
from nextvit.errors import UserError
from nextvit.files import replacing, write_text
from nextvit.progress import say
from nextvit.runtime.predictor import Result
from nextvit.tasks.classify import Classification
from nextvit.tasks.detect import Detections
from nextvit.tasks.segment import Segmentation, palette

Answer = Result | str  # a result, or why there is none
Write = Callable[[Path, Answer], None]
PICTURE_SIDE = 512  # pixels of the longer side, at the most
LEGEND = 12  # classes that are named beside a picture


@contextmanager
def open_results(output: Path | None, *, go_on: bool = False) -> Iterator[Write]:
    """A function that writes one row a file. The output takes its name when all rows are in it.

    Until then, and for good if something ends it, the rows lie in OUTPUT.partial: each is written when it is known.
    go_on: behind the rows that are there already.
    """
    if output is None or output == Path("-"):
        yield _json_lines(sys.stdout)
    elif output.suffix.lower() in (".jsonl", ".csv"):
        partial = output.with_name(f"{output.name}.partial")
        try:
            if output.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
            output.parent.mkdir(parents=True, exist_ok=True)
            stream = open(partial, "a" if go_on else "w", buffering=1, encoding="utf-8", newline="")  # noqa: SIM115 - closed below
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror}; choose another --output.") from error
        try:
            with stream:
                yield (_csv(stream, header=not go_on) if output.suffix.lower() == ".csv" else _json_lines(stream))
            os.replace(partial, output)
        except BaseException:
            say(f"the rows so far are kept in {partial}; go on with the same command and --resume.")
            raise
    else:
        raise UserError(f"--output {output} must end in .jsonl or .csv.")


def interrupted_rows(output: Path | None, files: Sequence[Path]) -> tuple[int, int]:
    """(rows, rows with a result) that an interrupted run left in OUTPUT.partial; a row cut short is taken away.

    Raises UserError where those rows are not of the first of `files`.
    """
    if output is None or output == Path("-"):
        raise UserError("--resume goes on with an --output; give the one that was interrupted.")
    partial = output.with_name(f"{output.name}.partial")
    if not partial.exists():
        return 0, 0
    content = partial.read_bytes()
    content = content[: content.rfind(b"\n") + 1]
    try:
        text = content.decode("utf-8")
        if output.suffix.lower() == ".csv":
            found = list(csv.DictReader(io.StringIO(text)))
            names, expected = [row["file"] for row in found], [_cell(printable(file)) for file in files]
        else:
            found = [json.loads(line) for line in text.splitlines()]
            names, expected = [row["file"] for row in found], [str(file) for file in files]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{partial} holds no rows of predict; remove it to begin anew.") from error
    if names != expected[: len(names)]:
        raise UserError(f"{partial} holds rows of other files; give the same SOURCE, or remove it to begin anew.")
    with open(partial, "r+b") as file:
        file.truncate(len(content))
    return len(found), sum(not row.get("error") for row in found)


@contextmanager
def collecting(rows: list[dict[str, Any]]) -> Iterator[Write]:
    """The same, into a list."""
    yield lambda file, answer: rows.append(_row(file, answer))


def _row(file: Path, answer: Answer) -> dict[str, Any]:
    return {"file": str(file), **({"error": answer} if isinstance(answer, str) else answer.to_dict())}


def _json_lines(stream: TextIO) -> Write:
    def write(file: Path, answer: Answer) -> None:
        stream.write(json.dumps(_row(file, answer)) + "\n")

    return write


def _csv(stream: TextIO, *, header: bool) -> Write:
    writer = csv.writer(stream, lineterminator="\n")
    if header:
        writer.writerow(["file", "label", "score", "error"])

    def write(file: Path, answer: Answer) -> None:
        name = _cell(printable(file))
        row = ["", "", answer]
        if not isinstance(answer, str):
            label, score = _first(answer)
            row = [_cell(label), f"{score:.6f}", ""]
        writer.writerow([name, *row])

    return write


def _first(answer: Result) -> tuple[str, float]:
    """The first label and its probability; of segmentation the largest class and its share of the pixels; of detection
    the surest object, if there is one.
    """
    if isinstance(answer, Classification):
        return answer.labels[0], answer.scores[0]
    if isinstance(answer, Detections):
        return (answer.labels[answer.classes[0]], float(answer.scores[0])) if len(answer) else ("", 0.0)
    largest = answer.present[0]
    return answer.labels[largest], int(answer.pixels[largest]) / answer.classes.size


def _cell(text: str) -> str:
    """A spreadsheet takes a cell that begins so for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def picture_name(number: int, file: Path) -> str:
    """NUMBER-NAME, for what is written of an image: two files may have one name."""
    return f"{number:06}-{printable(file.stem)[:60]}"


def write_mask(answer: Segmentation, path: Path) -> None:
    """The class of each pixel as a PNG, whose palette shows them apart."""
    with replacing(path) as unfinished:
        answer.image().save(unfinished, format="PNG")


def write_coco(path: Path, found: Sequence[tuple[Path, Detections]]) -> None:
    """COCO's results: image_id is the number that each file is named for, or else its place among the files, from 1.

    Categories are COCO's own where the labels are, else numbered from 1.
    """
    numbers = [int(file.stem) if file.stem.isdecimal() else None for file, _ in found]
    named = None not in numbers and len(set(numbers)) == len(numbers)
    rows = []
    for place, ((file, answer), number) in enumerate(zip(found, numbers, strict=True), 1):
        identity = {"image_id": number if named else place, "file_name": printable(file.name)}
        rows += [identity | row for row in answer.as_coco(class_names.coco_ids(answer.labels))]
    write_text(path, json.dumps(rows))


def write_polygons(answer: Segmentation, path: Path) -> None:
    """The regions of each class as GeoJSON has them, in pixels."""
    with replacing(path) as unfinished, open(unfinished, "w", encoding="utf-8") as stream:
        stream.writelines(answer.geojson())


def draw(file: Path, answer: Result, path: Path) -> None:
    """Write a copy of the image with its first label and score below it, or with its classes or objects over it, as
    PNG.
    """
    if isinstance(answer, Detections):
        with replacing(path) as unfinished:
            answer.drawn(read_image(file)).save(unfinished, format="PNG")
        return
    if isinstance(answer, Segmentation):
        _draw_classes(file, answer, path)
        return
    image = read_image(file)
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    text = f"{printable(answer.labels[0])} {answer.scores[0]:.0%}"
    font = ImageFont.load_default(16)
    width = max(image.width, int(font.getlength(text)) + 12)
    picture = Image.new("RGB", (width, image.height + 26), "white")
    picture.paste(image, ((width - image.width) // 2, 0))
    ImageDraw.Draw(picture).text((6, image.height + 3), text, fill="black", font=font)
    with replacing(path) as unfinished:
        picture.save(unfinished, format="PNG")


def _draw_classes(file: Path, answer: Segmentation, path: Path) -> None:
    """The colours of the classes over the image, and which is which on its right."""
    overlay = answer.overlay(read_image(file, most=MAX_TILED_PIXELS))
    font, colours = ImageFont.load_default(16), palette(len(answer.labels))
    lines = [
        (f"{printable(answer.labels[n])[:30]} {answer.pixels[n] / answer.classes.size:.0%}", tuple(colours[n].tolist()))
        for n in answer.present[:LEGEND]
    ]
    width = int(max(font.getlength(text) for text, _ in lines)) + 40
    picture = Image.new("RGB", (overlay.width + width, max(overlay.height, 24 * len(lines) + 6)), "white")
    picture.paste(overlay, (0, 0))
    pen = ImageDraw.Draw(picture)
    for number, (text, colour) in enumerate(lines):
        left, top = overlay.width + 8, 24 * number + 5
        pen.rectangle((left, top, left + 16, top + 16), fill=colour)
        pen.text((left + 24, top - 1), text, fill="black", font=font)
    with replacing(path) as unfinished:
        picture.save(unfinished, format="PNG")
