"""Result files in benchmarks/results: what was measured, and what it depends on.

Each holds one JSON object: a script's figures, and `environment()`; or one such object per CPU.
Importing this puts the project's root on the path, from which scripts import the package.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))


def write(name: str, result: dict[str, object]) -> None:
    """Into NAME.json; the last line printed is the same JSON object."""
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def write_by_cpu(name: str, result: dict[str, object]) -> None:
    """As `write`, but beside what other CPUs gave: each has its own ratios."""
    path = RESULTS / f"{name}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(results | {result["cpu"]: result}, indent=1) + "\n")
    print(json.dumps(result))


def cpu_name() -> str:
    """How many cores of which kind."""
    info = Path("/proc/cpuinfo")  # Linux has it, and on x86 the model's name
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"


def commit() -> str:
    """Of the code; empty where there is no git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    with suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return ""


def environment(device: str) -> dict[str, object]:
    """What a figure depends on besides the code: command, commit, machine, versions, date."""
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    # Of a folder outside, its name: where it lies is a matter of the machine.
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return {
        "command": shlex.join(["python", script, *arguments]),
        "commit": commit(),
        "device": device,
        "cpu": cpu_name(),
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
