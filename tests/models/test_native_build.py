"""What the native decoder refuses, and how it is compiled, kept and loaded."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider import isa
from outrider.errors import CapacityError, RequestError
from outrider.models.decoder import DecoderConfig, DecoderWeights
from outrider.models.native import NativeDecoder, load_native
from outrider.models.native.build import load_library
from outrider.models.native.weights import NativeWeights
from outrider.nn import compiled
from outrider.nn.compiled import DECODER, Unit
from outrider.types import Draft, Rows
from tests.models.plain_decoder import reference
from tests.models.test_native import (  # noqa: F401
    DTYPES,
    SHAPES,
    alone,
    forest,
    native,
    new_kv,
    pytestmark,
    random_weights,
    run,
    tokens,
    tolerance,
)


def tiny(dtype: torch.dtype = torch.float32) -> tuple[DecoderConfig, DecoderWeights]:
    config, extras = SHAPES["plain"]
    return config, random_weights(config, extras, dtype)


@DTYPES
def test_takes_few_rows_unless_torch_has_no_kernels(dtype: torch.dtype) -> None:
    decoder = native(*tiny(dtype))
    few = 256 if decoder.kind.startswith("AVX-512") else 32
    assert decoder.max_rows == (sys.maxsize if decoder.kind in ("AVX2", "generic") and dtype is torch.bfloat16 else few)


def test_refuses_what_would_read_or_write_elsewhere() -> None:
    config, weights = tiny()
    decoder, kv = native(config, weights), new_kv(config, torch.float32, capacity=4)
    plain = Rows.assemble([0], [[1, 2]], [0], Draft.empty(1))
    with pytest.raises(RequestError, match="vocabulary of 101"):
        decoder.forward(Rows.assemble([0], [[101]], [0], Draft.empty(1)), kv, ())
    with pytest.raises(CapacityError, match="max_length"):
        decoder.forward(Rows.assemble([0], [[1, 2, 3]], [2], Draft.empty(1)), kv, ())
    for page in (-1, 1):  # of another cache, or none at all
        kv.pages.table[0] = page
        with pytest.raises(ValueError, match="segments"):
            decoder.forward(plain, kv, ())
    kv.make_room(0, 4)
    kv.pages.table[0] = 0
    with pytest.raises(ValueError, match="segments"):
        decoder.forward(Rows.assemble([1], [[1]], [0], Draft.empty(1)), kv, ())
    wrong = dataclasses.replace(plain.segments[0], parent=(5,))
    with pytest.raises(ValueError, match="segments"):
        decoder.forward(dataclasses.replace(plain, segments=(wrong,)), kv, ())
    with pytest.raises(ValueError, match="scored row"):
        decoder.forward(dataclasses.replace(plain, scored=torch.tensor([2])), kv, ())
    with pytest.raises(ValueError, match="layers in 0..3"):
        decoder.forward(plain, kv, (4,))
    with pytest.raises(ValueError, match="cache"):
        decoder.forward(plain, new_kv(config, torch.float64), ())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float16}, "float16; choose dtype"),
        ({"embedding": torch.zeros(101, 64, dtype=torch.float16)}, "embedding is not a contiguous"),
        ({"head": torch.zeros(64, 101).T}, "head is not a contiguous"),
        ({}, r"embedding has shape \(101, 64\), not \(102, 64\)"),
    ],
)
def test_says_why_not(change: dict[str, Any], reason: str) -> None:
    config, weights = tiny()
    if not change:
        config = dataclasses.replace(config, vocab_size=102)
    decoder, notices = load_native(config, dataclasses.replace(weights, **change))
    assert decoder is None
    assert re.search(reason, *notices)


def test_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    decoder, notices = load_native(*tiny())
    assert decoder is None
    assert [("OUTRIDER_NATIVE" in n, "unset it" in n) for n in notices] == [(True, True)]


def test_two_builds_at_once(tmp_path: Path) -> None:
    """Processes that build side by side get one library, leave nothing behind, and the next one finds it."""
    compiler = tmp_path / "compiler"  # writes an empty file after -o, slowly
    compiler.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && sleep 0.1 && : > "$2"; shift; done\n')
    compiler.chmod(0o700)
    folder = tmp_path / "cache"
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(compiled.build, DECODER, [str(compiler)], folder, openmp=True) for _ in range(2)]
        library = {job.result() for job in jobs}.pop()
    assert [p.name for p in folder.iterdir()] == [library.name]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    built = library.stat().st_mtime_ns
    assert compiled.build(DECODER, [str(compiler)], folder, openmp=True) == library
    assert library.stat().st_mtime_ns == built


def test_runs_on_any_cpu_of_this_kind(tmp_path: Path) -> None:
    """Compiled without this CPU's own instructions and without threads: the same reference, the same invariance."""
    level = isa.LEVELS[isa.machine()][0]
    flags = [
        *compiled.FLAGS,
        "-O0",
        *level.flags,
    ]  # compiled in a quarter of the time; test_wheel.py has all as they are shipped
    compiled.compile_unit(DECODER, compiled.find_compiler(), flags, library := tmp_path / "decoder.so")
    for dtype in (torch.float32, torch.bfloat16):
        config, extras = SHAPES["odd sizes"]
        weights, path = random_weights(config, extras, dtype), tokens(9, config.vocab_size)
        loaded = ctypes.CDLL(str(library))
        decoder = NativeDecoder(loaded, config, NativeWeights.of(loaded, weights))
        rows = Rows.assemble([0], [path[:5]], [0], forest((path[5:], [-1, 0, 1, 2])))
        logits = run(decoder, rows, new_kv(config, dtype), ()).logits
        expected, _ = reference(config, weights, path)
        assert (logits[-1] - expected).abs().max() <= tolerance(dtype) * expected.abs().max()
        assert torch.equal(logits[-1], alone(decoder, config, dtype, path)[0])


@pytest.mark.parametrize("what", ["folder", "library"])
def test_refuses_code_that_others_can_write(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    (folder if what == "folder" else _stand_in(folder)).chmod(0o777)
    with pytest.raises(compiled.BuildError, match="written by other users"):
        compiled.build(DECODER, compiled.find_compiler(), folder, openmp=True)


def test_refuses_code_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(compiled.BuildError, match="another user"):
        compiled.build(DECODER, compiled.find_compiler(), tmp_path, openmp=True)


def _stand_in(folder: Path) -> Path:
    """An empty file where the library would be."""

    def compile_nothing(unit: Unit, compiler: list[str], flags: list[str], library: Path) -> None:
        library.touch(mode=0o700)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "compile_unit", compile_nothing)
        return compiled.build(DECODER, compiled.find_compiler(), folder, openmp=True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see loaded libraries")
def test_shares_torch_s_threads() -> None:
    """No second OpenMP runtime comes with the library: two pools would fight for the cores."""
    assert load_library() is not None
    loaded = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines()}
    assert len([path for path in loaded if re.match(r"lib[gi]?omp\d?\b", path.name)]) <= 1


def test_a_compiler_that_nobody_waits_for_ends_with_what_it_started(tmp_path: Path) -> None:
    """g++ compiles in a process of its own, which would go on alone for minutes."""
    driver, told = tmp_path / "slow-compiler", tmp_path / "told"
    driver.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {told}.part\nmv {told}.part {told}\nwait\n")
    driver.chmod(0o700)
    with pytest.raises(compiled.BuildError, match="did not end within 2 s"):
        compiled.compile_unit(DECODER, [str(driver)], [], tmp_path / "unit.so", patience=2.0)
    worker = int(told.read_text())
    for _ in range(1000):  # a killed process ends when it is next scheduled
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("the worker still runs")


def test_what_a_compiler_says_in_another_encoding_is_passed_on(tmp_path: Path) -> None:
    driver = tmp_path / "compiler"
    driver.write_bytes(b"#!/bin/sh\necho 'error: caf\xe9' >&2\nexit 1\n")
    driver.chmod(0o700)
    with pytest.raises(compiled.BuildError, match="failed .error: caf\ufffd"):
        compiled.compile_unit(DECODER, [str(driver)], [], tmp_path / "unit.so")


def test_an_interrupt_behind_the_end_of_a_compiler_stays_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = compiled.subprocess.Popen.communicate

    def interrupted(self, *given, **named):
        real(self, *given, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(compiled.subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled.compile_unit(DECODER, ["true"], [], tmp_path / "unit.so")
