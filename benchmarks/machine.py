"""What the benchmarks say of the machine they ran on."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil


def describe_machine(threads: int) -> str:
    """Processor, cores, threads used, memory and the versions that matter for speed."""
    import torch
    import transformers

    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    gigabytes = psutil.virtual_memory().total / 2**30
    return (
        f"{model}, {psutil.cpu_count(logical=True)} cores, {threads} threads used,"
        f" {gigabytes:.0f} GiB, torch {torch.__version__}, transformers {transformers.__version__}"
    )
