"""Products with quantised weights against their plain twin, bit for bit: types, numbers of rows, shapes, numbers of threads."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from outrider import isa
from outrider.models.native.build import load_library
from outrider.nn import compiled
from outrider.nn.blocks import BLOCKS, INT8, KERNELS, BlockType, Segment, dequantise
from outrider.nn.products import NativeLinear
from tests.covering import covering

pytestmark = pytest.mark.skipif(load_library() is None, reason="products in blocks need a C++ compiler")

TYPES = {block.name: block for block in (*BLOCKS.values(), INT8) if block.number in KERNELS}
ROWS, OUTPUTS, INPUTS, THREADS = range(1, 9), (1, 7, 8, 9, 24, 257), (32, 288, 512, 1024), (1, 2, 3)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def blocks(block: BlockType, outputs: int, inputs: int, seed: int = 0) -> Segment:
    """Random codes with finite scales; among the first rows all zeros, scales of 0 and denormals, and codes of one extreme."""
    rng = torch.Generator().manual_seed(seed)
    count = inputs // block.values
    raw = torch.randint(256, (outputs, count, block.bytes), dtype=torch.uint8, generator=rng)
    scale = 0.02 * torch.randn(outputs, count, 1, generator=rng)
    if outputs > 4:
        raw[1], raw[3, :, 4:], raw[4, :, 4:] = 0, 255, 0x80
        scale[1], scale[2] = 0, 3e-7
    for at in block.scales:
        raw[..., at : at + 2] = scale.half().view(torch.uint8)
    if block.name == "mxfp4":
        raw[..., 0] = torch.randint(90, 140, (outputs, count), dtype=torch.uint8, generator=rng)
    if block is INT8:
        raw[..., :4] = scale[:, :1].abs().float().contiguous().view(torch.uint8)
    return Segment(block, raw.view(outputs, -1))


def inputs_of(rows: int, width: int) -> Tensor:
    """Rows of several sizes; then zeros, next to nothing, and the greatest codes of either sign everywhere."""
    x = (
        torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
        * torch.tensor([0.1, 1.0, 30.0])[torch.arange(rows) % 3, None]
    )
    if rows > 5:
        x[2], x[3], x[4] = 0, 1e-35, 5
        x[5] = torch.where(torch.arange(width) % 2 == 0, 7.0, -7.0)
    return x


def twin(segment: Segment, x: Tensor, twice: bool = False) -> tuple[Tensor, int]:
    """The definition of the product, and the largest integer sum in it. twice: with inputs of 16 bits."""
    library, out, largest = load_library(), torch.empty(x.shape[0], segment.outputs), 0
    assert library is not None
    library.outrider_twin.restype = ctypes.c_int64
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    library.outrider_twin.argtypes = (whole, pointer, *(whole,) * 3, pointer, whole, pointer)
    for row, line in zip(x, out, strict=True):
        sizes = segment.block.number, segment.rows.data_ptr(), segment.rows.shape[1], segment.outputs, segment.inputs
        largest = max(largest, library.outrider_twin(*sizes, row.contiguous().data_ptr(), int(twice), line.data_ptr()))
    return out, largest


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def check(name: str, rows: int, outputs: int, inputs: int, on: int, twice: bool) -> None:
    library = load_library()
    assert library is not None
    segment, x = blocks(TYPES[name], outputs, inputs), inputs_of(rows, inputs)
    torch.set_num_threads(on)
    expected, largest = twin(segment, x, twice)
    assert largest < 2**31
    assert same(NativeLinear(library, (segment,), twice=twice)(x), expected)


def fits(name: str, inputs: int) -> bool:
    return inputs % TYPES[name].values == 0


@pytest.mark.parametrize(
    ("name", "rows", "outputs", "inputs", "on", "twice"),
    covering(itertools.product(TYPES, ROWS, OUTPUTS, INPUTS, THREADS, (False, True))),
)
def test_equals_the_twin(name: str, rows: int, outputs: int, inputs: int, on: int, twice: bool, threads: None) -> None:
    check(name, rows, outputs, inputs if fits(name, inputs) else 512, on, twice)


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_equals_the_twin_everywhere(name: str, threads: None) -> None:
    for rows, outputs, inputs, on, twice in itertools.product(ROWS, OUTPUTS, INPUTS, THREADS, (False, True)):
        if fits(name, inputs):
            check(name, rows, outputs, inputs, on, twice)


@pytest.mark.parametrize("twice", [False, True], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize("name", TYPES)
def test_the_twin_is_near_the_values_product(name: str, twice: bool) -> None:
    """Against float64 products with the dequantised weights: as far as rounding each input to 1/127 of its block's largest allows,
    and in the mean square within a factor of 3 of what such rounding gives. Rounded twice, the step is at least 254 times smaller,
    beside which the rounding of float32 sums shows."""
    segment, x = blocks(TYPES[name], 33, 512, seed=3), torch.randn(40, 512, generator=torch.Generator().manual_seed(2))
    values = dequantise(segment.rows, segment.block).double()
    error = twin(segment, x, twice)[0].double() - x.double() @ values.T
    width = TYPES[name].values
    step = (x.unflatten(1, (-1, width)).abs().amax(-1) / 127).double().repeat_interleave(width, 1)
    if twice:
        step = step / 254
    bound, sums = step / 2 @ values.abs().T, 2.0**-24 * (x.double().abs() @ values.abs().T)
    assert (error.abs() <= bound * 1.001 + 20 * sums + 1e-6 * bound.max()).all()
    expected = ((step**2 / 12) @ (values**2).T).mean().sqrt()
    assert (
        expected / 3 < error.square().mean().sqrt() < 3 * expected + (5 * sums.square().mean().sqrt() if twice else 0)
    )


@pytest.mark.parametrize("name", TYPES)
def test_rows_of_packed_weights_are_their_values(name: str) -> None:
    library = load_library()
    assert library is not None
    segment = blocks(TYPES[name], 41, 512)
    found = NativeLinear(library, (segment,)).rows(torch.arange(41))
    assert same(found, dequantise(segment.rows, segment.block))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_stays_alone(bad: float) -> None:
    library = load_library()
    assert library is not None
    for name in ("q8_0", "q4_1", "q4_k", "q6_k"):
        linear, x = NativeLinear(library, (blocks(TYPES[name], 24, 512),)), torch.randn(3, 512)
        good = linear(x)
        x[1, 300] = bad
        found = linear(x)
        assert found[1].isnan().any() and same(found[[0, 2]], good[[0, 2]])


def test_no_rows_have_no_products() -> None:
    library = load_library()
    assert library is not None
    for name in ("q8_0", "q4_k"):
        assert NativeLinear(library, (blocks(TYPES[name], 24, 512),))(torch.empty(0, 512)).shape == (0, 24)


def test_a_linear_of_several_types() -> None:
    """Segments of one linear are what each is alone; plain ones beside packed ones."""
    library = load_library()
    assert library is not None
    parts = [blocks(TYPES[name], n, 512) for name, n in (("q4_k", 40), ("q6_k", 23), ("q8_0", 9), ("q5_0", 1))]
    plain = torch.randn(5, 512, generator=torch.Generator().manual_seed(4))
    segments = (
        *parts,
        Segment(BLOCKS[0], plain.view(torch.uint8)),
        Segment(BLOCKS[30], plain.bfloat16().view(torch.uint8)),
    )
    x = inputs_of(7, 512)
    found = NativeLinear(library, segments)(x)
    expected = torch.cat([twin(part, x)[0] for part in parts], 1)
    assert same(found[:, :73].contiguous(), expected)
    assert (found[:, 73:78] - x @ plain.T).abs().max() < 1e-4 * found[:, 73:78].abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("level", [level.name for level in isa.levels()])
def test_every_level_gives_the_same_bits(level: str, tmp_path) -> None:
    """The kernels of each set of instructions that this CPU has, against the twin."""
    chosen = next(one for one in isa.levels() if one.name == level)
    path = compiled.build(compiled.DECODER, compiled.find_compiler(), tmp_path, openmp=False, level=chosen)
    library = ctypes.CDLL(str(path))
    cases = itertools.product(TYPES, (*ROWS, 19), (1, 9, 24, 257), (288, 512), (False, True))
    for name, rows, outputs, inputs, twice in cases:
        if fits(name, inputs):
            segment, x = blocks(TYPES[name], outputs, inputs), inputs_of(rows, inputs)
            found = NativeLinear(library, (segment,), twice=twice)(x)
            assert same(found, twin(segment, x, twice)[0]), (name, rows, outputs, inputs, twice)
