"""What surgery hands back, what it leaves alone, and which masks it refuses."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcqp_prune.apply import verify
from qcqp_prune.apply.masked import masked
from qcqp_prune.apply.shrink import shrink, shrink_and_verify
from qcqp_prune.apply.verification import Verification
from qcqp_prune.apply.verify import check_counts
from qcqp_prune.errors import MaskMismatchError, VerificationError
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.masks import Masks
from qcqp_prune.graph.trace import trace
from qcqp_prune.program.forms import CountForm
from tests.networks import all_kept, difference, keep, liven, prune_and_check, random_masks, run, snapshot

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """x(3) -> a(8) -> norm -> b(6) -> dropout -> head(4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.b(torch.tanh(self.norm(self.a(x)))).mean((2, 3))))


class Written(Net):
    """The same with a shape written into its forward."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.a(x)))
        y = torch.cat([y[:, 4:8], y[:, 0:4]], 1)
        return self.head(self.dropout(self.b(y).view(-1, 6, 16).mean(2)))


def test_own_classes_where_they_fit_and_a_graph_where_not() -> None:
    small, checked = shrink_and_verify(m := liven(Net()), g := trace(m, X), random_masks(g, 0, 0.5))
    assert type(small) is Net
    assert (checked.realisation, checked.note) == ("modules", "")
    small, checked = shrink_and_verify(m := liven(Written()), g := trace(m, X), random_masks(g, 0, 0.5))
    assert isinstance(small, torch.fx.GraphModule)
    assert checked.realisation == "graph"
    assert "own forward does not fit" in checked.note
    with pytest.raises(VerificationError, match='shapes written into it; use realisation="graph"'):
        shrink(m, g, random_masks(g, 0, 0.5), realisation="modules")


def test_other_values_are_not_called_other_shapes() -> None:
    class Scaled(Net):
        """It divides by the width that the layer has now."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / self.a.out_channels

    model = liven(Scaled())
    masks = keep(graph := trace(model, X), a=[0, 1, 5])
    with pytest.raises(VerificationError, match="forward does not follow what its layers keep; use realis"):
        shrink(model, graph, masks, realisation="modules")
    _, checked = shrink_and_verify(model, graph, masks)
    assert checked.realisation == "graph"
    assert "own forward does not compute what the masked network does (outputs of" in checked.note


@pytest.mark.parametrize("kind", [Net, Written])
def test_the_result_trains_in_its_mode(kind: type[nn.Module]) -> None:
    for training in (True, False):
        model = liven(kind()).train(training)
        graph = trace(model, X)
        small, _ = prune_and_check(model, X, graph, random_masks(graph, 0, 0.5), realisation="auto")
        assert small.training is training
        assert all(m.training is training for m in small.modules())
        small.train()
        before = {name: t.clone() for name, t in small.named_buffers() if "running" in name}
        torch.manual_seed(0)
        first, second = small(X), small(X)
        assert not torch.equal(first, second)  # dropout is alive
        assert all(not torch.equal(before[name], t) for name, t in small.named_buffers() if name in before)
        first.sum().backward()
        assert all(p.grad is not None for p in small.parameters())
        small.eval()
        assert torch.equal(small(X), small(X))


@pytest.mark.parametrize("kind", [Net, Written])
def test_other_batch_sizes(kind: type[nn.Module]) -> None:
    model = liven(kind())
    for batch in (1, 2):
        graph = trace(model, X[:batch])
        masks = random_masks(graph, 0, 0.5)
        small = shrink(model, graph, masks)
        for other in (1, 2, 5):
            x = torch.randn(other, 3, 8, 8)
            assert difference(run(small, x), [masked(model, graph, masks)(x.double())]) < 1e-9


@pytest.mark.parametrize("realisation", ["modules", "graph"])
def test_frozen_parameters_stay_frozen(realisation: Any) -> None:
    model = liven(Net())
    model.a.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    graph = trace(model, X)
    assert all(g.frozen_reason is None for g in graph.groups if g.id in ("a", "b"))
    small = shrink(model, graph, random_masks(graph, 0, 0.5), realisation=realisation)
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert frozen == {"a.weight", "a.bias", "norm.bias"}


def test_nothing_is_shared_with_the_model() -> None:
    model = liven(Net())
    graph = trace(model, X)
    for realisation in ("modules", "graph"):
        for masks in (all_kept(graph), random_masks(graph, 0, 0.5)):
            before = snapshot(model)
            small = shrink(model, graph, masks, realisation=realisation)  # type: ignore[arg-type]
            with torch.no_grad():
                for t in [*small.parameters(), *small.buffers()]:
                    t.zero_()
            assert all(torch.equal(t, before["values"][name]) for name, t in model.named_parameters())
            assert all(torch.equal(t, before["values"][name]) for name, t in model.named_buffers())


def test_shrinking_twice() -> None:
    """A smaller network is traced and pruned again; the old graph no longer fits it."""
    model = liven(Net())
    graph = trace(model, X)
    small = shrink(model, graph, keep(graph, a=[0, 2, 4, 6]))
    again = trace(small, X)
    smaller, _ = prune_and_check(small, X, again, keep(again, a=[1, 3], b=[0]))
    assert torch.equal(smaller.a.weight, model.a.weight[[2, 6]])
    with pytest.raises(MaskMismatchError, match=r"a.weight has shape .* shrink the model that was traced"):
        shrink(small, graph, keep(graph, a=[0]))


def test_a_rewritten_network_can_be_pruned_again_and_stored() -> None:
    model = liven(Written())
    graph = trace(model, X)
    small = shrink(model, graph, random_masks(graph, 0, 0.5))
    again = trace(small, X)
    assert again.prunable_count
    prune_and_check(small, X, again, random_masks(again, 0, 0.5))
    assert small.state_dict().keys() == model.state_dict().keys()


def test_masks_of_another_graph() -> None:
    model = liven(Net())
    graph, other = trace(model, X), trace(model, X[:, :, :7])
    with pytest.raises(MaskMismatchError, match="use the graph that the problem was built from"):
        shrink(model, other, all_kept(graph))
    with pytest.raises(MaskMismatchError, match="use the graph that the problem was built from"):
        masked(model, other, all_kept(graph))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"head": [0]}, "remove units of head, which is kept .network output."),
        ({"a": []}, "remove all outputs of a: keep at least one"),
        ({"b": []}, "remove all outputs of b"),
    ],
)
def test_masks_that_no_network_realises(kept: dict[str, list[int]], message: str) -> None:
    model = liven(Net())
    graph = trace(model, X)
    with pytest.raises(MaskMismatchError, match=message):
        shrink(model, graph, keep(graph, **kept))


def test_masks_of_another_shape() -> None:
    graph = trace(Net(), X)
    for flat in (np.ones(3, bool), np.ones(graph.unit_count), np.ones((graph.unit_count, 1), bool)):
        with pytest.raises(MaskMismatchError, match="make it from this graph"):
            Masks.from_flat(graph, flat)
    broken = Masks(graph.fingerprint, {"a": np.ones(8, bool)})
    with pytest.raises(MaskMismatchError, match="one entry for each group"):
        broken.flat(graph)


def test_a_model_of_other_shapes() -> None:
    graph = trace(Net(), X)
    other = Net()
    other.b = nn.Conv2d(8, 7, 3)
    with pytest.raises(MaskMismatchError, match=r"b.weight has shape \(7, 8, 3, 3\)"):
        shrink(other, graph, keep(graph, a=[0]))
    with pytest.raises(MaskMismatchError, match="is missing"):
        shrink(nn.Sequential(nn.Linear(2, 2)), graph, keep(graph, a=[0]))


def test_a_model_that_cannot_be_copied() -> None:
    class Uncopyable(Net):
        def __init__(self) -> None:
            super().__init__()
            self.generator = (i for i in range(3))

    model = liven(Uncopyable())
    graph = trace(model, X)
    with pytest.raises(MaskMismatchError, match=r"cannot be copied .* rebuild it with its constructor"):
        shrink(model, graph, random_masks(graph, 0))


# -- verification -------------------------------------------------------------------------------------------------


def test_verification_finds_weights_that_were_wired_wrong() -> None:
    """Two units of one axis exchanged, in a graph that is consistent in itself otherwise."""
    model = liven(Net())
    graph = trace(model, X)
    data = json.loads(json.dumps(graph.to_json()))
    read = graph.layers[1].in_axis
    spec = next(t for t in data["tensors"] if t["name"] == "b.weight")
    turned = list(data["axes"][read])
    turned[0], turned[1] = turned[1], turned[0]
    data["axes"].append(turned)
    spec["axes"][1] = len(data["axes"]) - 1
    data["fingerprint"] = ""
    wrong = _unchecked(data)
    with pytest.raises(VerificationError, match=r"outputs of the smaller network differ"):
        shrink(model, wrong, keep(wrong, a=[0, 2, 3]))


def _unchecked(data: dict[str, Any]) -> ChannelGraph:
    from unittest.mock import patch

    with patch.object(ChannelGraph, "fingerprint", ""):
        return ChannelGraph.from_json(data)


def test_verification_finds_a_wrong_count() -> None:
    class Wrong:
        name, unit = "wrong", "things"

        def form(self, graph: ChannelGraph) -> CountForm:
            return CountForm(17, np.zeros(len(graph.groups), np.int64))

        def measure(self, module: nn.Module, inputs: Any) -> int:
            return 18

    model = liven(Net())
    graph = trace(model, X)
    with pytest.raises(VerificationError, match=r"wrong: predicted 17 things, measured 18"):
        shrink(model, graph, random_masks(graph, 0), resources=[Wrong()])
    flat = all_kept(graph).flat(graph)
    assert check_counts(graph, flat, model, ((X,), {}), []) == ()


def test_input_dependence_is_reported() -> None:
    model = liven(Net())
    graph = trace(model, X)
    _, checked = shrink_and_verify(model, graph, random_masks(graph, 0))
    assert checked.input_dependence is not None
    assert checked.input_dependence > 1e-2
    assert checked.caution == ""
    assert Verification.from_json(checked.to_json()) == checked


def test_a_network_that_ignores_its_input_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = liven(Net())
    with torch.no_grad():
        model.norm.weight.zero_()
    graph = trace(model, X)
    _, checked = shrink_and_verify(model, graph, random_masks(graph, 0))
    assert checked.input_dependence == 0
    assert "that they agree proves little" in checked.caution
    assert "proves little" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = liven(Net()).to(dtype)
    graph = trace(model, X.to(dtype))
    masks = random_masks(graph, 0, 0.5)
    small, checked = shrink_and_verify(model, graph, masks)
    assert checked.dtype == "float64"
    assert all(p.dtype == dtype for p in small.parameters())
    item = torch.finfo(dtype).bits // 8
    used = {c.resource: c.measured for c in checked.counts}
    outputs = 36 * 4 + 16 * 3 + 4
    assert used["memory"] == item * (used["params"] + outputs)


def test_a_dtype_written_into_forward() -> None:
    class Typed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float() @ torch.eye(8).flip(0))

    model = liven(Typed())
    graph = trace(model, X)
    _, checked = shrink_and_verify(model, graph, random_masks(graph, 0, 0.5))
    assert checked.dtype == "float64"
    assert checked.max_relative_error < checked.tolerance == 1e-8


def test_a_forward_that_insists_on_its_dtype() -> None:
    class Strict(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise RuntimeError("single precision, please")
            return super().forward(x)

    model = liven(Strict())
    graph = trace(model, X)
    _, checked = shrink_and_verify(model, graph, random_masks(graph, 0, 0.5))
    assert checked.dtype == "float32"
    assert checked.max_relative_error < checked.tolerance == 1e-4


def test_only_the_smaller_network_is_held_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[nn.Module] = []
    double_outputs = verify.double_outputs

    def noting(model: nn.Module, call: object) -> list[object]:
        run.append(model)
        return double_outputs(model, call)

    monkeypatch.setattr(verify, "double_outputs", noting)
    model = liven(Net())
    graph = trace(model, X)
    small, _ = shrink_and_verify(model, graph, random_masks(graph, seed=0))
    assert [m is small for m in run] == [True]


def test_masked_network_takes_inputs_of_any_dtype() -> None:
    model = liven(Net())
    graph = trace(model, X)
    oracle = masked(model, graph, random_masks(graph, 0, 0.5))
    single, double = oracle(X), oracle(X.double())
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert difference([single.double()], [double]) < 1e-5
    whole = masked(model, graph, all_kept(graph))
    assert difference([whole(X.double())], run(model, X)) < 1e-12


def test_masked_keeps_the_model_as_it_was() -> None:
    model = liven(Net()).train()
    state = copy.deepcopy(model.state_dict())
    graph = trace(model, X)
    masked(model, graph, random_masks(graph, 0, 0.5))(X)
    assert model.training
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
