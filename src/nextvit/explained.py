"""What `nextvit explain` leaves: heat maps side by side, spectra, and a page of both."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from nextvit import plots, report
from nextvit.data.images import printable
from nextvit.explain import Heat, Spectrum
from nextvit.files import replacing, write_rows

SHOWN = 320  # pixels of the longer side of a picture


def titles(names: Sequence[str], variants: Sequence[str]) -> list[str]:
    """What networks are called in pictures: their variants; where two are of one, the end of the MODEL with it; and
    numbered where that is the same, too, as with and without weights.
    """
    ends = [
        variant if name == variant else f"{variant}, {'/'.join(Path(name).parts[-2:])}"
        for name, variant in zip(names, variants, strict=True)
    ]
    numbered = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return next(list(some) for some in (variants, ends, names, numbered) if len(set(some)) == len(names))


def write_explained(
    names: Sequence[str],
    images: Sequence[str],
    heats: Sequence[Sequence[Heat]],
    spectra: Sequence[Sequence[Spectrum]],
    folder: Path,
) -> Path:
    """A page with a row of pictures an image and a plot of the spectra, and all of it as files; returns the page.

    heats: of each image, one a network. spectra: of each network.
    """
    rows = [
        {
            "network": name,
            "map": one.point,
            "frequency_pi": f"{frequency:.4f}",
            "relative_log_amplitude": f"{value:.5f}",
        }
        for name, some in zip(names, spectra, strict=True)
        for one in some
        for frequency, value in zip(one.frequencies, one.log_amplitude, strict=True)
    ]
    write_rows(folder / "spectra.csv", rows)
    picture = folder / "spectra.png"
    plots.spectra([(n, [(s.point, s.frequencies, s.log_amplitude) for s in some])
                   for n, some in zip(names, spectra, strict=True)], picture)  # fmt: skip
    parts = [
        report.paragraph(
            "Red is what speaks for the answer (HiResCAM), or what E-MHSA's queries attend to; blue is what does not. "
            "Each picture is the image as the network sees it."
        )
    ]
    for number, (image, row) in enumerate(zip(images, heats, strict=True)):
        parts.append(report.heading(printable(Path(image).name)))
        strip = folder / f"heat-{number + 1:03}.png"
        told = [(name, heat) for name, heat in zip(names, row, strict=True)]
        with replacing(strip) as unfinished:
            _strip([heat for _, heat in told]).save(unfinished, format="PNG")
        seen = "; ".join(f"{name}: {heat.answer}" + ", and its attention" * (heat.attention is not None)
                         for name, heat in told)  # fmt: skip
        parts += [report.picture(strip, f"heat maps of {printable(image)}"), report.paragraph(f"The image; {seen}.")]
    parts += [
        report.heading("Frequencies of the maps"),
        report.picture(picture, "log amplitude against frequency"),
        report.paragraph(
            "The higher a line stays, the more of fine detail a map has. Of a Next-ViT, dashed and dotted are what "
            "E-MHSA and MHCA add within the last transformer block of a stage."
        ),
    ]
    page = folder / "explained.html"
    report.write_html(page, "What the network looks at", parts)
    return page


def _strip(heats: Sequence[Heat]) -> Image.Image:
    """The image, and of each network its heat map and its attention, side by side."""
    pictures = [Image.fromarray(heats[0].picture)]
    for heat in heats:
        pictures.append(plots.heated(heat.picture, heat.evidence))
        if heat.attention is not None:
            pictures.append(plots.heated(heat.picture, heat.attention))
    height = max(picture.height * SHOWN // max(picture.size) for picture in pictures)
    scaled = [
        p.resize((max(1, round(p.width * height / p.height)), height), Image.Resampling.BICUBIC) for p in pictures
    ]
    gap = 6
    whole = np.full((height, sum(p.width + gap for p in scaled) - gap, 3), 255, np.uint8)
    left = 0
    for p in scaled:
        whole[:, left : left + p.width] = np.asarray(p)
        left += p.width + gap
    return Image.fromarray(whole)
