"""Residual branches that are removed as a whole: out of an exported graph, and out of a model's own modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qcqp_prune.graph.branches import branch_nodes
from qcqp_prune.graph.channels import BoolArray, ChannelGraph
from qcqp_prune.graph.walk import additions


class Skipped(nn.Module):
    """What is left of a residual block without its branch: the input, as the block's own forward passes it on."""

    def __init__(self, after: str = "") -> None:
        """Make one.

        Args:
            after: ``relu`` where the block puts one behind its sum.
        """
        super().__init__()
        self.after = after

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The input; further arguments are what the removed branch would have read."""
        return torch.relu(x) if self.after == "relu" else x

    def extra_repr(self) -> str:
        """The activation, where there is one."""
        return self.after


def without_blocks(module: GraphModule, graph: ChannelGraph, flat: BoolArray) -> GraphModule:
    """An exported module without the branches that a mask removes; changed in place and returned."""
    numbered = {index: node for node, index in additions(module.graph).items()}
    gone = [graph.blocks[b] for b in graph.removed_blocks(flat)]
    alive = set(module.graph.nodes)
    for block in gone:
        node = numbered[block.addition]
        if node not in alive:  # it stood in a branch that is removed already
            continue
        nodes = branch_nodes(node, block.operand)
        kept = node.args[1 - block.operand]
        assert isinstance(kept, Node)
        if len(set(kept.users) - nodes - {node}) and any(_changes(user, node) for user in node.users):
            with module.graph.inserting_before(node):
                kept = module.graph.call_function(torch.ops.aten.clone.default, (kept,))
                kept.meta = dict(node.meta)
        node.replace_all_uses_with(kept)
        for dead in [n for n in reversed(module.graph.nodes) if n is node or n in nodes]:
            module.graph.erase_node(dead)
            alive.discard(dead)
    if gone:
        module.graph.lint()
        module.recompile()
    return module


def _changes(user: Node, node: Node) -> bool:
    """Whether an operator works in place on a node."""
    target = user.target
    in_place = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    return in_place and bool(user.args) and user.args[0] is node


def need_rewriting(graph: ChannelGraph, flat: BoolArray) -> list[str]:
    """Names of the removed branches that no module of their own computes: a model's forward cannot be without them."""
    gone = set(graph.removed_blocks(flat))

    def replaced(b: int) -> bool:
        block = graph.blocks[b]
        return bool(block.module) or (block.outer in gone and replaced(block.outer))

    return [graph.blocks[b].name for b in sorted(gone) if not replaced(b)]


def drop_blocks(model: nn.Module, graph: ChannelGraph, flat: BoolArray) -> None:
    """Take the parameters of removed branches out of a model, and put ``Skipped`` for modules without any left."""
    names = graph.removed_tensors(flat)
    for spec in graph.tensors:
        for path in (spec.name, *spec.aliases) if spec.name in names else ():
            parent, _, leaf = path.rpartition(".")
            owner = model.get_submodule(parent)
            (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = None
    for block in (graph.blocks[b] for b in graph.removed_blocks(flat)):
        if block.module:
            parent, _, leaf = block.module.rpartition(".")
            owner = model
            for step in parent.split(".") if parent else ():
                owner = getattr(owner, step, nn.Module())
            if leaf in owner._modules:  # else an outer one is gone already
                owner._modules[leaf] = Skipped(block.after)
