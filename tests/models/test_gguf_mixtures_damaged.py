"""The header of a mixture's GGUF file, damaged at every place.

Apart from test_gguf_mixtures.py, whose calls are checked for shapes and types in `make test`: this makes the same calls thousands
of times, and is checked in `make test-slow`.
"""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest

from tests.mixture_files import small, write
from tests.models.test_gguf_damaged import damage, header_bytes

pytest.importorskip("gguf")


@pytest.mark.parametrize("step", [pytest.param(61, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def test_every_byte_of_a_header_changed(step: int, tmp_path: Path) -> None:
    """One sentence, and no memory for what only a key says."""
    path = tmp_path / "x.gguf"
    tiny = {"num_hidden_layers": 1, "vocab_size": 6, "num_experts": 4, "num_experts_per_tok": 2}
    data = write(small("gpt_oss", swiglu_limit=7.0, **tiny), path, {"exps": "MXFP4", "": "Q8_0"}).read_bytes()
    end = header_bytes(data, path)
    tracemalloc.start()
    refused = 0
    for i in range(0, end, step):
        refused += damage(data, path, data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
        if i + 8 <= end:
            for value in (0, 1, 1 << 31, 1 << 63, (1 << 64) - 1):
                damage(data, path, data[:i] + struct.pack("<Q", value) + data[i + 8 :])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > end // step // 2 and peak < 64 << 20
