"""A recurrent layer of which each layer and direction has a width of its own, which ``nn.LSTM`` cannot have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from qcqp_prune.errors import UnsupportedOpError
from qcqp_prune.graph.ops.recurrent import GATES, MODULES, Cell

State = Tensor | tuple[Tensor, ...]
"""One state for each layer and direction: stacked where all are of one width, in a tuple where they are not."""

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


class UnevenRNN(nn.Module):
    """An LSTM, GRU or plain RNN, one layer and one direction after another.

    Parameters have the names and order that they have in ``nn.LSTM``, so that state dicts fit. What it takes and gives
    is the same, but for states: where widths differ, ``h_n`` (and ``c_n``) is a tuple of one ``(batch, width)`` tensor
    for each layer and direction, not a stack of them.

    Args:
        rnn: gives parameters, which are taken over as they are, and options.

    Attributes:
        mode, input_size, num_layers, bias, batch_first, dropout, bidirectional: as of ``nn.LSTM``.
        hidden_sizes: units of each layer and direction.
        output_sizes: what each of them puts out: the same, or the width that its projection has.
    """

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.input_size, self.num_layers = rnn.mode, rnn.input_size, rnn.num_layers
        self.bias, self.batch_first, self.dropout = rnn.bias, rnn.batch_first, rnn.dropout
        self.bidirectional = rnn.bidirectional
        self._names = list(rnn._flat_weights_names)
        for name in self._names:
            self.register_parameter(name, cast(nn.Parameter, getattr(rnn, name)))
        self.hidden_sizes, self.output_sizes = widths(rnn)
        self.train(rnn.training)

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """Run over ``(time, batch, features)``, or ``(batch, time, features)``, or one sequence without a batch.

        Args:
            x: the sequences.
            hx: initial states as ``nn.LSTM`` takes them, or a tuple for each of them; zeros where it is None.

        Raises:
            UnsupportedOpError: the sequences are packed.
        """
        if isinstance(x, PackedSequence):
            raise UnsupportedOpError(
                "a packed sequence goes into recurrent layers of different widths: pad it with pad_packed_sequence"
            )
        if x.ndim == 2:
            batch = 0 if self.batch_first else 1
            hx = _each(hx, lambda state: state.unsqueeze(-2))
            out, states = self.forward(x.unsqueeze(batch), hx)
            return out.squeeze(batch), _each(states, lambda state: state.squeeze(-2))
        starts = self._starts(x, hx)
        ends: list[tuple[Tensor, ...]] = []
        directions = 1 + self.bidirectional
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            parts = []
            for k in range(layer * directions, (layer + 1) * directions):
                out, end = self._run(x, k, starts[k])
                parts.append(out)
                ends.append(end)
            x = torch.cat(parts, -1)
        states = tuple(_stacked(own) for own in zip(*ends, strict=True))
        return x, states if self.mode == "LSTM" else states[0]

    def _run(self, x: Tensor, k: int, start: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer in one direction: its output, and its last states without a dimension for layers."""
        size = len(self._names) // len(self.hidden_sizes)
        params = [getattr(self, name) for name in self._names[k * size : (k + 1) * size]]
        backward, time = self.bidirectional and k % 2 == 1, 1 if self.batch_first else 0
        x = x.flip(time) if backward else x
        if _is_square(params, self.bias):
            out, ends = _projected(x, Cell.of(params, self.bias, 1)[0], start, time)
        else:
            states: Any = [s[None] for s in start]
            states = states if self.mode == "LSTM" else states[0]
            options = (self.bias, 1, 0.0, self.training, False, self.batch_first)
            out, *last = _FUNCTIONS[self.mode](x, states, params, *options)
            ends = tuple(end[0] for end in last)
        return out.flip(time) if backward else out, ends

    def _starts(self, x: Tensor, hx: Any) -> list[tuple[Tensor, ...]]:
        """Initial states of each layer and direction."""
        is_lstm = self.mode == "LSTM"
        sizes = [self.output_sizes, self.hidden_sizes] if is_lstm else [self.output_sizes]
        batch = x.shape[0] if self.batch_first else x.shape[1]
        if hx is None:
            return [tuple(x.new_zeros(batch, n) for n in own) for own in zip(*sizes, strict=True)]
        given = list(zip(*(hx if is_lstm else [hx]), strict=True))
        found = [tuple(s.shape[-1] for s in own) for own in given]
        wanted = list(zip(*sizes, strict=True))
        if found != wanted:
            raise ValueError(
                f"initial states of widths {found} for layers of widths {wanted}: give None, or these"
            )
        return given

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{self.mode}, {self.input_size}, hidden_sizes={self.hidden_sizes}, output_sizes={self.output_sizes}, "
            f"batch_first={self.batch_first}, bidirectional={self.bidirectional}, dropout={self.dropout}"
        )


def put_uneven(model: nn.Module) -> None:
    """Replace every recurrent module that PyTorch's own cannot be any more, in place.

    Its layers have different widths, or a projection is as wide as what it projects: PyTorch tells by these widths
    whether there is one.
    """
    made: dict[nn.Module, UnevenRNN] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not path or type(module) not in MODULES or next(module.parameters(), None) is None:
            continue  # one without parameters is gone with its residual branch
        rnn = cast(nn.RNNBase, module)
        hidden, outputs = widths(rnn)
        square = rnn.proj_size > 0 and any(a == b for a, b in zip(hidden, outputs, strict=True))
        if square or len(set(hidden)) > 1 or len(set(outputs)) > 1:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made.setdefault(module, UnevenRNN(rnn)))


def widths(rnn: nn.RNNBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Hidden units, and outputs, of each layer and direction, read off the weights."""
    params = [getattr(rnn, name) for name in rnn._flat_weights_names]
    cells = Cell.of(params, rnn.bias, rnn.num_layers * (1 + rnn.bidirectional))
    gates = GATES[f"aten::{rnn.mode.lower()}"]
    return tuple(c.ih.shape[0] // gates for c in cells), tuple(c.hh.shape[1] for c in cells)


def _is_square(params: Sequence[Tensor], bias: bool) -> bool:
    """Whether a layer has a projection to as many outputs as it has units, which ``torch.lstm`` does not see."""
    return len(params) > 2 + 2 * bias and params[-1].shape[0] == params[-1].shape[1]


def _projected(
    x: Tensor, cell: Cell, start: tuple[Tensor, ...], time: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """An LSTM with a projection, step by step.

    References:
        Sak, Senior, Beaufays, "Long short-term memory based recurrent neural network architectures" (2014), eq. 7-13.
    """
    h, c = start
    bias_ih, bias_hh = cell.biases or (None, None)
    outputs = []
    for step in F.linear(x, cell.ih, bias_ih).unbind(time):
        i, f, g, o = (step + F.linear(h, cell.hh, bias_hh)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = F.linear(torch.sigmoid(o) * torch.tanh(c), cell.projection)
        outputs.append(h)
    return torch.stack(outputs, time), (h, c)


def _stacked(states: Sequence[Tensor]) -> State:
    same = len({s.shape for s in states}) == 1
    return torch.stack(list(states)) if same else tuple(states)


def _each(states: Any, change: Any) -> Any:
    if states is None or isinstance(states, Tensor):
        return states if states is None else change(states)
    return tuple(_each(s, change) for s in states)
