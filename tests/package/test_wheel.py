"""What `pip wheel .` puts into a wheel: the libraries of every level, run on machines that may be emulated."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from outrider import isa
from outrider.nn import compiled

ROOT = Path(__file__).parent.parent.parent
DRIVER = ROOT / "tests" / "native" / "driver.cpp"
CROSS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}

LOGITS = 9 * 77
PARTS = (
    (LOGITS, 1e-5),  # float32
    (LOGITS, 0.05),  # bfloat16
    (10 * 9 * 37, 0.0),  # products of quantised weights have the same bits everywhere
    (LOGITS, 0.05),  # float32 over keys and values in 8 bits: a code may be the next one
    (LOGITS, 0.05),  # bfloat16, the same
    (3 + 2 * 10, 0.0),  # passes of the rules
)
"""How many numbers the driver prints of each kind, in order, and how far those of two levels may differ, over the largest one."""

linux = pytest.mark.skipif(
    sys.platform != "linux" or isa.machine() not in CROSS, reason="wheels have libraries for Linux"
)
pytestmark = [pytest.mark.slow, linux]


def compiler_for(machine: str) -> list[str]:
    try:
        return (
            compiled.find_compiler()
            if machine == isa.machine()
            else [shutil.which(CROSS[machine]) or pytest.skip("no cross compiler")]
        )
    except compiled.BuildError:
        pytest.skip("no compiler")


def run(machine: str, level: isa.Level, folder: Path) -> list[float]:
    """What the driver prints with the libraries of this level, emulated where this is another machine."""
    compiler = compiler_for(machine)
    folder.mkdir()
    libraries = [compiled.build_for_wheel(unit, compiler, level, folder) for unit in compiled.UNITS]
    driver = folder / "driver"
    command = [*compiler, "-std=c++17", "-O1", "-fopenmp", "-Wl,--no-as-needed", str(DRIVER), "-o", str(driver), "-ldl"]
    subprocess.run(command, check=True, timeout=120)
    emulator = []
    if machine != isa.machine():
        found = shutil.which(f"qemu-{machine}") or shutil.which(f"qemu-{machine}-static")
        emulator = [found, "-L", f"/usr/{machine}-linux-gnu"] if found else pytest.skip("no emulator")
    done = subprocess.run([*emulator, driver, *libraries], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == level.kind
    return [float.fromhex(line) for line in done.stdout.split()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Numbers of the least level of this machine."""
    return run(isa.machine(), isa.LEVELS[isa.machine()][0], tmp_path_factory.mktemp("plain") / "built")


@pytest.mark.parametrize(("machine", "name"), [(m, level.name) for m in isa.LEVELS for level in isa.LEVELS[m]])
def test_every_library_of_a_wheel_computes_the_same(
    machine: str, name: str, plain: list[float], tmp_path: Path
) -> None:
    """To rounding, on this machine's levels and the other one's; and rows are the same bits in any company (the driver looks)."""
    level = next(level for level in isa.LEVELS[machine] if level.name == name)
    if machine == isa.machine() and level not in isa.levels():
        pytest.skip("this CPU lacks these instructions")
    found = run(machine, level, tmp_path / "built")
    assert len(found) == len(plain) == sum(count for count, _ in PARTS)
    at = 0
    for count, tolerance in PARTS:
        one, expected = found[at : at + count], plain[at : at + count]
        spread = max(map(abs, expected))
        assert max(abs(a - b) for a, b in zip(one, expected, strict=True)) <= tolerance * spread
        at += count


def test_a_wheel_has_them_and_says_for_which_machines(tmp_path: Path) -> None:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    compiler_for(isa.machine())
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], check=True, cwd=ROOT
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert f"linux_{isa.machine()}" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for unit in compiled.UNITS:
        for level in isa.LEVELS[isa.machine()]:
            assert f"outrider/prebuilt/{isa.machine()}/{compiled.wheel_name(unit, level)}" in names
