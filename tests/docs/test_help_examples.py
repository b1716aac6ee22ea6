"""The example that each command's help gives runs: in a folder with the files that it names, at small sizes."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.cli.test_options import COMMANDS, example, run
from tests.gguf_files import make_pair

ROOT = Path(__file__).parents[2]
PARSED = ("serve", "train", "theory figures", "watch")
"""Examples that are only parsed: they run until they are stopped, write to a fixed folder, take minutes, or need a server."""
SMALL = {
    "demo": ("--max-tokens", "4"),
    "generate": ("--max-tokens", "4"),
    "bench": ("--count", "2", "--repeats", "1", "--warmup", "0", "--max-tokens", "4"),
    "predict": ("--max-tokens", "4", "--count", "2"),
    "plan": ("--max-tokens", "4", "--count", "4", "--rounds", "2", "--lengths", "0,2"),
    "tree": ("--max-tokens", "4", "--count", "2", "--nodes", "3", "--depth", "2", "--width", "2"),
    "audit": ("--max-tokens", "4", "--count", "2"),
    "image": ("--count", "1"),
}
"""What is said besides, so that it takes a moment; the last one of two counts."""
VERDICTS = ("audit", "gate", "plan", "ab run", "ab status", "ab rehearse", "runs compare")
"""Commands whose exit code may also be 1 or 3: texts this short decide nothing."""
ORDER = ("bench", "runs", "gate", "ab design", "ab run", "ab status", "ab report", "ab rehearse", "ab end")
"""These need what those before them have written."""


RESULT = {
    "backend": "vllm", "model_id": "m", "num_prompts": 2, "duration": 2.0, "completed": 2, "failed": 0, "errors": ["", ""],
    "total_input_tokens": 7, "total_output_tokens": 4, "request_throughput": 1.0, "output_throughput": 2.0,
    "input_lens": [3, 4], "output_lens": [2, 2], "ttfts": [0.1, 0.2], "itls": [[0.1], [0.1]], "generated_texts": ["a", "b"],
}  # fmt: skip
"""A result file of vLLM's bench serve."""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that examples name."""
    monkeypatch.chdir(tmp_path)
    text = re.sub(r"(?m)^name:.*$", "", (ROOT / "examples" / "ab.yaml").read_text())
    Path("ab.yaml").write_text(re.sub(r"(count|max_tokens): \d+", r"\1: 5", text))
    Path("live.yaml").write_text("arms: {short: {length: 1}, long: {length: 3}}\ncount: 5\n")
    Path("plan.yaml").write_text("cells: [{kind: bench, count: 2, max_tokens: 4}]\n")
    Path("vllm.json").write_text(json.dumps(RESULT))
    folder, file = make_pair(tmp_path / "made", kind="q8_0", tokenizer=True)
    folder.rename("my-model")
    file.rename("model.gguf")
    return tmp_path


def test_every_example_runs(
    work: Path, short_audits: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one folder; those that would run for long are parsed by the real parser, callbacks included."""
    at = lambda c: next((i for i, first in enumerate(ORDER) if c.startswith(first)), len(ORDER))  # noqa: E731
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # a conversation that ends at once
    for command in sorted(COMMANDS, key=at):
        argv = shlex.split(example(command))
        if command in PARSED:
            COMMANDS[command].make_context("outrider", argv[1 + len(command.split()) :])
            continue
        argv += SMALL.get(command, ())
        codes = (0, 1, 3) if command in VERDICTS else (0,)
        assert run(monkeypatch, argv) in codes, (argv, capsys.readouterr().err)
        if command == "bench":
            assert run(monkeypatch, [*argv, "--name", "tuesday"]) == 0
        seen = capsys.readouterr()
        assert "Traceback" not in seen.err, command
        assert "--out" not in argv or Path(argv[argv.index("--out") + 1]).exists(), command
