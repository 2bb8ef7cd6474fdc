"""The fit against least squares by a solver, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.apply.shape_conv import ShapeConv2d
from qcqp_prune.errors import InvalidOptionError, TrainingError
from qcqp_prune.train.reconstruct import reconstruct
from tests.networks import liven, random_masks

EXAMPLE = torch.zeros(1, 3, 6, 6)
DATA = [
    (torch.randn(30, 3, 6, 6, generator=g), torch.zeros(30, dtype=torch.int64))
    for g in (torch.Generator().manual_seed(s) for s in range(4))
]


class Residual(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.one = nn.Conv2d(6, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 6, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 4)

    def branch(self, x: Tensor) -> Tensor:
        return self.norm(self.two(torch.relu(self.one(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.branch(x))
        return self.head(x.mean((2, 3)))


def selected(graph: qp.ChannelGraph, gone: dict[str, list[int]]) -> qp.Masks:
    flat = np.ones(graph.unit_count, np.bool_)
    for name, places in gone.items():
        units = graph.units([g.id for g in graph.groups].index(name))
        flat[np.arange(units.start, units.stop)[places]] = False
    return qp.Masks.from_flat(graph, flat)


def made(model: nn.Module, of: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([of(x) for x, _ in DATA])


@pytest.mark.parametrize("norm", [True, False], ids=["before a batch norm", "with a bias"])
def test_the_end_of_a_branch_is_fitted_to_the_dense_sum(norm: bool) -> None:
    torch.manual_seed(0)
    model = liven(Residual(norm)).eval()
    graph = qp.trace(model, EXAMPLE)
    masks = selected(graph, {"one": [0, 3, 5, 6], "stem": [1]})
    small = qp.shrink(model, graph, masks)
    stream = [0, 2, 3, 4, 5]
    before = [small.two.weight.clone(), small.stem.weight.clone()]
    dense = {name: t.clone() for name, t in model.state_dict().items()}
    record = reconstruct(small, model, graph, masks, DATA, ridge=1e-9)
    assert record.layers == ("stem", "one", "two", "head")
    assert record.samples == 120
    assert not record.left
    torch.testing.assert_close(small.stem.weight, before[1])  # it reads what it read
    assert not torch.allclose(small.two.weight, before[0])
    assert all(torch.equal(t, dense[name]) for name, t in model.state_dict().items())

    def error(candidate: nn.Module) -> float:
        """How far the branch is from making the sum the dense one; what the fit is to minimise, by output."""
        wanted = made(model, lambda x: torch.relu(model.stem(x)) + model.branch(torch.relu(model.stem(x))))
        got = made(
            candidate,
            lambda x: torch.relu(candidate.stem(x)) + candidate.branch(torch.relu(candidate.stem(x))),
        )
        return float((wanted[:, stream] - got).square().mean())

    best = error(small)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):  # the least squares solution: every step away from it is worse, and none is better
        step = torch.randn(small.two.weight.shape, generator=generator) * 1e-2
        with torch.no_grad():
            small.two.weight += step
        assert error(small) > best
        with torch.no_grad():
            small.two.weight -= step
    shifted = small.norm.running_mean if norm else small.two.bias
    with torch.no_grad():
        shifted += 1e-2
    assert error(small) > best


class TwoBranches(Residual):
    """Two branches on one stream: what the second adds to is no more what the dense network has there."""

    def __init__(self) -> None:
        super().__init__()
        self.three = nn.Conv2d(6, 8, 3, padding=1)
        self.four = nn.Conv2d(8, 6, 3, padding=1)

    def stream(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return torch.relu(x + self.branch(x))

    def total(self, x: Tensor) -> Tensor:
        x = self.stream(x)
        return x + self.four(torch.relu(self.three(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.total(x)).mean((2, 3)))


def test_a_later_branch_takes_up_what_the_stream_has_lost() -> None:
    torch.manual_seed(0)
    model = liven(TwoBranches()).eval()
    graph = qp.trace(model, EXAMPLE)
    masks = selected(graph, {"one": [0, 3, 5, 6], "three": [1, 4], "stem": [1]})
    small = qp.shrink(model, graph, masks)
    reconstruct(small, model, graph, masks, DATA, ridge=1e-9)
    wanted = made(model, model.total)[:, [0, 2, 3, 4, 5]]
    rest = wanted - made(small, small.stream)
    # The normal equations of the fit to the sum: what is left is uncorrelated with whatever the layer reads.
    left = rest - made(small, lambda x: small.four(torch.relu(small.three(small.stream(x)))))
    read = nn.functional.unfold(made(small, lambda x: torch.relu(small.three(small.stream(x)))), 3, padding=1)
    slope = torch.einsum("nkp,nrp->kr", left.flatten(2), read) / rest.numel()
    scale = torch.einsum("nkp,nrp->kr", rest.flatten(2).abs(), read.abs()) / rest.numel()
    assert left.square().mean() > 1e-4
    assert (slope.abs() / scale).max() < 1e-3
    assert abs(left.mean()) < 1e-4


def test_a_twin_is_taken_over_without_loss() -> None:
    torch.manual_seed(0)
    model = liven(Residual()).eval()
    with torch.no_grad():
        model.one.weight[5] = 2 * model.one.weight[2]
        model.one.bias[5] = 2 * model.one.bias[2]
    graph = qp.trace(model, EXAMPLE)
    masks = selected(graph, {"one": [5]})
    small = qp.shrink(model, graph, masks)
    wanted = made(model, model)
    assert (made(small, small) - wanted).abs().max() > 1e-2
    reconstruct(small, model, graph, masks, DATA, ridge=1e-9)
    torch.testing.assert_close(made(small, small), wanted, rtol=1e-4, atol=1e-4)


def test_means_only_moves_biases_and_running_means() -> None:
    torch.manual_seed(0)
    model = liven(Residual()).eval()
    graph = qp.trace(model, EXAMPLE)
    masks = selected(graph, {"one": [0, 1, 2]})
    small = qp.shrink(model, graph, masks)
    weights = {n: p.clone() for n, p in small.named_parameters() if n.endswith("weight")}
    reconstruct(small, model, graph, masks, DATA, method="means")
    assert all(torch.equal(p, weights[n]) for n, p in small.named_parameters() if n in weights)
    branch = [made(m, lambda x, m=m: m.branch(torch.relu(m.stem(x)))).mean((0, 2, 3)) for m in (small, model)]
    torch.testing.assert_close(*branch, rtol=1e-4, atol=1e-5)


def test_means_of_layers_that_have_no_place_for_them_are_not_reported_as_fitted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 2, 1)
    ).eval()
    graph = qp.trace(model, EXAMPLE)
    masks = selected(graph, {"0": [0, 3], "2": [1]})
    small = qp.shrink(model, graph, masks)
    before = {n: t.clone() for n, t in small.state_dict().items()}
    record = reconstruct(small, model, graph, masks, DATA, method="means")
    assert record.layers == ("3",)
    assert record.left == dict.fromkeys(("0", "2"), "no bias or batch norm of its own takes up a mean")
    assert [n for n, t in small.state_dict().items() if not torch.equal(t, before[n])] == ["3.bias"]
    assert reconstruct(small, model, graph, masks, DATA).layers == ("0", "2", "3")


def test_a_network_that_was_not_cut_with_the_masks_is_told_so() -> None:
    model = liven(Residual()).eval()
    graph = qp.trace(model, EXAMPLE)
    record = reconstruct(model, model, graph, selected(graph, {"one": [0, 3]}), DATA, method="means")
    assert "give the network that was cut" in record.left["one"]
    assert "one" not in record.layers


def test_nothing_changes_where_nothing_was_removed() -> None:
    model = liven(Residual()).train()
    graph = qp.trace(model, EXAMPLE)
    masks = selected(graph, {})
    small = qp.shrink(model, graph, masks)
    before = {n: t.clone() for n, t in small.state_dict().items()}
    reconstruct(small, model, graph, masks, DATA)
    assert small.training
    assert model.training
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_sample_that_is_repeated_moves_means_and_no_weight(offset: float) -> None:
    """Nothing varies, and what rounding makes vary must not be fitted."""
    torch.manual_seed(0)
    model = liven(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)))
    with torch.no_grad():
        model[0].bias += offset
        model[2].bias += offset
    model.eval()
    x = torch.randn(1, 8).repeat(64, 1)
    data = [(x, torch.zeros(64, dtype=torch.int64))] * 3
    graph = qp.trace(model, x[:1])
    masks = selected(graph, {"0": [0, 2, 5, 7], "2": [1, 3, 6]})
    small = qp.shrink(model, graph, masks)
    weights = {n: p.clone() for n, p in small.named_parameters() if n.endswith("weight")}
    reconstruct(small, model, graph, masks, data)
    for name, weight in weights.items():
        torch.testing.assert_close(small.get_parameter(name), weight, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4 * (1 + offset))


def test_units_far_from_zero_are_fitted_as_well_as_others() -> None:
    errors = []
    for offset in (0.0, 1000.0):
        model = liven(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))).eval()
        with torch.no_grad():
            model[1].bias -= (model[1].weight.double().sum(1) * offset).float()
            model[0].bias += offset
        data = [
            (torch.randn(64, 8, generator=torch.Generator().manual_seed(s)), torch.zeros(64))
            for s in range(3)
        ]
        graph = qp.trace(model, data[0][0])
        masks = selected(graph, {"0": list(range(10))})
        small = qp.shrink(model, graph, masks)
        reconstruct(small, model, graph, masks, data)
        with torch.no_grad():
            errors.append(sum(float((small(x) - model(x)).square().mean()) for x, _ in data))
    assert errors[0] > 0
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.up, self.grouped = nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Conv2d(4, 8, 3, groups=2)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.again(torch.relu(self.again(torch.relu(self.stem(x))))))
        return self.out(torch.relu(self.grouped(torch.relu(self.up(x)))))


def test_a_depthwise_layer_is_fitted_filter_by_filter() -> None:
    torch.manual_seed(0)
    model = liven(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 2, 1)
        )
    ).eval()
    graph = qp.trace(model, EXAMPLE)
    masks = selected(graph, {"0": [0, 3]})
    small = qp.shrink(model, graph, masks)
    wanted = made(model, model[:3])[:, [1, 2, 4, 5, 6, 7]]
    with torch.no_grad():
        for tensor in small[2].parameters():
            tensor += 0.3 * torch.randn(tensor.shape)
    record = reconstruct(small, model, graph, masks, DATA, ridge=1e-9)
    assert record.layers == ("0", "2", "4")
    torch.testing.assert_close(made(small, small[:3]), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("realisation", ["modules", "graph"])
def test_what_is_left_alone_says_why(realisation: str) -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    graph = qp.trace(model, EXAMPLE)
    report = qp.solve(
        qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": "50%"}), time_limit=5
    )
    small = qp.shrink(model, graph, report.masks, realisation=realisation)
    wanted = made(model, model)
    before = float((made(small, small) - wanted).square().mean())
    record = reconstruct(small, model, graph, report.masks, DATA)
    assert set(record.layers) == {"stem", "grouped", "out"}
    assert set(record.left) == {"again", "again@2", "up"}
    assert "several times" in record.left["again"]
    assert float((made(small, small) - wanted).square().mean()) < before


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).mean(1))


def test_heads_and_features_of_a_transformer() -> None:
    torch.manual_seed(0)
    model = liven(Attending()).eval()
    data = [(torch.randn(20, 5, 8), torch.zeros(20, dtype=torch.int64)) for _ in range(6)]
    graph = qp.trace(model, data[0][0][:1])
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": "60%"})
    report = qp.solve(problem, time_limit=5)
    small = qp.shrink(model, graph, report.masks)
    with torch.no_grad():
        wanted = torch.cat([model(x) for x, _ in data])
        before = float((torch.cat([small(x) for x, _ in data]) - wanted).square().mean())
        record = reconstruct(small, model, graph, report.masks, data)
        after = float((torch.cat([small(x) for x, _ in data]) - wanted).square().mean())
    assert {"inner.self_attn.out_proj", "inner.linear2"} <= set(record.layers)
    assert after < before / 2


def test_bad_input_is_refused() -> None:
    model = Residual().eval()
    graph = qp.trace(model, EXAMPLE)
    masks = selected(graph, {})
    with pytest.raises(InvalidOptionError, match="choose from"):
        reconstruct(model, model, graph, masks, DATA, method="best")
    with pytest.raises(InvalidOptionError, match="no batch"):
        reconstruct(model, model, graph, masks, [])
    for ridge in (0.0, -5.0, float("nan"), float("inf")):
        with pytest.raises(InvalidOptionError, match="ridge is"):
            reconstruct(model, model, graph, masks, DATA, ridge=ridge)


def chain() -> nn.Sequential:
    return liven(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, stride=2, bias=False),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(16, 4),
        )
    ).eval()


@pytest.mark.parametrize("realisation", ["modules", "graph"])
def test_filters_are_fitted_over_the_kernel_columns_that_they_kept(realisation: str) -> None:
    """The first layer, which reads the data, against a solver of least squares for each filter."""
    model = chain()
    graph = qp.trace(model, EXAMPLE, columns=True)
    masks = random_masks(graph, 1)
    small = qp.shrink(model, graph, masks, realisation=realisation)
    first = small.get_submodule("0")
    assert isinstance(first, ShapeConv2d)
    wanted = made(model, model)
    before = float((made(small, small) - wanted).square().mean())
    names, memory = list(small.state_dict()), first.weight
    record = reconstruct(small, model, graph, masks, DATA, ridge=1e-9)
    assert record.layers == ("0", "2", "5")
    assert not record.left
    assert small.get_submodule("0") is first
    assert first.weight is memory
    assert list(small.state_dict()) == names
    assert float((made(small, small) - wanted).square().mean()) < before
    rows = torch.nn.functional.unfold(torch.cat([x for x, _ in DATA]), 3, padding=1)
    rows = rows.transpose(1, 2).flatten(0, 1).double()
    target = made(model, model[0]).flatten(2).transpose(1, 2).flatten(0, 1).double()
    filters = np.flatnonzero(masks.flat(graph)[graph.axes[graph.layers[0].out_axis]])
    weight, kept = first.dense().weight.detach().flatten(1), first.kept()
    assert not kept.all()
    for j, filter_ in enumerate(filters):
        mine = kept[j].repeat(3)
        read = torch.cat([rows[:, mine], torch.ones(len(rows), 1)], 1)
        best = torch.linalg.lstsq(read, target[:, filter_]).solution
        torch.testing.assert_close(weight[j][mine], best[:-1].float(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(first.bias[j], best[-1].float(), rtol=1e-3, atol=1e-4)
        assert not weight[j][~mine].any()


def test_layers_that_are_gone_are_listed() -> None:
    torch.manual_seed(0)
    model = liven(Residual()).eval()
    graph = qp.trace(model, EXAMPLE, blocks=True)
    (block,) = graph.blocks
    flat = np.ones(graph.unit_count, np.bool_)
    flat[block.unit] = False
    for g in block.groups:
        flat[graph.units(g)] = False
    masks = qp.Masks.from_flat(graph, flat)
    record = reconstruct(qp.shrink(model, graph, masks), model, graph, masks, DATA)
    assert record.layers == ("stem", "head")
    assert set(record.left) == {"one", "two"}
    assert "no such layer" in record.left["one"]


@pytest.mark.parametrize("method", ["least_squares", "means"])
@pytest.mark.parametrize("where", ["data", "inner"])
def test_what_is_not_finite_changes_nothing(method: str, where: str) -> None:
    """Not even the layers before the one where it shows."""
    torch.manual_seed(0)
    model = liven(Residual()).eval()
    graph = qp.trace(model, EXAMPLE)
    masks = selected(graph, {"one": [0, 3], "stem": [1]})
    small = qp.shrink(model, graph, masks)
    data = [(x.clone(), y) for x, y in DATA]
    if where == "data":
        data[2][0][7, 1, 2, 3] = torch.inf
    else:
        with torch.no_grad():
            model.two.weight[0] = torch.nan
    before = {name: t.clone() for name, t in small.state_dict().items()}
    named = "stem" if where == "data" else "two"
    with pytest.raises(TrainingError, match=f"what {named} reads .* check the data"):
        reconstruct(small, model, graph, masks, data, method=method)
    assert all(torch.equal(t, before[name]) for name, t in small.state_dict().items())


def test_after_an_error_kernel_columns_are_what_they_were() -> None:
    model = chain()
    graph = qp.trace(model, EXAMPLE, columns=True)
    masks = random_masks(graph, 1)
    small = qp.shrink(model, graph, masks)
    before = {name: t.clone() for name, t in small.state_dict().items()}
    kinds = [type(m) for m in small]
    with torch.no_grad():
        model[2].weight[...] = torch.inf
    with pytest.raises(TrainingError):
        reconstruct(small, model, graph, masks, DATA)
    assert [type(m) for m in small] == kinds
    assert all(torch.equal(t, before[name]) for name, t in small.state_dict().items())


class Norms(nn.Module):
    """A branch that ends in a norm of the batch's own statistics, one norm behind two layers, a map of one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.one, self.two = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1, bias=False)
        self.own = nn.BatchNorm2d(6, track_running_stats=False)
        self.again, self.shared = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.vector, self.map = nn.Parameter(torch.randn(5)), nn.Linear(5, 4)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.own(self.two(torch.relu(self.one(x)))))
        x = self.shared(self.again(torch.relu(self.shared(self.again(x)))))
        return self.head(x.mean((2, 3))) + self.map(self.vector)


def test_unusual_norms_and_vectors_do_not_end_it() -> None:
    torch.manual_seed(0)
    model = liven(Norms()).eval()
    graph = qp.trace(model, DATA[0][0])
    masks = selected(graph, {"one": [0, 3, 5]})
    small = qp.shrink(model, graph, masks)
    wanted = made(model, model)
    before = float((made(small, small) - wanted).square().mean())
    record = reconstruct(small, model, graph, masks, DATA)
    assert {"stem", "one", "two", "head"} <= set(record.layers)
    assert {"again", "again@2", "map"} == set(record.left)
    assert float((made(small, small) - wanted).square().mean()) < before
