"""Instructions of this CPU: which it has, which were asked for, and what is said of those that lie idle."""

from __future__ import annotations

import pytest

from outrider import isa
from outrider.errors import ConfigError

BEST = isa.levels()[-1] if isa.levels() else None
LINUX = pytest.mark.skipif(BEST is None, reason="this system does not say what its CPU has")


@LINUX
@pytest.mark.parametrize("text", ["sse9", "prebuilt:sse9", "neon" if isa.machine() == "x86_64" else "avx2"])
def test_instructions_that_are_not_there(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(isa.VARIABLE, text)
    with pytest.raises(ConfigError, match="native") as error:
        isa.chosen()
    assert all(level.name in str(error.value) for level in isa.levels())


@LINUX
def test_fewer_instructions_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BEST is not None
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    assert isa.unused(BEST.kind) is None
    lesser = isa.levels()[0]
    if lesser is BEST:
        pytest.skip("this CPU has one level")
    assert "newer g++" in (isa.unused(lesser.kind) or "")
    monkeypatch.setenv(isa.VARIABLE, lesser.name)
    for name, value in lesser.torch:
        monkeypatch.setenv(name, value)
    assert f"{isa.VARIABLE}={lesser.name} asks for it; unset it" in (isa.unused(lesser.kind) or "")
    monkeypatch.delenv(lesser.torch[0][0])
    assert "PyTorch, which was imported before outrider, is not held to it" in (isa.unused(lesser.kind) or "")
    assert not isa.limit_torch()  # too late
    assert not isa.chosen().native
    assert not isa.multiplies_bfloat16()


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("sse2", "generic"),
        ("avx2 fma f16c bmi1 bmi2 movbe abm", "avx2"),
        ("avx2 fma f16c bmi1 bmi2 movbe abm avx_vnni", "avx_vnni"),
        ("avx2 fma f16c bmi1 bmi2 movbe abm avx512f avx512bw avx512cd avx512dq avx512vl", "avx512"),
        ("avx2 fma f16c bmi1 bmi2 movbe abm avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni", "avx512_vnni"),
        (
            "avx2 fma f16c bmi1 bmi2 movbe abm avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx512_bf16",
            "avx512_bf16",
        ),
    ],
)
def test_what_a_cpu_has(flags: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "machine", lambda: "x86_64")
    monkeypatch.setattr(isa, "cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    choice = isa.chosen()
    assert choice.level is not None
    assert (choice.level.name, choice.native, choice.prebuilt) == (name, True, False)
    monkeypatch.setenv(isa.VARIABLE, f"prebuilt:{name}")
    assert isa.chosen().prebuilt
