"""What is predicted at a count that was tried is what was measured, by an independent cut and refit."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.apply.masked import MaskedArithmetic
from qcqp_prune.errors import InvalidOptionError, InvalidScoreError, UnsupportedOpError
from qcqp_prune.graph.observe import Observed
from qcqp_prune.importance.calibrated import Calibrated, increments
from qcqp_prune.importance.cuts import Cut
from qcqp_prune.importance.elimination import Elimination
from qcqp_prune.importance.output_error import output_error
from qcqp_prune.importance.readers import readers
from qcqp_prune.importance.trials import Trials, added_loss
from qcqp_prune.models import DigitsNet
from tests import removable
from tests.networks import liven

DATA = [
    (torch.randn(40, 3, 6, 6, generator=g), torch.randint(4, (40,), generator=g))
    for g in (torch.Generator().manual_seed(s) for s in range(3))
]


def chain() -> nn.Sequential:
    """One group that only a linear layer reads, flattened: 2 x 2 positions of each channel."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    )


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(F.cross_entropy(model(x), y)) for x, y in DATA) / len(DATA)


def cut(model: nn.Sequential, gone: list[int]) -> nn.Sequential:
    """The network with channels removed from what the last layer reads, which is fitted anew by a solver."""
    copy = chain()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        rows = torch.cat([model[:4](x) for x, _ in DATA]).double()
        wanted = torch.cat([model(x) for x, _ in DATA]).double()
        kept = [c * 4 + p for c in range(8) for p in range(4) if c not in gone]
        read = torch.cat([rows[:, kept], torch.ones(len(rows), 1)], 1)
        best = torch.linalg.lstsq(read, wanted).solution
        copy[4].weight.zero_()
        copy[4].weight[:, kept] = best[:-1].T.float()
        copy[4].bias.copy_(best[-1])
    return copy


def test_what_was_tried_is_predicted_as_it_was_measured() -> None:
    model = chain()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    graph = qp.trace(model, torch.zeros(1, 3, 6, 6))
    # A loss that every cut makes worse: the distance to what the dense network says.
    data = [(x, model(x).detach()) for x, _ in DATA]
    form = Calibrated(data, F.mse_loss, ratios=(0.5,), ridge=1e-9)(model, graph)
    units = graph.units([g.id for g in graph.groups].index("0"))
    worth = form.unary[units]
    gone = np.argsort(worth, kind="stable")[:4].tolist()
    with torch.no_grad():
        smaller = cut(model, gone)
        measured = sum(float(F.mse_loss(smaller(x), y)) for x, y in data) / len(data)
    assert worth[gone].sum() == pytest.approx(measured, rel=1e-3)
    assert (worth[gone].max() <= np.delete(worth, gone)).all()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    others = np.ones(graph.unit_count, np.bool_)
    others[units] = False
    assert (form.unary[others] == 0).all()


def test_greedy_elimination_beats_every_other_four_channels_it_could_have_started_with() -> None:
    """Not only by its own account: of 20 random choices of four channels none leaves a smaller error after a refit."""
    model = chain()
    graph = qp.trace(model, torch.zeros(1, 3, 6, 6))
    data = [(x, model(x).detach()) for x, _ in DATA]
    form = Calibrated(data, F.mse_loss, ratios=(0.5,), ridge=1e-9)(model, graph)
    worth = form.unary[graph.units([g.id for g in graph.groups].index("0"))]
    gone = np.argsort(worth, kind="stable")[:4].tolist()

    def error(removed: list[int]) -> float:
        smaller = cut(model, removed)
        with torch.no_grad():
            return sum(float(F.mse_loss(smaller(x), y)) for x, y in data)

    chosen = error(gone)
    rng = np.random.default_rng(0)
    others = [error(rng.choice(8, 4, replace=False).tolist()) for _ in range(20)]
    assert sum(other < chosen * (1 - 1e-6) for other in others) <= 1  # greedy is no proof


@pytest.mark.parametrize(
    ("costs", "measured", "wanted"),
    [
        ([1.0, 1.0, 2.0, 4.0], {2: 1.0, 3: 3.0}, [0.5, 0.5, 2.0, 4.0]),
        ([1.0, 3.0, 2.0, 2.0], {2: 4.0, 3: 5.0}, [1.0, 5 / 3, 5 / 3, 5 / 3]),
        ([0.0, 0.0, 1.0], {2: 4.0}, [2.0, 2.0, 2.0]),
    ],
    ids=["convex", "pooled where it falls", "nothing is known beyond"],
)
def test_increments_by_hand(costs: list[float], measured: dict[int, float], wanted: list[float]) -> None:
    assert increments(np.asarray(costs), measured) == pytest.approx(wanted)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.one, self.norm, self.two = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.two(torch.relu(self.norm(self.one(x))))
        return self.head(x.mean((2, 3)))


def test_a_branch_is_worth_what_the_loss_is_without_it() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    graph = qp.trace(model, torch.zeros(1, 3, 6, 6), blocks=True)
    data = [(x, model(x).detach()) for x, _ in DATA]
    form = Calibrated(data, F.mse_loss)(model, graph)
    mask = np.ones(graph.unit_count, np.bool_)
    (block,) = graph.blocks
    mask[block.unit] = False
    for g in graph.emptied_with(0):
        mask[graph.units(g)] = False
    with torch.no_grad():
        without = [model.head(torch.relu(model.stem(x)).mean((2, 3))) for x, _ in DATA]
        measured = sum(float(F.mse_loss(a, y)) for a, (_, y) in zip(without, data, strict=True)) / len(data)
    assert form.evaluate(np.ones_like(mask)) - form.evaluate(mask) == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("options", [{"sharing": "free"}, {"columns": True}, {"round_to": 4}], ids=str)
def test_every_kind_of_unit_has_a_worth(options: dict[str, object]) -> None:
    model = liven(DigitsNet()).eval()
    graph = qp.trace(model, torch.zeros(1, 1, 8, 8), **options)
    data = [(torch.randn(32, 1, 8, 8), torch.randint(10, (32,))) for _ in range(2)]
    form = Calibrated(data)(model, graph)
    stays = np.asarray([g.stays for g in graph.groups])[graph.group_of_unit]
    assert (form.unary[~stays] > 0).all()
    assert (form.unary[stays] == 0).all()
    problem = qp.PruningProblem.build(graph, form, {"macs": "50%"})
    report = qp.solve(problem, time_limit=5)
    assert report.usage["macs"].used <= report.usage["macs"].limit


def test_groups_that_keep_equally_many_are_tried_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 4)
    ).eval()
    graph = qp.trace(model, torch.zeros(1, 3, 6, 6))
    ties = {g.tie for g in graph.groups if not g.stays} - {None}
    assert ties
    form = Calibrated(DATA)(model, graph)
    for tie in ties:
        sums = [form.unary[graph.units(k)].sum() for k, g in enumerate(graph.groups) if g.tie == tie]
        assert all(s > 0 for s in sums)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "no batch"),
        ({"batches": [torch.zeros(2, 3, 6, 6)]}, "pairs"),
        ({"batches": DATA, "ratios": (0.5, 0.2)}, "ratios"),
        ({"batches": DATA, "samples": 0}, "samples"),
        ({"batches": DATA, "ridge": 0.0}, "ridge"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_refused(options: dict[str, object], message: str) -> None:
    model = chain()
    graph = qp.trace(model, torch.zeros(1, 3, 6, 6))
    with pytest.raises(InvalidOptionError, match=message):
        Calibrated(**options)(model, graph)


class Words(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.words, self.memory = nn.Embedding(9, 8), kind(8, 6, num_layers=2, batch_first=True)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.memory(self.words(x))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_scored_cut_and_run(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = Words(kind).eval()
    data = [(torch.randint(9, (12, 5)), torch.randint(4, (12,))) for _ in range(3)]
    recovery = qp.Recovery(train=data, validation=data, repair=None)
    small, report = qp.prune(model, data[0][0], budgets="50%", recovery=recovery)
    assert report.importance == "Calibrated"
    assert small(data[0][0]).shape == (12, 4)  # itself, not a copy of it


def test_units_of_equal_worth_go_in_the_order_of_elimination() -> None:
    """Channels that nothing tells apart, as none of them reaches the outputs, beside a group that matters."""
    model = chain()
    with torch.no_grad():
        model[4].weight[:, :16].zero_()  # four of the eight channels
    graph = qp.trace(model, torch.zeros(1, 3, 6, 6))
    data = [(x, model(x).detach()) for x, _ in DATA]
    form = Calibrated(data, F.mse_loss, ratios=(0.5, 0.6))(model, graph)
    worth = form.unary[graph.units([g.id for g in graph.groups].index("0"))]
    assert len(set(worth.tolist())) == 8


def test_a_layer_that_reads_one_value_only_is_no_obstacle() -> None:
    model = chain()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)  # the ReLU gives zeros
    graph = qp.trace(model, torch.zeros(1, 3, 6, 6))
    assert np.isfinite(Calibrated(DATA)(model, graph).unary).all()


SAME = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "inputs",
    [SAME, SAME.repeat(64, 1), torch.zeros(64, 64), torch.full((64, 64), 7.0)],
    ids=["one sample", "repeated", "zeros", "constant"],
)
def test_data_that_do_not_vary_are_no_obstacle(inputs: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    ).eval()
    graph = qp.trace(model, torch.zeros(1, 64))
    form = Calibrated([(inputs, torch.zeros(len(inputs), dtype=torch.int64))])(model, graph)
    assert np.isfinite(form.unary).all()


def test_a_mean_that_the_next_bias_takes_up_changes_nothing() -> None:
    """Hidden units far from zero, and the same function: single precision leaves four digits of what they vary by."""

    class Offset(nn.Module):
        def __init__(self, offset: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(5, 16), nn.Linear(16, 4)
            with torch.no_grad():
                self.a.bias += offset
                self.b.bias -= (self.b.weight.double().sum(1) * offset).float()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    x = torch.randn(200, 5)
    worths = []
    for offset in (0.0, 300.0):
        model = Offset(offset).eval()
        worths.append(Calibrated([(x, torch.zeros(200))])(model, qp.trace(model, x)).unary)
    assert worths[0].max() > 0
    np.testing.assert_allclose(worths[1], worths[0], rtol=1e-2, atol=1e-2 * worths[0].max())


def test_a_weight_tied_to_an_embedding_is_not_refitted() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix, self.out = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
            self.out.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.mix(self.words(x))).mean(1))

    torch.manual_seed(0)
    model = Tied().eval()
    x = torch.randint(9, (20, 5))
    graph = qp.trace(model, x)
    found = readers(Observed(model, graph), [x])
    assert {name for name, _ in found} == {"mix.weight"}


class Returns(nn.Module):
    """Two layers; what is returned is made of what the second one gives."""

    def __init__(self, output: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.a, self.b, self.output = nn.Linear(5, 6), nn.Linear(6, 4), output

    def forward(self, x: Tensor) -> object:
        return self.output(self.b(torch.relu(self.a(x))))


def banned(y: Tensor) -> Tensor:
    return torch.where(torch.arange(4) == 2, -torch.inf, y)


@pytest.mark.parametrize(
    "output",
    [lambda y: {"logits": 3 * y - 1}, lambda y: (y, y.argmax(1)), banned],
    ids=["a dict, another scale", "labels too", "infinite"],
)
def test_without_a_loss_any_floating_outputs_are_compared(output: Callable[[Tensor], object]) -> None:
    """Scale and place of an output do not count."""
    torch.manual_seed(0)
    plain, x = Returns(lambda y: y).eval(), torch.randn(60, 5)
    model = Returns(output).eval()
    model.load_state_dict(plain.state_dict())
    data = [(x, torch.zeros(60))]
    other = plain if output is not banned else Returns(lambda y: y[:, [0, 1, 3]]).eval()
    other.load_state_dict(plain.state_dict())
    wanted = Calibrated(data)(other, qp.trace(other, x))
    found = Calibrated(data)(model, qp.trace(model, x))
    assert found.unit == "output error"
    assert found.unary.max() > 0
    np.testing.assert_allclose(found.unary, wanted.unary, rtol=1e-4)


def test_output_error_is_the_share_of_variance_that_is_not_explained() -> None:
    dense, cut = (
        [torch.randn(30, 4, dtype=torch.float64) + 2 for _ in range(2)],
        [torch.randn(30, 4) for _ in range(2)],
    )
    change = (torch.cat(cut) - torch.cat(dense)).square().mean()
    wanted = (change / torch.cat(dense).var(0, correction=0).mean()).item()
    assert output_error(dense)(cut) == pytest.approx(wanted)
    assert output_error(dense)(dense) == 0
    constant = [torch.cat([y, torch.full((30, 1), -1e9)], 1) for y in dense]
    assert output_error(constant)([torch.cat([y, torch.full((30, 1), -1e9)], 1) for y in cut]) > wanted / 2
    assert math.isnan(output_error(dense)([cut[0], cut[1] * torch.nan]))
    # An output that is a thousand times as large counts no more than another.
    two = output_error([(y, 1_000 * y) for y in dense])
    assert two(list(zip(cut, [1_000 * y for y in dense], strict=True))) == pytest.approx(wanted / 2)


def test_of_an_output_that_never_varies_the_change_is_compared_with_its_size() -> None:
    dense, cut = [torch.full((3, 2), 4.0)], [torch.full((3, 2), 5.0)]
    assert output_error(dense)(cut) == pytest.approx(1 / 16)
    assert output_error([torch.zeros(3, 2)])([torch.ones(3, 2)]) == pytest.approx(6.0)


@pytest.mark.parametrize("where", ["inputs", "an output", "all outputs"])
def test_what_is_not_finite_is_refused(where: str) -> None:
    def output(y: Tensor) -> Tensor:
        if where == "an output":
            return torch.where(torch.arange(4) == 2, torch.nan, y)
        return y + torch.inf if where == "all outputs" else y

    torch.manual_seed(0)
    model, x = Returns(output).eval(), torch.randn(60, 5)
    graph = qp.trace(model, x)
    data = [(x.index_fill(0, torch.tensor(3), torch.nan) if where == "inputs" else x, torch.zeros(60))]
    with pytest.raises(InvalidScoreError, match="not finite"):
        Calibrated(data)(model, graph)


def test_outputs_without_a_floating_number_ask_for_a_loss() -> None:
    model, x = Returns(lambda y: y.argmax(1)).eval(), torch.randn(6, 5)
    graph = qp.trace(model, x)
    with pytest.raises(InvalidOptionError, match="loss of your own"):
        Calibrated([(x, torch.zeros(6))])(model, graph)


CHANNELS_LAST = ("layer", "rms", "padded", "expanded")


class Normed(nn.Module):
    """Channels that are normed together: what goes must not be counted as zeros."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.kind = nn.Conv2d(3, 16, 3), kind
        alike = kind in ("group", "large outputs")
        self.norm = nn.GroupNorm(1 if alike else 16, 16) if kind not in CHANNELS_LAST else nn.LayerNorm(16)
        self.out = nn.Linear(16, 4)

    def shift(self, x: Tensor) -> Tensor:
        """Computed from the inputs alone."""
        if self.kind == "padded":
            return F.pad(x.flatten(2)[..., :16].transpose(1, 2), (4, 9))
        return x[:, :1, 0, 0].unsqueeze(1).expand(-1, -1, 16)

    def forward(self, x: Tensor) -> Tensor:
        early = self.shift(x) if self.kind in ("padded", "expanded") else None
        y = self.first(x)
        if self.kind == "group":
            return self.out(torch.relu(self.norm(y)).mean((2, 3)))
        if self.kind == "softmax":
            return self.out(torch.softmax(y, 1).mean((2, 3)))
        if self.kind == "large outputs":
            return self.out(torch.relu(self.norm(y)).mean((2, 3))) + 1e5
        if self.kind in ("padded", "expanded"):  # before the first layer, and there whatever goes
            y = y.flatten(2).transpose(1, 2) + early
            return self.out(torch.relu(self.norm(y)).mean(1))
        y = y.flatten(2).transpose(1, 2)
        root = torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return self.out(torch.relu(y / root if self.kind == "rms" else self.norm(y)).mean(1))


@pytest.mark.parametrize("kind", ["group", "layer", "rms", "softmax", "large outputs", "padded", "expanded"])
def test_a_trial_measures_the_network_without_what_goes(kind: str) -> None:
    """Against the loss of the smaller network that surgery makes."""
    torch.manual_seed(0)
    model = liven(Normed(kind)).eval()
    graph = qp.trace(model, torch.zeros(2, 3, 6, 6))
    (group,) = (g for g in range(len(graph.groups)) if not graph.groups[g].stays)
    order = np.random.default_rng(0).permutation(16).astype(np.int64)
    cut = Cut((group,), (4, 8), (Elimination(order, np.ones(16), {}),), ((),))
    data = [(x, model(x).detach()) for x, _ in DATA]
    calls, judge = [((x,), {}) for x, _ in data], partial(added_loss, F.mse_loss, [y for _, y in data])
    (found,) = Trials(Observed(model, graph), calls, judge).run([cut])
    worst = 0.0
    for count in cut.counts:
        small = qp.shrink(model, graph, qp.Masks.from_flat(graph, cut.flat(graph, count)))
        with torch.no_grad():
            worst = max(worst, sum(float(F.mse_loss(small(x), y)) for x, y in data) / len(data))
        # Of large outputs single precision leaves two digits.
        assert found[count] == pytest.approx(worst, rel=0.05 if kind == "large outputs" else 1e-4)
    assert worst > 0


@pytest.mark.parametrize("make", [removable.Plain, removable.Bottleneck])
def test_a_branch_is_measured_as_the_network_without_it(make: type[nn.Module]) -> None:
    """Also where it is not zero with all of its weights at zero."""
    torch.manual_seed(0)
    model = liven(make()).eval()
    graph = qp.trace(model, removable.X, blocks=True)
    data = [(torch.randn(40, 3, 4, 4), torch.zeros(40)) for _ in range(2)]
    with torch.no_grad():
        dense = [model(x) for x, _ in data]
    form = Calibrated(data)(model, graph)
    (block,) = graph.blocks
    flat = np.ones(graph.unit_count, np.bool_)
    flat[block.unit] = False
    for g in block.groups:
        flat[graph.units(g)] = False
    small = qp.shrink(model, graph, qp.Masks.from_flat(graph, flat))
    with torch.no_grad():
        wanted = output_error(dense)([small(x) for x, _ in data])
    assert wanted > 0
    assert form.unary.sum() - form.evaluate(flat) == pytest.approx(wanted, rel=1e-4)


def test_trials_do_not_see_what_others_write() -> None:
    """A forward that counts its calls, and goes by the count: each trial and each batch starts from the model's own."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.b(torch.relu(self.a(x))) * self.calls

    torch.manual_seed(0)
    model = Counts().eval()
    x = torch.randn(30, 5)
    graph = qp.trace(model, x)
    steps = Observed(model, graph).steps([x, x])
    with torch.no_grad():
        wanted = model.b(torch.relu(model.a(x)))
        for _ in range(3):
            for found in steps.fork({}).results():
                torch.testing.assert_close(found, wanted)


def test_a_trial_of_a_norm_that_a_custom_operator_hides_is_run_with_zeros() -> None:
    """Where no mask-aware operator is known, zeros are the best there is: no traceback out of the oracle."""
    model = chain()
    graph = qp.trace(model, torch.zeros(1, 3, 6, 6))
    observed = Observed(model, graph)
    order = np.arange(8, dtype=np.int64)
    cut = Cut((0,), (4,), (Elimination(order, np.ones(8), {}),), ((),))
    inputs = [((x,), {}) for x, _ in DATA]
    plain = Trials(observed, inputs, output_error).run([cut])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedArithmetic, "step", _refuse)
        assert Trials(observed, inputs, output_error).run([cut]) == plain


def _refuse(*_: object) -> object:
    raise UnsupportedOpError("no mask-aware version")
