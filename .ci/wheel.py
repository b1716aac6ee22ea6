"""Says which native libraries the installed wheel lacks for this machine, and fails if any: a build that gave up on one (a compiler
that is too old, a timeout) only warns, and users would get a slower library without a word."""

from __future__ import annotations

import sys
from pathlib import Path

import outrider
from outrider import isa
from outrider.nn import compiled

folder = Path(outrider.__file__).parent / "prebuilt" / isa.machine()
wanted = [f"{unit.name}-{level.name}-" for unit in compiled.UNITS for level in isa.LEVELS[isa.machine()]]
found = [path.name for path in folder.glob("*.so")]
missing = [name for name in wanted if not any(library.startswith(name) for library in found)]
print(f"{folder}: {len(wanted) - len(missing)} of {len(wanted)} libraries")
if missing:
    sys.exit(f"missing: {' '.join(missing)}")
