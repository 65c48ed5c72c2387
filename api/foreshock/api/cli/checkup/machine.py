"""Python, torch, the devices and what they can do in FP8. Loads no torch into this process."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from foreshock.api.cli import extras
from foreshock.api.cli.checkup.findings import Finding, note, ok, wrong

__all__ = ["check_machine", "judge_torch"]

_OLDEST_PYTHON: Final = (3, 11)
_OLDEST_TORCH: Final = (2, 11)
_OLDEST_TE: Final = (2, 12)
_PROBE: Final = ("-m", "foreshock.api.cli.checkup.torch_probe")
_PROBE_SECONDS: Final = 120.0


def check_machine() -> Iterator[Finding]:
    """Python and packages, then torch and its devices."""
    yield _python()
    if not _installed("torch"):
        yield note(
            "torch",
            "not installed: this Python serves, but trains and watches nothing",
            "where a training job runs, use the Python that has its torch",
        )
        return
    found = _probe()
    if isinstance(found, str):
        yield wrong("torch", f"cannot be imported: {found}", "repair it: python -c 'import torch'")
        return
    yield from judge_torch(found, nvidia=_has_nvidia_driver())
    yield from _transformer_engine(bool(found["devices"]))


def _python() -> Finding:
    number = sys.version_info[:2]
    has = " ".join(f"[{name}]" for name in ("trainer", "api") if extras.installed(name))
    ours = f"foreshock {_version('foreshock') or 'unpacked'}, {has or 'no extra'}"
    text = f"{platform.python_version()}, {ours}"
    if number < _OLDEST_PYTHON:
        return wrong("python", text, "use Python 3.11 or newer")
    return ok("python", text)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _probe() -> Mapping[str, Any] | str:
    """What torch says, or why it says nothing."""
    try:
        done = subprocess.run(
            [sys.executable, *_PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer within {_PROBE_SECONDS:.0f} seconds"
    if done.returncode == 0:
        answer: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    return f"{last} (exit code {done.returncode})"


def _has_nvidia_driver() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def judge_torch(found: Mapping[str, Any], *, nvidia: bool) -> Iterator[Finding]:
    """Findings on what `torch_probe` printed.

    Args:
        found: Its answer.
        nvidia: Whether the machine has NVIDIA's driver.
    """
    text = f"{found['version']}, CUDA {found['cuda'] or 'none'}"
    if _numbers(found["version"]) < _OLDEST_TORCH:
        yield wrong("torch", text, "foreshock is tested with 2.11 and newer: update torch")
    else:
        yield ok("torch", text)
    if not found["devices"]:
        yield _no_device(found, nvidia)
    for index, device in enumerate(found["devices"]):
        yield _device(index, device["name"], tuple(device["capability"]))
    yield _backends([tuple(d["capability"]) for d in found["devices"]], found["cuda"])


def _no_device(found: Mapping[str, Any], nvidia: bool) -> Finding:
    if found["hip"]:
        return note("fp8", "no ROCm device is seen", "foreshock has not been tried on ROCm")
    if not nvidia:
        return note(
            "fp8",
            "no GPU: FP8 is emulated here, with its numbers and without its speed",
            "nothing, if that is meant",
        )
    if found["cuda"] is None:
        return wrong(
            "fp8",
            "the machine has an NVIDIA driver, but this torch is built without CUDA",
            "install a torch for CUDA: https://pytorch.org/get-started/locally/",
        )
    return wrong(
        "fp8",
        f"the machine has an NVIDIA driver, but torch for CUDA {found['cuda']} sees no device",
        "compare nvidia-smi's CUDA version with torch's; look at CUDA_VISIBLE_DEVICES",
    )


def _device(index: int, name: str, capability: tuple[int, ...]) -> Finding:
    """What its tensor cores multiply: FP8 from 8.9, blocks from 9.0, MX and NVFP4 from 10.0."""
    number = ".".join(map(str, capability))
    where = f"device {index}, {name}, compute capability {number}"
    if capability >= (10, 0):
        return ok("fp8", f"{where}: FP8, MXFP8 and NVFP4")
    if capability >= (9, 0):
        return ok("fp8", f"{where}: FP8 per tensor, row and block; MXFP8 and NVFP4 only emulated")
    if capability >= (8, 9):
        return ok("fp8", f"{where}: FP8 per tensor and row; blocks, MXFP8 and NVFP4 only emulated")
    return note(
        "fp8",
        f"{where}: no FP8 units; bf16 runs are watched, FP8 is emulated",
        "for FP8 training take a device of compute capability 8.9 or more (Ada, Hopper, newer)",
    )


def _backends(capabilities: Sequence[tuple[int, ...]], cuda: str | None) -> Finding:
    """What `foreshock train` can set as precision.backend here, and with which scalings."""
    everywhere = "bf16; emulated: all scalings, fp8 attention"
    if not capabilities:
        slow = "native: delayed, current, rowwise (for comparisons: slow on a CPU)"
        return ok("backends", f"{everywhere}; {slow}")
    least = min(capabilities)
    if least < (8, 9):
        return ok("backends", f"{everywhere}; native and transformer_engine need 8.9 or more")
    blocks = (
        ", block128" if set(capabilities) == {(9, 0)} and _numbers(cuda or "0") >= (12, 9) else ""
    )
    fused = ", fp8 attention at head width 128" if least >= (9, 0) else ""
    engine = f"transformer_engine: delayed, current{fused}"
    if _version("transformer-engine") is None:
        engine = "transformer_engine: not installed"
    return ok("backends", f"{everywhere}; native: delayed, current, rowwise{blocks}; {engine}")


def _transformer_engine(has_device: bool) -> Iterator[Finding]:
    text = _version("transformer-engine")
    if text is None:
        if has_device:
            yield note(
                "te", "Transformer Engine is not installed", "nothing, unless you train with it"
            )
        return
    if _numbers(text) < _OLDEST_TE:
        yield wrong("te", f"Transformer Engine {text}", "foreshock needs 2.12 or newer")
    else:
        debug = _version("nvdlfw-inspect")
        yield ok("te", f"Transformer Engine {text}, nvdlfw-inspect {debug or 'not installed'}")


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split("+")[0].split(".")[:2]
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts)
