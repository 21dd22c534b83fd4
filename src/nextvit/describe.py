"""What `nextvit info` tells: facts read or counted, as plain values."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nextvit.cost import cost
from nextvit.create import create_model, list_models, model_of, recognised, variant_named
from nextvit.data.images import printable
from nextvit.foreign import note_of
from nextvit.formats import format_of
from nextvit.networks import of_size
from nextvit.runtime.open import open_session
from nextvit.spec import VARIANTS
from nextvit.weights import ORIGINS, PUBLISHED, TAGS, model_tensors, read_weights


def describe_variants() -> dict[str, Any]:
    """Name, parameters, GFLOPs at 224 and published weights of each variant."""
    return {
        "variants": [
            {
                "name": v.name,
                "params": v.params,
                "gflops_at_224": v.gflops,
                "blocks": list(v.depths),
                "channels": list(v.widths),
                "published": list(TAGS) if v.name in PUBLISHED else [],
            }
            for v in VARIANTS
        ]
    }


def describe_variant(name: str, image_size: int) -> dict[str, Any]:
    """Structure of a variant, and its parameters and operations, counted from the network."""
    variant = variant_named(name)
    counted = cost(create_model(name), image_size)
    stages = [
        {
            "stage": number,
            "pattern": " + ".join(f"{kind.upper()} {width} x {count}" for kind, width, count in stage.pattern),
            "groups": stage.groups,
            "kv_reduction": stage.reduction,
            "channels": stage.width,
            "stride": 2 ** (number + 1),
        }
        for number, stage in enumerate(variant.stages, 1)
    ]
    return {
        "name": name,
        "params": counted.params,
        "image_size": image_size,
        "gflops": round(counted.gflops_paper, 4),
        "gflops_counting": "1e9 multiply-adds as the paper counts: BatchNorm and pooling included",
        "stem": list(variant.stem),
        "stages": stages,
        "head_dim": variant.head_dim,
        "mix_ratio": variant.mix,
        "mlp_expansion": variant.expand,
        "drop_path": variant.drop_path,
        "published": list(TAGS) if name in PUBLISHED else [],
    }


def describe_foreign(name: str, image_size: int | None) -> dict[str, Any]:
    """Of a network of others: parameters and operations, counted from it, and how its images are prepared."""
    model = of_size(create_model(name, task="classify"), image_size)
    counted = cost(model, image_size or model.metadata.preprocess.image_size)
    return {
        "name": name,
        **({"note": note} if (note := note_of(name)) else {}),
        "params": counted.params,
        "image_size": counted.image_size,
        "gflops": round(counted.gflops, 4),
        "gflops_counting": "1e9 multiply-adds of convolutions, linear layers and attention products",
        "preprocess": asdict(model.metadata.preprocess),
    }


def describe_file(path: Path, image_size: int | None, *, trust: bool = False) -> dict[str, Any]:
    """What a weight file or an exported file holds. Raises UserError where it cannot be read."""
    fmt = format_of(path)
    if fmt is not None:
        session = open_session(path, trust=trust)
        return {
            "file": str(path),
            "format": fmt.name,
            "metadata": asdict(session.metadata),
            "runtime": asdict(session.setup),
        }
    file = read_weights(path)
    tensors = model_tensors(file)
    origin = next((o.name for o in ORIGINS if any(key.startswith(o.mark) for key in tensors)), None)
    record = file.metadata or recognised(file)
    told: dict[str, Any] = {
        "file": str(path),
        "layout": origin or ("nextvit" if file.metadata else f"none of {', '.join(o.name for o in ORIGINS)}"),
        "variant": record.variant if record else f"none of {', '.join(list_models())}",
        "tensors": len(tensors),
        "values": sum(tensor.numel() for tensor in tensors.values()),
    }
    if file.metadata is not None:
        told["metadata"] = asdict(file.metadata)
    if file.state is not None:
        told["checkpoint"] = {"epochs_done": file.state["epoch"], "step": file.state["step"]}
    if record is not None:
        model = model_of(file)
        counted = cost(model, image_size or model.metadata.preprocess.image_size)
        told |= {"params": counted.params, "image_size": counted.image_size, "gflops": round(counted.gflops_paper, 4)}
    else:
        told["first_tensors"] = {key: list(tensor.shape) for key, tensor in list(tensors.items())[:10]}
    return told


def as_lines(values: Any, indent: int = 0) -> list[str]:
    """Nested values as lines for a person; a list of records as a table."""
    pad, lines = "  " * indent, []
    for key, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"{pad}{key}:", *(f"{pad}  {line}" for line in table(value))]
        elif isinstance(value, dict):
            lines += [f"{pad}{key}:", *as_lines(value, indent + 1)]
        else:
            lines.append(f"{pad}{key}: {_text(value)}")
    return lines


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Records with the same keys as aligned lines."""
    cells = [[key.replace("_", " ") for key in rows[0]], *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        shown = ", ".join(printable(str(entry)) for entry in value[:12])
        return f"{shown}, ... ({len(value)})" if len(value) > 12 else shown or "-"
    return "-" if value is None or value == "" else printable(str(value))
