"""Modules called without torch's bookkeeping compute the same bits, hear the same hooks, and are the target's own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedModel

from outrider.models.hf.direct import call_directly
from outrider.models.hf.target import HFTarget
from tests.models.hf_families import SPREAD, build

TEXT = torch.tensor([[3, 5, 7, 9, 11, 13, 15]])


def direct(family: str) -> Any:
    """A copy of the family's model, called directly. Any: torch's modules do not say which children they have."""
    model: PreTrainedModel = copy.deepcopy(build(family))
    call_directly(model)
    return model


@pytest.mark.parametrize("family", SPREAD)
@torch.no_grad()
def test_the_same_bits(family: str) -> None:
    assert torch.equal(direct(family)(input_ids=TEXT).logits, build(family)(input_ids=TEXT).logits)


def test_every_hook_is_heard() -> None:
    """Before and after, of one module and of all, added later, and no longer once it is gone."""
    model, heard = direct("opt"), list[str]()
    part = model.get_decoder().layers[0].fc1
    for where, add in (("before", part.register_forward_pre_hook), ("after", part.register_forward_hook)):
        hook = add(lambda *_, where=where: heard.append(where))
        model(input_ids=TEXT)
        hook.remove()
        model(input_ids=TEXT)
        assert heard == [where]
        heard.clear()
    everywhere = register_module_forward_hook(lambda module, *_: heard.append(type(module).__name__))
    try:
        model(input_ids=TEXT)
    finally:
        everywhere.remove()
    assert heard.count("Linear") == sum(type(m).__name__ == "Linear" for m in model.modules())


def test_a_hook_changes_what_is_computed() -> None:
    model = direct("opt")
    plain = model(input_ids=TEXT).logits
    model.get_decoder().layers[1].register_forward_hook(lambda module, args, out: out * 0.0)
    assert not torch.equal(model(input_ids=TEXT).logits, plain)


def test_gradients_flow_and_backward_hooks_are_heard() -> None:
    part, heard = nn.Linear(3, 2), list[int]()
    layer = nn.Sequential(part)
    call_directly(layer)
    part.register_full_backward_hook(lambda *_: heard.append(1))
    layer(torch.ones(1, 3, requires_grad=True)).sum().backward()
    assert heard == [1]
    assert part.weight.grad is not None and torch.equal(part.weight.grad, torch.ones(2, 3))


def test_what_replaces_a_child_or_a_parameter_is_used() -> None:
    layer = nn.Sequential(nn.Linear(2, 2, bias=False))
    call_directly(layer)
    one = torch.ones(1, 2)
    layer[0].weight = nn.Parameter(torch.eye(2) * 5)
    assert torch.equal(layer(one), 5 * one)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part: nn.Module = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(x)

    pair, other = Pair(), Pair()
    for each in (pair, other):
        call_directly(each)
    pair.part = nn.Identity()
    assert torch.equal(pair(one), one)
    other._modules["part"] = nn.Identity()
    assert not torch.equal(other(one), one), "as the docstring warns"


def test_classes_keep_their_names_and_own_calls() -> None:
    class Doubled(nn.Module):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.forward(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    own, plain = Doubled(), nn.Linear(2, 2)
    whole = nn.ModuleList([own, plain])
    call_directly(whole)
    call_directly(whole)  # twice is once
    assert isinstance(own, Doubled)
    assert float(own(torch.ones(()))) == 2.0
    assert isinstance(plain, nn.Linear)
    assert (type(plain).__name__, type(plain).__module__) == ("Linear", nn.Linear.__module__)


def test_a_compiled_forward_is_used() -> None:
    layer = nn.Linear(2, 2)
    call_directly(layer)
    layer._compiled_call_impl = lambda x: x + 1
    assert torch.equal(layer(torch.zeros(2)), torch.ones(2))


def test_a_users_model_is_left_as_it_is() -> None:
    model = copy.deepcopy(build("opt"))
    kinds = [type(m) for m in model.modules()]
    target = HFTarget(model)
    assert [type(m) for m in model.modules()] == kinds
    assert not any(set(vars(m)) & (set(m._modules) | set(m._parameters)) for m in model.modules())
    assert [type(m).__name__ for m in target.model.modules()] == [k.__name__ for k in kinds]


def test_a_model_that_is_called_directly_can_be_a_users_model() -> None:
    """The copy's children are its own, and its weights are those of the model, also after they were written."""
    model = direct("opt")
    target = HFTarget(model)
    assert target.model.get_decoder() is not model.get_decoder()
    assert target.model.get_decoder() is target.model.model.decoder
    before = target.weights
    with torch.no_grad():
        model.get_decoder().layers[0].fc1.weight.mul_(2.0)
        assert torch.equal(target.model(input_ids=TEXT).logits, model(input_ids=TEXT).logits)
    assert target.weights != before


def test_what_is_taken_away_is_gone() -> None:
    """By None, by `del`, and by those who put something else in its place (parametrizations)."""
    layer, other, third = (nn.Linear(2, 2) for _ in range(3))
    held: Any = layer
    whole = nn.ModuleDict({"layer": layer, "other": other, "third": third})
    call_directly(whole)
    one = torch.ones(1, 2)
    held.bias = None
    assert held.bias is None
    assert torch.equal(layer(one), one @ layer.weight.T)
    del other.bias
    assert not hasattr(other, "bias")
    register_parametrization(third, "weight", nn.Softmax(dim=-1))
    assert torch.allclose(third.weight.sum(-1), torch.ones(2))
    del whole["layer"]
    assert [*whole] == ["other", "third"]


def test_copies_and_pickles_are_plain() -> None:
    """Another process, which has the classes of transformers alone, can read them. A model of its own: transformers leaves a hook
    in one that was asked for hidden states, as another test may ask the shared one, and such a model cannot be pickled."""
    model: Any = build.__wrapped__("opt")
    call_directly(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in build("opt").modules()]
        assert not any(set(vars(m)) & (set(m._modules) | set(m._parameters)) for m in other.modules())
        assert torch.equal(other(input_ids=TEXT).logits, model(input_ids=TEXT).logits)
        first, second = (m.get_decoder().layers[0].fc1.weight for m in (other, model))
        assert first is not second
