"""The frozen tables are what the released wheels say; `make test-plan` downloads these. Nothing of them is installed or run."""

from __future__ import annotations

import ast
import os
import zipfile
from pathlib import Path

import pytest

from outrider.drafters.vllm_versions import INTERNAL, VERSIONS
from outrider.evaluate.planning.launch import RAY_FIELDS, RAY_GPUS

WHEELS = Path(os.environ.get("OUTRIDER_WHEELS", ""))
pytestmark = pytest.mark.skipif("OUTRIDER_WHEELS" not in os.environ, reason="OUTRIDER_WHEELS names no folder of wheels")


def module(wheel: str, name: str) -> ast.Module:
    """The parsed source of a module in the one wheel that matches."""
    (path,) = WHEELS.glob(wheel)
    with zipfile.ZipFile(path) as archive:
        return ast.parse(archive.read(name))


def fields(tree: ast.Module, kind: str) -> set[str]:
    """Annotated, public attributes of a class."""
    (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == kind)
    names = {s.target.id for s in found.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)}
    return {n for n in names if not n.startswith("_")}


def literals(tree: ast.Module) -> dict[str, list[str]]:
    """Name -> the strings of a `Literal` at the top of a module, those of nested ones included."""
    out: dict[str, list[str]] = {}
    for n in tree.body:
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Subscript) and isinstance(n.value.value, ast.Name):
            if n.value.value.id != "Literal" or not isinstance(n.targets[0], ast.Name):
                continue
            inside = n.value.slice.elts if isinstance(n.value.slice, ast.Tuple) else [n.value.slice]
            found: list[str] = []
            for x in inside:
                found += [str(x.value)] if isinstance(x, ast.Constant) else out[x.id] if isinstance(x, ast.Name) else []
            out[n.targets[0].id] = found
    return out


@pytest.mark.parametrize("release", VERSIONS)
def test_vllm(release: str) -> None:
    tree, table = module(f"vllm*-{release}.*.whl", "vllm/config/speculative.py"), VERSIONS[release]
    assert fields(tree, "SpeculativeConfig") - INTERNAL == table.keys
    known = literals(tree)
    methods = {m for m in known["SpeculativeMethod"] if not m.endswith("_mtp")}
    assert methods == table.methods
    assert set(known["RejectionSampleMethod"]) == table.rules
    assert set(known["DraftSampleMethod"]) == {"greedy", "probabilistic"}


def test_vllm_methods_that_obey_lengths_by_batch() -> None:
    """The tuple of methods in `_maybe_disable_dynamic_sd_for_v1` of 0.33; 0.32 has no such check and the same runner."""
    tree, name = module("vllm*-0.33.*.whl", "vllm/config/vllm.py"), "_maybe_disable_dynamic_sd_for_v1"
    (found,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    tuples = (n.elts for n in ast.walk(found) if isinstance(n, ast.Tuple))
    assert VERSIONS["0.33"].by_load in [{e.value for e in t if isinstance(e, ast.Constant)} for t in tuples]


def test_ray() -> None:
    folder = "ray/llm/_internal/serve/core"
    llm = module("ray-2.60.0-*.whl", f"{folder}/configs/llm_config.py")
    builder = module("ray-2.60.0-*.whl", f"{folder}/ingress/builder.py")
    place = ("applications", "args", "llm_configs")
    assert fields(llm, "LLMConfig") == RAY_FIELDS[place]
    assert fields(llm, "ModelLoadingConfig") == RAY_FIELDS[*place, "model_loading_config"]
    assert fields(builder, "LLMServingArgs") == RAY_FIELDS[place[:2]]
    scaling = fields(module("ray-2.60.0-*.whl", "ray/serve/config.py"), "AutoscalingConfig")
    assert scaling == RAY_FIELDS[*place, "deployment_config", "autoscaling_config"]
    deployment = fields(module("ray-2.60.0-*.whl", "ray/serve/_private/config.py"), "DeploymentConfig")
    options = RAY_FIELDS[*place, "deployment_config"]
    assert options - {"name", "ray_actor_options"} <= deployment
    app = fields(module("ray-2.60.0-*.whl", "ray/serve/schema.py"), "ServeApplicationSchema")
    assert RAY_FIELDS["applications",] <= app


def test_ray_gpus() -> None:
    tree = module("ray-2.60.0-*.whl", "ray/util/accelerators/accelerators.py")
    names = {n.value.value for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)}
    assert set(RAY_GPUS.values()) <= names
