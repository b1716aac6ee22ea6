"""A driver to be killed: `python -m tests.evaluate.sweep_driver STORE CELLS ATTEMPTS`. Cell 7 kills every worker."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

from outrider.evaluate.sweep.executor import ProcessExecutor
from tests.evaluate.sweep_contract import drive
from tests.evaluate.sweep_work import WORK, cells


def main(where: str, count: int, attempts: int) -> None:
    some = cells(count, die={7: True})
    with closing(ProcessExecutor(WORK, 2, 2)) as executor:
        _, book = drive(Path(where), some, executor, attempts=attempts)
        book.finish({})
        book.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
