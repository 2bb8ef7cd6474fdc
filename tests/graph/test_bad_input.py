"""What is refused at the door: each with the class a caller can catch and a message that says what to do."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
from tests.networks import all_kept, keep


class Chain(nn.Module):
    """Four channels, a batch norm, three channels, two classes; 4 x 4 images throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 3, 1)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


EXAMPLE = torch.zeros(1, 3, 4, 4)
DENSE_MACS = 16 * 27 * 4 + 16 * 4 * 3 + 3 * 2
LEAST_MACS = 16 * 27 + 16 + 2  # one channel in each of the two layers that may shrink


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Chain()


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> qp.ChannelGraph:
    return qp.trace(model, EXAMPLE)


@pytest.fixture(scope="module")
def scores(model: nn.Module, graph: qp.ChannelGraph) -> qp.PairwiseForm:
    return qp.Magnitude()(model, graph)


# The model and its inputs


@pytest.mark.parametrize(
    "example",
    [
        torch.zeros(1, 5, 4, 4),
        torch.zeros(1, 3),
        torch.zeros(1, 3, 4, 4, dtype=torch.long),
        (EXAMPLE, EXAMPLE),
        {"y": EXAMPLE},
    ],
    ids=["channels", "dimensions", "dtype", "one too many", "unknown keyword"],
)
def test_wrong_example_inputs(model: nn.Module, example: Any) -> None:
    with pytest.raises(
        qp.TraceError, match=r"Chain does not run on the example inputs .* give inputs of the shape"
    ):
        qp.trace(model, example)


@pytest.mark.parametrize("example", [None, 3, "image", [], {}, (1, 2), np.zeros((1, 3, 4, 4))])
def test_example_inputs_without_a_tensor(model: nn.Module, example: Any) -> None:
    with pytest.raises(qp.TraceError, match=r"holds no tensor but .*: give a tensor, a tuple"):
        qp.trace(model, example)


def test_a_failed_trace_leaves_the_mode_alone(model: nn.Module) -> None:
    training = copy.deepcopy(model).train()
    training.bn.eval()
    with pytest.raises(qp.TraceError):
        qp.trace(training, torch.zeros(1, 5, 4, 4))
    assert training.training
    assert not training.bn.training


def test_control_flow_that_depends_on_values() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(-x if x.sum() > 0 else x)

    with pytest.raises(qp.TraceError, match=r"cannot follow its forward .*: remove control flow"):
        qp.trace(Branches(), torch.zeros(1, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript itself is on its way out
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m.eval(), EXAMPLE)])
def test_a_scripted_module(make: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(qp.TraceError, match=r"scripted module.*: pass the nn\.Module it was made from"):
        qp.trace(make(Chain()), EXAMPLE)


@pytest.mark.parametrize("thing", [torch.relu, Chain, None, {"first.weight": torch.zeros(4, 3, 3, 3)}])
def test_not_a_module(thing: Any) -> None:
    with pytest.raises(qp.TraceError, match=r"pass a torch\.nn\.Module"):
        qp.trace(thing, EXAMPLE)


# Nothing to prune


@pytest.mark.parametrize(
    ("network", "example", "why"),
    [
        (nn.Linear(4, 3), torch.zeros(1, 4), "network input; network output"),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), torch.zeros(1, 4), "no layer with a weight"),
    ],
)
def test_a_model_without_prunable_layers(network: nn.Module, example: Tensor, why: str) -> None:
    graph = qp.trace(network, example)
    objective = qp.PairwiseForm(np.zeros(graph.unit_count))
    with pytest.raises(
        qp.NothingToPruneError,
        match=rf"{why}[^:]*: choose another model$",
    ):
        qp.PruningProblem.build(graph, objective, "50%")


def test_a_model_whose_layers_are_all_ignored(model: nn.Module) -> None:
    graph = qp.trace(model, EXAMPLE, ignored_layers=["first", model.second])
    with pytest.raises(
        qp.NothingToPruneError,
        match=r"in ignored_layers \(first\).*: take layers out of ignored_layers, or choose another model$",
    ):
        qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), "50%")


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"min_keep": 4}, "lower min_keep or round_to"),
        ({"round_to": 4}, "lower min_keep or round_to"),
        ({"units": ["heads"]}, "name further kinds in units"),
        (
            {"ignored_layers": "first", "min_keep": 3},
            "take layers out of ignored_layers, lower min_keep or round_to",
        ),
    ],
)
def test_of_what_leaves_nothing_to_prune_only_the_causes_are_to_be_changed(
    model: nn.Module, options: dict[str, Any], advice: str
) -> None:
    graph = qp.trace(model, EXAMPLE, **options)
    with pytest.raises(qp.NothingToPruneError, match=f": {advice}, or choose another model$"):
        qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), "50%")


def test_an_operator_that_leaves_nothing_to_prune_is_named() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.linalg.qr(self.a(x))[1])

    model = Sorted()
    graph = qp.trace(model, torch.zeros(9, 4))
    with pytest.raises(
        qp.NothingToPruneError, match=r"read by aten::linalg_qr.*: pass a handler for the operator"
    ):
        qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), "50%")


# Names of layers


@pytest.mark.parametrize(
    ("name", "nearest"), [("frist", "first"), ("secnd", "second"), ("heads", "head"), ("First", "first")]
)
@pytest.mark.parametrize("as_text", [True, False], ids=["one name", "a list"])
def test_an_unknown_layer_suggests_the_nearest(
    model: nn.Module, name: str, nearest: str, as_text: bool
) -> None:
    with pytest.raises(qp.UnknownLayerError, match=f"{name!r}: did you mean {nearest!r}"):
        qp.trace(model, EXAMPLE, ignored_layers=name if as_text else ["first", name])


def test_a_glob_that_matches_nothing(model: nn.Module) -> None:
    with pytest.raises(qp.UnknownLayerError, match=r"no layer is called 'blocks\.\*': did you mean"):
        qp.trace(model, EXAMPLE, ignored_layers=["blocks.*"])


def test_a_module_that_has_no_weight_matrix(model: nn.Module) -> None:
    for entry in ("bn", model.bn):
        with pytest.raises(qp.UnknownLayerError, match=r"'bn' is a BatchNorm2d .*: name a layer that has"):
            qp.trace(model, EXAMPLE, ignored_layers=[entry])


def test_a_module_of_another_model(model: nn.Module) -> None:
    with pytest.raises(
        qp.UnknownLayerError, match="a Conv2d that is no part of Chain: take it from the model"
    ):
        qp.trace(model, EXAMPLE, ignored_layers=[Chain().first])


@pytest.mark.parametrize("option", ["round_to", "min_keep"])
def test_a_limit_for_an_unknown_layer(model: nn.Module, option: str) -> None:
    with pytest.raises(qp.UnknownLayerError, match="did you mean 'second'"):
        qp.trace(model, EXAMPLE, **{option: {"secondd": 2}})


@pytest.mark.parametrize("value", [0, -1, 1.5, 0.5, True, "2", None, math.nan, {"first": 0}])
def test_round_to_out_of_range(model: nn.Module, value: Any) -> None:
    with pytest.raises(qp.InvalidOptionError, match=r"round_to=.*: give a positive integer"):
        qp.trace(model, EXAMPLE, round_to=value)


@pytest.mark.parametrize("value", [-1, -0.1, 1.5, True, "2", None, math.nan, math.inf, {"first": -1}])
def test_min_keep_out_of_range(model: nn.Module, value: Any) -> None:
    with pytest.raises(qp.InvalidOptionError, match=r"min_keep=.*: give a number of channels or a share"):
        qp.trace(model, EXAMPLE, min_keep=value)


# Budgets


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (0, "not positive"),
        (0.0, "not positive"),
        ("0%", "not positive"),
        ("0", "not positive"),
        (-5, "not positive"),
        (-0.5, "neither a share up to 1 nor a whole amount"),
        (1.5, "neither a share up to 1 nor a whole amount"),
        ("-50%", "cannot be read"),
        ("abc", "cannot be read"),
        ("", "cannot be read"),
        ("50%%", "cannot be read"),
        ("5 apples", "cannot be read"),
        ("nan", "cannot be read"),
        ("100.01%", "above 100 %"),
        ("150%", "above 100 %"),
        (math.nan, "not finite"),
        (math.inf, "not finite"),
        (np.float64("nan"), "not finite"),
        (True, "not a number"),
        (None, "not a number"),
        ([50], "not a number"),
    ],
)
@pytest.mark.parametrize("named", [True, False], ids=["mapping", "bare"])
def test_budgets_that_make_no_sense(
    graph: qp.ChannelGraph, scores: qp.PairwiseForm, value: Any, what: str, named: bool
) -> None:
    with pytest.raises(
        qp.InvalidBudgetError, match=f"for macs .*{what}.*: give a positive integer, a percentage"
    ):
        qp.PruningProblem.build(graph, scores, {"macs": value} if named else value)


def test_a_number_above_what_the_dense_network_uses_is_no_budget_at_all(
    graph: qp.ChannelGraph, scores: qp.PairwiseForm
) -> None:
    problem = qp.PruningProblem.build(graph, scores, {"macs": DENSE_MACS + 1000})
    report = qp.solve(problem, "block_coordinate", options=qp.SolveOptions(work_limit=5))
    assert report.masks == all_kept(graph)
    assert report.usage["macs"].slack == 1000


def test_the_whole_is_allowed(graph: qp.ChannelGraph, scores: qp.PairwiseForm) -> None:
    for whole in ("100%", 1.0, DENSE_MACS):
        problem = qp.PruningProblem.build(graph, scores, whole)
        assert [row.limit for row in problem.budgeted] == [DENSE_MACS]


def test_an_unknown_resource(graph: qp.ChannelGraph, scores: qp.PairwiseForm) -> None:
    with pytest.raises(
        qp.InvalidBudgetError, match=r"unknown resource 'flops' .*choose from .*macs, memory, params"
    ):
        qp.PruningProblem.build(graph, scores, {"macs": "50%", "flops": "50%"})


def test_no_budget(graph: qp.ChannelGraph, scores: qp.PairwiseForm) -> None:
    with pytest.raises(qp.InvalidBudgetError, match="no budget given: ask for"):
        qp.PruningProblem.build(graph, scores, {})


def test_an_infeasible_budget_says_what_is_attainable(
    graph: qp.ChannelGraph, scores: qp.PairwiseForm
) -> None:
    with pytest.raises(
        qp.InfeasibleError, match=r"smallest attainable use is 450 of 1,926 MACs(.|\n)*raise macs to 450"
    ) as caught:
        qp.PruningProblem.build(graph, scores, {"macs": LEAST_MACS - 1})
    assert caught.value.resource == "macs"
    assert caught.value.limit == LEAST_MACS - 1
    assert caught.value.smallest == LEAST_MACS
    assert f"{DENSE_MACS:,}" in str(caught.value)
    assert qp.PruningProblem.build(graph, scores, {"macs": LEAST_MACS}).budgeted[0].limit == LEAST_MACS


def test_of_several_infeasible_budgets_the_tightest_is_named(
    graph: qp.ChannelGraph, scores: qp.PairwiseForm
) -> None:
    least_params = (27 + 1) + 2 + (1 + 1) + (2 + 2)
    with pytest.raises(qp.InfeasibleError) as caught:
        qp.PruningProblem.build(graph, scores, {"macs": LEAST_MACS - 1, "params": 5})
    assert (caught.value.resource, caught.value.limit, caught.value.smallest) == ("params", 5, least_params)


def test_what_is_kept_by_request_raises_the_smallest_use(model: nn.Module) -> None:
    graph = qp.trace(model, EXAMPLE, ignored_layers=["second"], min_keep={"first": 2})
    with pytest.raises(qp.InfeasibleError, match="take layers out of ignored_layers") as caught:
        qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": 500})
    assert caught.value.smallest == 16 * 27 * 2 + 16 * 2 * 3 + 3 * 2


# Masks


def test_masks_of_another_graph(model: nn.Module, graph: qp.ChannelGraph) -> None:
    wider = Chain()
    wider.first, wider.bn, wider.second = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1)
    masks = all_kept(qp.trace(wider, EXAMPLE))
    for use in (qp.shrink, qp.masked):
        with pytest.raises(
            qp.MaskMismatchError, match=r"fingerprint .*: use the graph that the problem was built"
        ):
            use(model, graph, masks)


def test_a_model_that_is_not_the_traced_one(graph: qp.ChannelGraph) -> None:
    wider = Chain()
    wider.second = nn.Conv2d(4, 6, 1)
    with pytest.raises(
        qp.MaskMismatchError, match=r"second\.weight has shape .*: shrink the model that was traced"
    ):
        qp.shrink(wider, graph, keep(graph, first=[0]))


def test_a_model_is_shrunk_once(model: nn.Module, graph: qp.ChannelGraph) -> None:
    masks = keep(graph, first=[0, 2])
    small = qp.shrink(model, graph, masks)
    with pytest.raises(qp.MaskMismatchError, match="and only once"):
        qp.shrink(small, graph, masks)


@pytest.mark.parametrize("group", ["head", "first_in"])
def test_masks_that_remove_frozen_units(model: nn.Module, graph: qp.ChannelGraph, group: str) -> None:
    masks = keep(graph, **{group: [0]})
    with pytest.raises(
        qp.MaskMismatchError, match=r"which is kept \(network (in|out)put\): take masks from solve"
    ):
        qp.shrink(model, graph, masks)


@pytest.mark.parametrize("group", ["first", "second"])
def test_masks_that_empty_a_layer(model: nn.Module, graph: qp.ChannelGraph, group: str) -> None:
    with pytest.raises(qp.MaskMismatchError, match=f"remove all outputs of {group}: keep at least one"):
        qp.shrink(model, graph, keep(graph, **{group: []}))


@pytest.mark.parametrize(
    "flat",
    [np.ones(3, np.bool_), np.ones((2, 6), np.bool_), np.ones(12), np.ones(12, np.int64)],
    ids=["short", "matrix", "floats", "integers"],
)
def test_flat_masks_of_the_wrong_kind(graph: qp.ChannelGraph, flat: Any) -> None:
    assert graph.unit_count == 3 + 4 + 3 + 2
    with pytest.raises(qp.MaskMismatchError, match=r"bool array of shape \(12,\).*: make it from this graph"):
        qp.Masks.from_flat(graph, flat)


def test_masks_with_a_group_left_out(graph: qp.ChannelGraph) -> None:
    whole = all_kept(graph)
    partial = qp.Masks(whole.fingerprint, {k: v for k, v in whole.keep.items() if k != "second"})
    with pytest.raises(qp.MaskMismatchError, match=r"one entry for each group .*: make them with"):
        partial.flat(graph)


# Files


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.pop(key)


def wider_group(data: dict[str, Any]) -> None:
    data["groups"][0]["width"] += 1


def other_weight(data: dict[str, Any]) -> None:
    data["layers"][0]["weight"] = "second.weight"


def cheaper_layer(data: dict[str, Any]) -> None:
    data["layers"][0]["macs_per_pair"] = 1


def moved_unit(data: dict[str, Any]) -> None:
    data["axes"][0][0] = data["axes"][0][1]


def unknown_field(data: dict[str, Any]) -> None:
    data["groups"][0]["colour"] = "red"


def text_axis(data: dict[str, Any]) -> None:
    data["axes"][0] = "all"


@pytest.mark.parametrize("change", [wider_group, other_weight, cheaper_layer, moved_unit])
def test_a_changed_graph_file(graph: qp.ChannelGraph, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(json.dumps(graph.to_json()))
    change(data)
    with pytest.raises(qp.PlanError, match=r"does not match its own fingerprint, .*: trace the model again"):
        qp.ChannelGraph.from_json(data)


@pytest.mark.parametrize(
    "change",
    [without("groups"), without("fingerprint"), without("schema"), unknown_field, text_axis],
    ids=["no groups", "no fingerprint", "no schema", "unknown field", "text for an axis"],
)
def test_a_broken_graph_file(graph: qp.ChannelGraph, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(json.dumps(graph.to_json()))
    change(data)
    with pytest.raises(qp.PlanError, match=r"not a channel graph file .*: trace the model again"):
        qp.ChannelGraph.from_json(data)


def test_a_graph_file_of_another_version(graph: qp.ChannelGraph) -> None:
    data = {**graph.to_json(), "schema": 999}
    with pytest.raises(qp.PlanError, match=r"schema 999.*: trace the model again"):
        qp.ChannelGraph.from_json(data)


def test_an_unchanged_graph_file(graph: qp.ChannelGraph) -> None:
    again = qp.ChannelGraph.from_json(json.loads(json.dumps(graph.to_json())))
    assert again.fingerprint == graph.fingerprint
    assert again.groups == graph.groups


# Inputs of classes


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Batch:
    left: Tensor
    right: Tensor


class TakesOne(nn.Module):
    """x.left(4) -> a(8) -> head(3); x.right is added to the input, and whatever follows is ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Any, *more: Any) -> Tensor:
        return self.head(self.a(x.left + x.right).relu())


ROWS = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("example", "place"),
    [
        ((Pair(ROWS, ROWS),), "[0][0]"),
        ((Pair(ROWS, ROWS), ROWS), "[0][0]"),
        ({"x": Pair(ROWS, ROWS)}, "[1]['x']"),
        ((Pair(ROWS, ROWS), [ROWS, {"deep": Pair(ROWS, ROWS)}]), "[0][0]"),
        (((), {"x": Pair(ROWS, ROWS)}), "[1]['x']"),
    ],
)
def test_a_named_tuple_among_the_inputs(example: Any, place: str) -> None:
    expected = (
        f"example input {place} is a Pair, a class that cannot be stored with the graph: let the forward"
    )
    with pytest.raises(qp.TraceError, match=re.escape(expected)):
        qp.trace(TakesOne(), example)


@pytest.mark.parametrize("example", [(Batch(ROWS, ROWS),), Batch(ROWS, ROWS), (Batch(ROWS, ROWS), ROWS)])
def test_a_class_that_pytorch_cannot_take_apart(example: Any) -> None:
    expected = (
        "example input [0][0] is a Batch with tensors in it, a class that cannot be taken apart: give its"
    )
    with pytest.raises(qp.TraceError, match=re.escape(expected)):
        qp.trace(TakesOne(), example)


def test_what_the_messages_advise_works() -> None:
    @dataclass
    class Registered(Batch):
        pass

    torch.export.register_dataclass(Registered, serialized_type_name="tests.Registered")
    model = TakesOne()
    graph = qp.trace(model, (Registered(ROWS, ROWS),))
    small = qp.shrink(model, graph, keep(graph, a=[0, 3, 5]))
    x = Registered(torch.randn(2, 4), torch.randn(2, 4))
    torch.testing.assert_close(small(x), qp.masked(model, graph, keep(graph, a=[0, 3, 5]))(x))
