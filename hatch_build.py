"""Builds the native libraries into the wheel: for every set of instructions that a machine of this kind, and 64-bit ARM, may have.

A wheel that is built without a compiler is a pure one, and says so. Libraries for the other architecture are built where its cross
compiler is (Debian: g++-aarch64-linux-gnu, g++-x86-64-linux-gnu).
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parent / "src"))  # the tree that is built, not an outrider that is installed

from outrider import isa
from outrider.nn import compiled

CROSS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}


class NativeLibraries(BuildHookInterface):
    """Adds `outrider/prebuilt/MACHINE/*.so` to wheels, and the tag of the machines they are for."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable":
            return
        self._folder = Path(mkdtemp(prefix="outrider-wheel-"))
        found = {machine: self._libraries(machine) for machine in (CROSS if sys.platform == "linux" else ())}
        for machine, libraries in found.items():
            for library in libraries:
                build_data["force_include"][str(library)] = f"outrider/prebuilt/{machine}/{library.name}"
        machines = sorted(machine for machine, libraries in found.items() if libraries)
        if machines:
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-" + ".".join(f"linux_{machine}" for machine in machines)
        else:
            self.app.display_warning(
                "no C++ compiler: this wheel has no native libraries, they are compiled where it runs"
            )

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_folder"):
            shutil.rmtree(self._folder, ignore_errors=True)

    def _libraries(self, machine: str) -> list[Path]:
        """What could be built for this machine; what could not is named."""
        try:
            compiler = compiled.find_compiler() if machine == isa.machine() else [shutil.which(CROSS[machine]) or ""]
        except compiled.BuildError:
            compiler = [""]
        if compiler == [""]:
            self.app.display_info(f"no C++ compiler for {machine}: no native libraries for it in this wheel")
            return []
        folder = self._folder / machine
        folder.mkdir(mode=0o700)
        jobs = [(unit, level) for unit in compiled.UNITS for level in isa.LEVELS[machine]]
        with ThreadPoolExecutor() as pool:
            made = pool.map(lambda job: self._library(compiler, *job, folder), jobs)
        return [library for library in made if library is not None]

    def _library(self, compiler: list[str], unit: compiled.Unit, level: isa.Level, folder: Path) -> Path | None:
        try:
            return compiled.build_for_wheel(unit, compiler, level, folder)
        except compiled.BuildError as error:
            self.app.display_warning(f"no {unit.name} for {level.name} in this wheel: {error}")
            return None
