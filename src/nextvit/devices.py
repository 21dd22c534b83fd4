"""Devices, threads and precisions: asked of the machine, never assumed."""

import contextlib
import os
import platform
import shutil
from pathlib import Path
from typing import Literal

import torch

from nextvit.errors import NotHere, UserError

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: a GPU where there is one, else the CPU. A device that is not there is an error, never a silent CPU."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    kind, _, index = name.partition(":")
    known = there.get(kind, False) and (not index or index.isdecimal())
    if not known or (index and int(index) >= torch.accelerator.device_count()):
        choices = ", ".join(name for name, usable in there.items() if usable)
        raise UserError(f"there is no device {name!r} here; take {choices} or auto.")
    return torch.device(name)


def fast_precisions(device: torch.device) -> tuple[Precision, ...]:
    """Precisions that the device computes in hardware; others run, but several times slower than fp32."""
    if device.type == "cuda":
        return ("fp32", "bf16", "fp16") if torch.cuda.is_bf16_supported(including_emulation=False) else ("fp32", "fp16")
    if device.type == "cpu":
        return (
            ("fp32", "bf16")
            if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            else ("fp32",)
        )
    return ("fp32",)


def pick_precision(name: str, device: torch.device) -> Precision:
    """`auto`: half precision on GPUs that have it, else fp32. Refuses a precision that the device only emulates."""
    fast = fast_precisions(device)
    if name == "auto":
        name = fast[1] if device.type == "cuda" else "fp32"
    if device.type == "cuda":  # fp32 means fp32; torch would take TF32 for convolutions, 10 bits of mantissa
        torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]  # torch sets it up at run time
    if name not in fast:
        raise NotHere(f"{device.type} here does not compute in {name}; take one of {', '.join(fast)}.")
    return fast[fast.index(name)]


def set_threads(threads: int | None) -> int:
    """Set the number of threads of torch's CPU operators (None: leave it) and return the number in force."""
    if threads is not None:
        if threads < 1:
            raise UserError(f"--threads must be 1 or more, not {threads}.")
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
    return torch.get_num_threads()


def insist_on_compiler() -> None:
    """Raise UserError where torch's Inductor has no C++ compiler to make CPU code with."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        raise UserError("torch's compiler makes C++, and there is no C++ compiler here; install g++ or clang++.")


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """What the system calls its processor, how many of its cores there are here, and what they compute in: hosts of
    virtual machines call several generations by one name, of which one may take three times as long as the other.
    """
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    also = {
        "VNNI": torch.cpu._is_vnni_supported(),
        "BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    able = " ".join([torch.backends.cpu.get_cpu_capability(), *(kind for kind, there in also.items() if there)])
    return f"{name}, {cpu_count()} cores, {able}"
