"""Few numbers are worked on by one thread, many by all: by their size alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from outrider.threads import FEW, serially

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP runtime is found on Linux")


@pytest.fixture
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("numbers", "inside"), [(0, 1), (FEW, 1), (FEW + 1, 3)])
def test_only_few_numbers_are_left_to_one_thread(numbers: int, inside: int, three: None) -> None:
    with serially(numbers):
        assert torch.get_num_threads() == inside
        with serially(FEW + 1):
            assert torch.get_num_threads() == inside
        with serially(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == inside
    assert torch.get_num_threads() == 3


def test_the_number_comes_back_after_an_error(three: None) -> None:
    with pytest.raises(ZeroDivisionError), serially(1):
        _ = 1 / 0
    assert torch.get_num_threads() == 3


def test_other_threads_keep_theirs(three: None) -> None:
    with ThreadPoolExecutor(1) as pool, serially(1):
        assert pool.submit(torch.get_num_threads).result() == 3
