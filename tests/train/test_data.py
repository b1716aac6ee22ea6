"""The corpus: stable split by file, each text once, batches that depend on the step number alone."""

import numpy as np
import pytest
import torch

from outrider.train import data


def documents(count=400):
    return [data.Document(f"pkg{i % 7}/module_{i}.py", f"x = {i}\n" * 5) for i in range(count)]


def test_split_is_by_file_and_does_not_depend_on_the_other_files():
    everything = documents()
    training, held_out = data.split(everything)
    assert len(training) + len(held_out) == len(everything)
    assert 1 <= len(held_out) <= len(everything) // 15
    fewer, fewer_held_out = data.split(everything[::3])
    assert {d.path for d in fewer_held_out} == {d.path for d in held_out} & {d.path for d in everything[::3]}
    assert not {d.path for d in fewer} & {d.path for d in held_out}


def test_split_is_pinned():
    """A changed hash would move training text into the held-out part of shipped models."""
    chosen = [d.path for d in documents() if data.is_held_out(d.path)]
    assert chosen[:3] == PINNED


PINNED = ["pkg2/module_58.py", "pkg6/module_62.py", "pkg2/module_254.py"]


def test_equal_texts_are_kept_once():
    twice = [data.Document("a.py", "pass\n"), data.Document("b.py", "pass\n"), data.Document("c.py", "other\n")]
    assert [d.path for d in data.deduplicate(twice)] == ["a.py", "c.py"]


def test_find_skips_packages_and_unreadable_files(tmp_path):
    for name in ("a.py", "site-packages/b.py", "lib2to3/tests/c.py", "sub/d.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\xef\xbb\xbfx = 1\r\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.py").write_bytes(b"\n")
    found = data.find_documents(tmp_path)
    assert [(d.path, d.text) for d in found] == [("a.py", "x = 1\n"), ("sub/d.py", "x = 1\n")]


def test_batches_are_a_function_of_the_step():
    stream = np.arange(1000, dtype=np.uint16)
    batches = data.Batches(stream, rows=4, length=16, seed=3)
    later = batches(batches.per_epoch + 2)
    assert torch.equal(later, data.Batches(stream, rows=4, length=16, seed=3)(batches.per_epoch + 2))
    assert later.shape == (4, 17)
    assert torch.equal(later[:, 1:], later[:, :-1] + 1)  # windows are contiguous


def test_an_epoch_repeats_no_window():
    batches = data.Batches(np.arange(1000, dtype=np.uint16), rows=4, length=16, seed=0)
    first = torch.cat([batches(step)[:, 0] for step in range(batches.per_epoch)])
    assert len(first.unique()) == len(first)


def test_too_short_a_stream_is_an_error():
    with pytest.raises(ValueError, match="fewer than one batch"):
        data.Batches(np.zeros(10, dtype=np.uint16), rows=4, length=16)(0)


def test_windows_cover_the_stream_without_overlap_of_predictions():
    w = data.windows(np.arange(101, dtype=np.uint16), 10)
    assert w.shape == (10, 11)
    assert torch.equal(w[:, 1:].flatten(), torch.arange(1, 101))


def test_tokenizer_restores_text_and_excerpts_end_at_lines():
    from outrider.models.hf.fresh import train_tokenizer

    texts = [
        data.Document(f"{i}.py", "".join(f"def f{n}(a, b):\n    return a + b + {n * i}  # é\n\n" for n in range(90)))
        for i in range(3)
    ]
    tokenizer = train_tokenizer([d.text for d in texts], 300)
    assert tokenizer.decode(tokenizer.encode(texts[0].text, add_special_tokens=False)) == texts[0].text
    stream = data.encode(texts, tokenizer, tokenizer.eos_token_id)
    assert (stream == tokenizer.eos_token_id).sum() == 3
    rows = data.excerpts(texts, tokenizer, count=5, seed=0)
    assert len({row["prompt"] for row in rows}) == 5
    for row in rows:
        assert row["prompt"].endswith("\n")
        assert 60 <= len(tokenizer.encode(row["prompt"], add_special_tokens=False)) <= 120
