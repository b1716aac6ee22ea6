"""Memory in large pages: numbers are the same, nothing overlaps, nothing is kept, and nothing is taken that was not in use."""

from __future__ import annotations

import gc
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.models.checkpoint import Checkpoint
from outrider.models.load import load_target
from outrider.nn.large_pages import CHUNK, LARGE, LEAST, LargePages, gather
from outrider.types import Draft, Rows
from tests.checkpoints import make_checkpoint

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
linux = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux's /proc")
large = pytest.mark.skipif(
    not _SETTING.exists() or "[never]" in _SETTING.read_text(), reason="this system has no large pages"
)
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "dtype": torch.bfloat16
}  # fmt: skip


def status(name: str) -> int:
    """Bytes, as the system counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


@pytest.mark.parametrize("setting", ["1", "0"])
def test_pieces_are_apart_aligned_and_what_was_asked_for(monkeypatch, setting):
    monkeypatch.setenv("OUTRIDER_LARGE_PAGES", setting)
    memory, draw = LargePages(), torch.Generator().manual_seed(3)
    shapes = [(), (0, 5), (7,), (300, 301), (3, 5, 70_001), (LEAST,), (LEAST + 1,), (1024, 1024)]
    dtypes = [torch.float32, torch.bfloat16, torch.uint8, torch.float64]
    made = [(shape, dtype, memory.empty(shape, dtype)) for shape in shapes for dtype in dtypes]
    expected = []
    for shape, dtype, piece in made:
        assert piece.shape == torch.Size(shape) and piece.dtype is dtype and piece.is_contiguous()
        assert piece.data_ptr() % 64 == 0 or piece.nbytes == 0
        expected.append(torch.randint(0, 200, shape, generator=draw).to(dtype))
        piece.copy_(expected[-1])
    assert all(torch.equal(piece, e) for (_, _, piece), e in zip(made, expected, strict=True))


def test_a_copy_is_the_same_numbers_in_another_type():
    x = torch.randn(400, 400)
    copied = LargePages().copy(x.T, torch.bfloat16)
    assert torch.equal(copied, x.T.bfloat16()) and copied.data_ptr() != x.data_ptr()


@linux
def test_chunks_are_given_back_with_their_last_tensor():
    memory = LargePages()
    pieces = [memory.empty((CHUNK // 3,), torch.uint8) for _ in range(6)]
    with_all = status("VmSize")
    del memory, pieces[1:]
    gc.collect()
    with_one = status("VmSize")
    pieces.clear()
    gc.collect()
    assert with_all - with_one >= CHUNK
    assert with_one - status("VmSize") >= CHUNK


@linux
@large
def test_weights_that_stay_together_lie_in_large_pages(tmp_path):
    """Control: weights that may be let go of one by one do not."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path, **SIZES))
    for memory in (LargePages(), None):
        weights = checkpoint.read(torch.bfloat16, memory=memory)
        assert isinstance(weights.layers, tuple) and isinstance(weights.layers[1].gate_up, torch.Tensor)
        assert _advised(weights.layers[1].gate_up.data_ptr()) == (memory is not None)


def test_scores_are_the_same_wherever_weights_lie(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path, **SIZES)
    rows, found = Rows.assemble([0], [[3, 5, 7]], [0], Draft.empty(1)), []
    for setting in ("0", "1"):
        monkeypatch.setenv("OUTRIDER_LARGE_PAGES", setting)
        target = load_target(folder)
        found.append(target.forward(rows, target.new_kv(1, 8)).logits)
    assert torch.equal(*found)


def _advised(address: int) -> bool:
    """Whether the system was asked for large pages there (the flag `hg` of its range)."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            low, high = (int(n, 16) for n in name.split("-"))
            here = low <= address < high
        elif here and name == "VmFlags:":
            return "hg" in rest.split()
    raise AssertionError("no such address")


_GATHER = f"""
import mmap, sys, torch
from pathlib import Path
from outrider.nn.large_pages import LARGE, gather
def kilobytes(field, file="status"):
    return int(next(l for l in open("/proc/self/" + file) if l.startswith(field)).split()[1])
room = mmap.mmap(-1, {64 << 20}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
numbers = torch.frombuffer(room, dtype=torch.int64)
full = len(numbers) // 2
numbers[:full] = torch.arange(full)
numbers[full::1024] = 7  # every other small page of the second half
before, sizes = kilobytes("RssAnon"), numbers[full:].sum().item()
found = gather()
assert torch.equal(numbers[:full], torch.arange(full)) and numbers[full:].sum().item() == sizes
print(found.bytes, found.of, (kilobytes("RssAnon") - before) << 10, kilobytes("AnonHugePages", "smaps_rollup") << 10, gather().of)
"""


@linux
@large
def test_gathering_moves_what_is_full_and_takes_nothing_more():
    """In a process of its own. Half of a range is full, and every other small page of the rest is in use."""
    run = subprocess.run([sys.executable, "-c", _GATHER], capture_output=True, text=True, check=True, timeout=120)
    moved, of, grown, there, left = (int(n) for n in run.stdout.split())
    assert of >= (32 << 20) - 2 * LARGE  # the first half, but for where it does not begin with a large page
    assert moved <= of and there >= moved
    assert grown < 4 * LARGE
    assert left <= of - moved + 2 * LARGE  # what is there is not moved again


def test_nothing_is_gathered_where_it_is_switched_off(monkeypatch):
    monkeypatch.setenv("OUTRIDER_LARGE_PAGES", "0")
    assert gather() == (0, 0)


def test_a_system_without_room_or_large_pages_gives_plain_memory(monkeypatch):
    def none(*args: object, **options: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(mmap, "mmap", none)
    piece = LargePages().empty((LEAST,), torch.float32)
    assert piece.fill_(2).sum().item() == 2 * LEAST
