"""What a loader yields, in each of its forms, is the same batch for all that takes one."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.graph.batches import arguments, is_pair

Inputs = Callable[[Tensor, Tensor, int], Any]


class Two(nn.Module):
    """Two inputs of one shape, so that nothing but the numbers says which is which, and a scale that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = (
            nn.Linear(4, 6),
            nn.BatchNorm1d(6),
            nn.Linear(6, 5),
            nn.Linear(5, 3),
        )

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        read = torch.relu(self.norm(self.a(x - 2 * y)))
        out: Tensor = self.c(torch.relu(self.b(read))) * scale
        return out


FORMS: dict[str, Inputs] = {
    "list": lambda x, y, k: [x, y],
    "dict": lambda x, y, k: {"x": x, "y": y},
    "dicts in several orders": lambda x, y, k: {"x": x, "y": y} if k % 2 else {"y": y, "x": x},
    "mapping": lambda x, y, k: UserDict(y=y, x=x),
    "both": lambda x, y, k: ((x,), {"y": y}),
    "with a number": lambda x, y, k: (x, y, 1.0),
}


def loader(form: Inputs) -> list[tuple[Any, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 8, 4, generator=generator)
    targets = torch.randint(3, (4, 8), generator=generator)
    return [(form(a, b, k), t) for k, (a, b, t) in enumerate(zip(x, y, targets, strict=True))]


PLAIN = loader(lambda x, y, k: (x, y))


def network() -> tuple[Two, qp.ChannelGraph]:
    torch.manual_seed(0)
    model = Two()
    for (x, y), _ in PLAIN:
        model(x, y)
    model.eval()
    return model, qp.trace(model, PLAIN[0][0])


SCORES: dict[str, Callable[[Any], qp.Importance]] = {
    "weight": qp.Taylor,
    "gate": lambda b: qp.Taylor(b, form="gate"),
    "fisher": qp.Fisher,
    "sensitivity": qp.NeuronSensitivity,
    "activation": qp.Activation,
    "change": qp.OutputChange,
    "calibrated": qp.Calibrated,
}


@pytest.mark.parametrize("name", SCORES)
def test_every_importance_takes_every_form(name: str) -> None:
    model, graph = network()
    expected = SCORES[name](PLAIN)(model, graph)
    everything = np.ones(graph.unit_count, np.bool_)
    for form in FORMS.values():
        found = SCORES[name](loader(form))(model, graph)
        np.testing.assert_allclose(found.unary, expected.unary, rtol=1e-5, atol=1e-9)
        assert found.evaluate(everything) == pytest.approx(expected.evaluate(everything), rel=1e-5)


def measured(data: Any) -> list[Tensor]:
    """Everything else that takes a loader, one after another."""
    model, graph = network()
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), budgets="60%")
    masks = qp.solve(problem, solver="block_coordinate").masks
    small = qp.shrink(model, graph, masks)
    qp.reconstruct(small, model, graph, masks, data)
    fitted = [p.detach().clone() for p in small.parameters()]
    qp.recalibrate_batch_norm(small, data)
    qp.finetune(
        small, data, epochs=2, config=qp.FinetuneConfig(distillation=0.5), teacher=model, validation=data
    )
    return [*fitted, *small.state_dict().values(), torch.tensor(qp.evaluate(small, data).loss)]


def test_repair_finetuning_and_evaluation_take_every_form() -> None:
    expected = measured(PLAIN)
    for name, form in FORMS.items():
        for a, b in zip(measured(loader(form)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


def test_keywords_go_through_the_whole_job() -> None:
    data = loader(FORMS["dict"])
    recovery = qp.Recovery(train=data, validation=data, epochs=1)
    _, report = qp.prune(network()[0], data[0][0], budgets="60%", recovery=recovery)
    assert report.importance == "Calibrated"
    assert report.accuracy.finetuned is not None


def test_fisher_leaves_what_all_samples_share_as_it_is() -> None:
    class Shifted(Two):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, shift.expand_as(x))

    model = Shifted().eval()
    shift = torch.randn(1, 4)
    graph = qp.trace(model, (PLAIN[0][0][0], shift))
    shared = qp.Fisher([((x, shift), t) for (x, _), t in PLAIN])(model, graph)
    own = qp.Fisher([((x, shift.expand_as(x)), t) for (x, _), t in PLAIN])(model, graph)
    everything = np.ones(graph.unit_count, np.bool_)
    assert shared.evaluate(everything) == pytest.approx(own.evaluate(everything), rel=1e-5)


@pytest.mark.parametrize("batch", [{"x": torch.zeros(2, 4)}, (torch.zeros(2, 4),), [torch.zeros(2)] * 3])
def test_what_is_no_pair_is_refused_by_all(batch: Any) -> None:
    model, graph = network()
    for make in SCORES.values():
        with pytest.raises(
            qp.InvalidOptionError, match=r"as a batch: give a loader of pairs .* dict of keyword"
        ):
            make([batch])(model, graph)
    for run in (qp.finetune, qp.evaluate, qp.recalibrate_batch_norm):
        with pytest.raises(qp.TrainingError, match=r"Give one that yields pairs .* dict of keyword"):
            run(model, [batch])
    assert not is_pair(batch)


def test_arguments_are_put_in_the_order_of_their_names() -> None:
    cpu = torch.device("cpu")
    x = torch.zeros(1)
    assert list(arguments({"b": x, "a": {"z": x, "c": x}}, cpu)[1]) == ["a", "b"]
    assert arguments((x, None, "text"), cpu) == ((x, None, "text"), {})
    assert arguments(x, cpu) == ((x,), {})
