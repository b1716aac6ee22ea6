"""Walks journeys: each in an empty folder outside the checkout, from an installed wheel, with and without a compiler on the path.

    python tests/journeys/walk.py [--pythons "python3.11 python3.13"] [--wheel FILE] [laptop] [server] [research] [training]

The wheel is built from the checkout unless one is given. Environments are kept in .venvs/journeys. Interpreters that are not there
are named and left out. Needs Python's own library and pip.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
PLACE = CHECKOUT / ".venvs" / "journeys"
JOURNEYS = ("laptop", "server", "research", "training")
EXTRAS = "serve,grammar,plot"
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")
COMPILER = {"with": ["/usr/local/bin", "/usr/bin", "/bin"], "without": []}
"""What follows the environment's own programs on the path."""


def build() -> Path:
    """A wheel of the checkout."""
    print("building the wheel (some minutes: native libraries for every set of instructions)", flush=True)
    folder = PLACE / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", str(folder), str(CHECKOUT)], check=True)
    return next(folder.glob("*.whl"))


def environment(python: str, wheel: Path) -> Path:
    """The programs of an environment of this interpreter with this wheel."""
    said = subprocess.run(
        [python, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], capture_output=True, text=True
    )
    place = PLACE / f"python{said.stdout.strip()}"
    if not (place / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", str(place)], check=True)
    install = [str(place / "bin" / "python"), *PIP, "install", "--constraint", str(CHECKOUT / "constraints.txt")]
    subprocess.run([*install, f"{wheel}[{EXTRAS}]"], check=True)
    subprocess.run([*install, "--force-reinstall", "--no-deps", str(wheel)], check=True)  # of the same version
    whole = subprocess.run([str(place / "bin" / "python"), str(CHECKOUT / ".ci" / "wheel.py")])  # as CI checks a wheel
    if whole.returncode and not wheel.name.endswith("-any.whl"):
        raise SystemExit("the wheel lacks native libraries: see what its build says without --quiet")
    return place / "bin"


def walk(journey: str, programs: Path, compiler: str) -> bool:
    """One journey in a folder of its own, with a home and a cache that nobody has used."""
    print(f"--- {journey}, {programs.parent.name}, {compiler} a compiler", flush=True)
    with tempfile.TemporaryDirectory(prefix=f"outrider-{journey}-") as folder:
        home = Path(folder) / "home"
        work = Path(folder) / "work"
        home.mkdir()
        work.mkdir()
        env = {
            name: value
            for name, value in os.environ.items()
            if name in ("LANG", "LC_ALL", "JOURNEY_PATIENCE", "OMP_NUM_THREADS")
        }
        env |= {"HOME": str(home), "TMPDIR": folder, "HF_HUB_OFFLINE": "1"}
        env["PATH"] = os.pathsep.join([str(programs), *COMPILER[compiler]])
        done = subprocess.run([str(programs / "python"), str(HERE / f"{journey}.py")], cwd=work, env=env)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journeys", nargs="*", choices=[*JOURNEYS, []], help="default: all", metavar="JOURNEY")
    parser.add_argument("--pythons", default="python3.11 python3.13", help="interpreters, separated by spaces")
    parser.add_argument("--wheel", type=Path, help="a wheel that was built before")
    parser.add_argument("--compiler", choices=("with", "without", "both"), default="both")
    asked = parser.parse_args()
    os.environ.pop("PYTHONPATH", None)  # what is installed is walked, not a checkout
    there = [p for p in asked.pythons.split() if shutil.which(p)]
    for missing in set(asked.pythons.split()) - set(there):
        print(f"{missing} is not on this machine: left out")
    if not there:
        print("none of these interpreters is on this machine", file=sys.stderr)
        return 2
    wheel = asked.wheel or build()
    failed = []
    for python in there:
        programs = environment(python, wheel)
        for compiler in ("with", "without") if asked.compiler == "both" else (asked.compiler,):
            for journey in asked.journeys or JOURNEYS:
                if not walk(journey, programs, compiler):
                    failed.append(f"{journey} ({python}, {compiler} a compiler)")
    print(f"failed: {', '.join(failed)}" if failed else "every journey arrived")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
