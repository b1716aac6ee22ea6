"""Writes constraints.txt: every package that the tests were run with, for each Python we support.

    constraints.py PYTHON...    resolve the newest that pyproject.toml admits, for each of these interpreters (`make constraints`)
    constraints.py --oldest     print the oldest direct dependencies that pyproject.toml admits (`make test-latest`)

Nothing is installed: pip resolves and reports. Local versions ("+cpu") are left out, so that a constraint fits every build of a
release; and the file names no index. Other constraints (a machine's own, in pip's configuration) stay in force beside it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE = ROOT / "constraints.txt"
OURS = "outrider"
OF_A_BUILD = ("nvidia-", "cuda-", "triton")
"""What one build of PyTorch needs and another does not, or in another version; each pins its own."""
HEAD = """# Every package the tests were run with. Written by `make constraints`.
# The Makefile's targets install by it; `pip install outrider` does not.
"""
Version = tuple[int, int]


def normal(name: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(python: str) -> tuple[Version, dict[str, str]]:
    """The interpreter's version, and the packages pip would install into an empty environment of it, by name."""
    version = subprocess.check_output([python, "-c", "import sys; print(*sys.version_info[:2])"], text=True)
    major, minor = map(int, version.split())
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        report = Path(folder) / "report.json"
        command = [
            Path(folder) / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
        ]
        subprocess.run([*command, "--report", report, f"{ROOT}[dev,peers]"], check=True)
        found = json.loads(report.read_text())["install"]
    pins = {normal(item["metadata"]["name"]): item["metadata"]["version"].partition("+")[0] for item in found}
    return (major, minor), {n: v for n, v in pins.items() if n != OURS and not n.startswith(OF_A_BUILD)}


def lines(pins: Mapping[Version, Mapping[str, str]]) -> list[str]:
    """Constraints that hold on every Python of `pins`: with a marker where versions differ, the outer ones open to both sides."""
    pythons = sorted(pins)
    out = []
    for name in sorted(set().union(*pins.values())):
        runs: list[tuple[str, Version, Version]] = []  # a version, and the first and last Python it is for
        for python in pythons:
            version = pins[python].get(name)
            if version is None:  # not needed there: any constraint holds
                continue
            if runs and runs[-1][0] == version:
                runs[-1] = (version, runs[-1][1], python)
            else:
                runs.append((version, python, python))
        for i, (version, first, _) in enumerate(runs):
            low = [f'python_version >= "{first[0]}.{first[1]}"'] if i else []
            after = runs[i + 1][1] if i + 1 < len(runs) else None
            high = [f'python_version < "{after[0]}.{after[1]}"'] if after else []
            out.append(f"{name}=={version}" + "".join(f" ; {' and '.join(low + high)}" if low or high else ""))
    return out


def oldest() -> list[str]:
    """`name==version` of every dependency at its lower bound; what is pinned is its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(x for extra in project["optional-dependencies"].values() for x in extra)]
    found = {}
    for text in named:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*[>=]=\s*([0-9][0-9a-z.]*)", text)
        if match is None:
            raise SystemExit(f"{text!r} in pyproject.toml has no lower bound: give it one")
        found[normal(match[1])] = match[2]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def main(arguments: Sequence[str]) -> None:
    if list(arguments) == ["--oldest"]:
        print("\n".join(oldest()))
        return
    if not arguments:
        raise SystemExit("give the interpreters to resolve for: constraints.py python3.11 python3.12 python3.13")
    pins = dict(resolve(python) for python in arguments)
    FILE.write_text(HEAD + "".join(f"{line}\n" for line in lines(pins)), encoding="utf-8")
    print(
        f"{FILE.name}: {len(lines(pins))} constraints for Python {', '.join('.'.join(map(str, p)) for p in sorted(pins))}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
