"""Whatever makes decoding slower than this machine allows is said, once, with its remedy: every cause is provoked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from outrider import isa, notices, threads
from outrider.build import Engine, build_engine
from outrider.cli import engine_options
from outrider.models import lean, quantised
from outrider.models.load import inspect_checkpoint, load_target
from outrider.nn import compiled
from outrider.nn.held import library_for
from outrider.options import EngineOptions
from outrider.params import SamplingParams
from outrider.verify import native
from tests.checkpoints import make_checkpoint
from tests.compilers import needs_compiler

BEST = isa.levels()[-1] if isa.levels() else None
LINUX = pytest.mark.skipif(BEST is None, reason="this system does not say what its CPU has")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=True, hidden_size=64)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, no library of a wheel, and no memory of an earlier load."""

    def forget() -> None:
        compiled.load.cache_clear()
        native.library.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "WHEEL", tmp_path / "wheel")
    monkeypatch.delenv("CXX", raising=False)
    forget()
    yield tmp_path
    forget()


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The libraries that this machine's cache has anyway, by their unit's name: for all of its instructions."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "outrider" / "native"
    try:
        compiler = compiled.find_compiler()
    except compiled.BuildError:
        pytest.skip("no compiler")
    built = {u.name: compiled.build(u, compiler, folder, openmp=u.threads) for u in compiled.UNITS}
    kept = tmp_path_factory.mktemp("built")
    return {name: Path(shutil.copy(path, kept / f"{name}.so")) for name, path in built.items()}


@pytest.fixture
def quick(libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that takes no time."""

    def compile_unit(
        unit: compiled.Unit, compiler: list[str], flags: list[str], library: Path, link: object = ()
    ) -> None:
        library.write_bytes(libraries[unit.name].read_bytes())
        library.chmod(0o700)

    monkeypatch.setattr(compiled, "compile_unit", compile_unit)


def said(model: Path, draft: str | None = None) -> str:
    """The notices of an engine that decodes a few tokens; none is there twice, each is one sentence with a remedy."""
    engine = build_engine(model, str(draft or model), slots=1, max_length=64, length=2)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(set(engine.notices)) == len(engine.notices)
    assert all(
        "\n" not in n and any(w in n for w in ("set ", "install ", "leave ", "choose ", "use ")) for n in engine.notices
    )
    return "\n".join(engine.notices)


def test_without_a_compiler(fresh: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    text = said(model)
    assert text.count("decoding runs on PyTorch") == text.count("verified by PyTorch") == 1
    assert "no C++ compiler" in text
    assert "install g++" in text


def test_with_a_compiler_that_fails(fresh: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fresh / "broken"
    compiler.write_text("#!/bin/sh\necho 'error: out of order' >&2\nexit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    assert "out of order" in said(model)


@pytest.mark.usefixtures("quick")
def test_without_a_cache_that_can_be_written(fresh: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder is compiled for this process alone, and that costs seconds at every start."""
    (fresh / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    assert "compiled again at every start" in said(model)
    assert "XDG_CACHE_HOME" in said(model)
    assert isinstance(load_target(model), lean.LeanTarget)
    assert load_target(model).native is not None  # type: ignore[attr-defined]


@pytest.mark.usefixtures("quick")
def test_with_a_cache_that_others_can_write(fresh: Path, model: Path) -> None:
    folder = compiled.cache_folder()
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "written by other users" in said(model)


def test_with_a_compiler_without_openmp(
    fresh: Path, model: Path, libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_unit(
        unit: compiled.Unit, compiler: list[str], flags: list[str], library: Path, link: object = ()
    ) -> None:
        if "-fopenmp" in flags:
            raise compiled.BuildError("clang++ failed (no OpenMP)", compiled.COMPILER)
        library.write_bytes(libraries[unit.name].read_bytes())
        library.chmod(0o700)

    monkeypatch.setattr(compiled, "compile_unit", compile_unit)
    assert "uses one thread: clang++ failed (no OpenMP)" in said(model)


def test_switched_off(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    assert said(model).count("OUTRIDER_NATIVE is 0; unset it") == 2  # decoding, and verification


@LINUX
def test_a_wheel_s_library_needs_no_compiler(
    fresh: Path, model: Path, libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one for all of this CPU's instructions is as good as one compiled here; a lesser one is better than none."""
    assert BEST is not None
    folder = compiled.WHEEL / isa.machine()
    folder.mkdir(parents=True)
    for unit in compiled.UNITS:
        shutil.copy(libraries[unit.name], folder / compiled.wheel_name(unit, BEST))
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    text = said(model)
    assert "PyTorch" not in text
    assert "instructions" not in text
    lesser = isa.levels()[0]
    if lesser is BEST:
        return
    for unit in compiled.UNITS:
        (folder / compiled.wheel_name(unit, BEST)).rename(folder / compiled.wheel_name(unit, lesser))
    compiled.load.cache_clear()
    text = said(model)
    assert f"'decoder' uses {lesser.kind} instructions" in text
    assert "no C++ compiler" in text


@pytest.mark.usefixtures("quick", "fresh")
def test_a_stale_library_of_a_wheel_is_not_loaded(fresh: Path, model: Path) -> None:
    folder = compiled.WHEEL / isa.machine()
    folder.mkdir(parents=True)
    for level in isa.levels():
        (folder / f"decoder-{level.name}-0123456789abcdef.so").write_bytes(b"of other sources")
    assert load_target(model).native is not None  # type: ignore[attr-defined]


def test_dtypes_that_are_emulated(gpt2: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers gets float32 where bfloat16 is emulated; who asks for a half type there hears it."""
    monkeypatch.setattr(isa, "cpu_flags", lambda: frozenset({"fpu", "avx2"}))
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    assert load_target(gpt2).dtype == torch.float32
    assert not any("emulates" in n for n in load_target(gpt2).notices)
    for dtype in ("bfloat16", "float16"):
        assert any(
            f"runs in {dtype}, which this CPU only emulates" in n for n in load_target(gpt2, dtype=dtype).notices
        )
        assert any("emulates" in n for n in inspect_checkpoint(gpt2, dtype=dtype).notices)
    assert any("float16; choose dtype float32" in n for n in load_target(model, dtype="float16").notices)
    assert any("float64; choose dtype float32" in n for n in load_target(model, dtype="float64").notices)


def test_a_draft_on_transformers_is_not_emulated_for_its_target_s_sake(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isa, "cpu_flags", lambda: frozenset({"fpu", "avx2"}))
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    monkeypatch.setattr("outrider.loading.find_tokenizer", lambda name: None)
    monkeypatch.setattr("outrider.models.dtypes.load_library", lambda: object())
    monkeypatch.setattr(lean, "load_native", lambda config, weights: (None, []))
    target = make_checkpoint(tmp_path, "llama", hidden_size=64, vocab_size=96, dtype=torch.bfloat16)
    from outrider.loading import Loaded, load_model

    loaded = Loaded(str(target), load_target(target), None, (), EngineOptions())
    assert loaded.target.dtype == torch.bfloat16
    assert load_model(loaded, EngineOptions(), str(gpt2))[0].dtype == torch.float32
    loaded.models.clear()
    assert load_model(loaded, EngineOptions(dtype="bfloat16"), str(gpt2))[0].dtype == torch.bfloat16  # asked for


def test_transformers_where_our_runtime_would_do(model: Path) -> None:
    target = load_target(model, implementation="hf")
    assert any("leave implementation 'hf' out" in n for n in target.notices)


@needs_compiler
@pytest.mark.parametrize("role", ["draft", "target"])
@pytest.mark.parametrize(("rounded", "told"), [(2e-3, True), (1e-3, False)])
def test_quantised_weights_that_are_slower(
    rounded: float, told: bool, role: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([rounded, 1e-3])
    monkeypatch.setattr(quantised, "seconds", lambda forward, new_kv: next(times))
    notices = load_target(model, dtype="float32", quantize="int8", role=role).notices
    assert [f"--quantize-{role} out" in n for n in notices if "int8" in n] == [True] * told


@needs_compiler
def test_how_long_quantised_and_plain_blocks_take_is_measured(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both run natively on the same rows; both times are real ones."""
    seen = []
    monkeypatch.setattr(quantised, "slower", lambda quantize, role, *times: seen.append((quantize, role, *times)))
    load_target(model, dtype="float32", quantize="q4_0", role="draft")
    ((name, role, rounded, plain, dtype),) = seen
    assert (name, role, dtype) == ("q4_0", "draft", "float32")
    assert rounded > 0 < plain


@pytest.mark.parametrize(
    ("used", "cores", "named", "expected"),
    [
        (2, 2, None, None),
        (1, 4, "1", "1 of the 4 cores it may use: unset OMP_NUM_THREADS"),
        (3, 8, None, "3 of the 8 cores it may use: set OMP_NUM_THREADS=8"),
        (8, 2, "8", "8 threads on 2 cores, which wait for each other: set OMP_NUM_THREADS=2"),
    ],
)
def test_threads_and_cores(
    used: int, cores: int, named: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_cores", lambda usable: cores)
    monkeypatch.setattr(threads, "quota", lambda: 10**6)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if named is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", named)
    found = threads.thread_notice(used)
    assert (found is None) == (expected is None)
    assert expected is None or expected in (found or "")


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", None), ("150000 100000", 2), ("20000 100000", 1), ("x", None)]
)
def test_a_container_s_quota(text: str, cores: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert threads.quota(tmp_path) == cores or (cores is None and threads.quota(tmp_path) > 10**6)


def test_a_gpu_that_lies_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "GPU", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = torch.device("cpu")
    assert any("GPU" in n for n in notices.machine_notices(cpu, False))
    assert not any("GPU" in n for n in notices.machine_notices(cpu, False, "cpu"))  # the CPU was asked for


def test_an_option_that_does_nothing(model: Path) -> None:
    engine = build_engine(model, "ngram", slots=1, max_length=64, draft_quantize="int8")
    assert any("draft_quantize='int8' does nothing" in n for n in engine.notices)


@pytest.mark.skipif(library_for(torch.ones(1)) is None, reason="compiled drafters need a C++ compiler")
@pytest.mark.parametrize("draft", ["eagle", "medusa", "dflash", "ngram+eagle", "stop:eagle"])
def test_a_trained_drafter_is_rounded(draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option does something, and says so where it does not: in torch."""
    told = "draft_quantize='q8_0' does nothing"
    engine = Engine.build(draft=draft, length=3, slots=1, max_length=64, draft_quantize="q8_0")
    assert not any(told in n for n in engine.notices)
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    engine = Engine.build(draft=draft, length=3, slots=1, max_length=64, draft_quantize="q8_0")
    assert any(told in n for n in engine.notices)


def test_the_command_line_says_each_once(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    engine = engine_options.load_engine(EngineOptions(target=str(model), draft=str(model), slots=1, max_length=64))
    shown = capsys.readouterr().err
    assert engine.notices
    assert all(shown.count(notice) == 1 for notice in engine.notices)
