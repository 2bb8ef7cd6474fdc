"""Models of Hugging Face's transformers, tiny and with random weights: traced, cut, verified, and generating."""

from __future__ import annotations

import copy
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
from benchmarks.zoo import case
from benchmarks.zoo.transformers import MODELS, package
from qcqp_prune.apply.masked import masked
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.masks import Masks
from qcqp_prune.program.problem import allowed_counts
from tests.networks import assert_slices, keep, random_masks, uses, widths, zeroed

REWRITTEN = {"segformer"}
"""Its forward takes the number of channels after a convolution to be the one before it."""

NORMED = {"segformer", "wav2vec2"}
"""A norm runs over channels that are pruned, so that zeroing is not removal."""


def load(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    package()
    model, inputs = case("transformers", name).built()
    return model, inputs


def first(output: Any) -> Tensor:
    return next(x for x in output.values() if isinstance(x, Tensor))


def counts_alike(graph: ChannelGraph, masks: Masks) -> bool:
    kept = masks.counts()
    return len({kept[g.id] for g in graph.groups if g.frozen_reason is None and g.width == 48}) == 1


ALIKE = ("deit", "gemma", "mistral", "qwen2")
"""Others that are tested have all that these have."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in MODELS]
)
def test_verified(name: str) -> None:
    model, inputs = load(name)
    before = copy.deepcopy(getattr(model.config, "use_cache", None))
    graph = qp.trace(model, inputs)
    assert [n for n in graph.notes if n.where != "units"] == []
    least = [min(c) for c in allowed_counts(graph)]
    assert qp.Macs().form(graph).evaluate(least) <= 0.45 * uses(graph)["macs"]
    heads = [g for g in graph.groups if "attention" in g.id.lower() or "attn" in g.id]
    assert any(g.frozen_reason is None for g in heads)
    masks = random_masks(graph, 1)
    small, checked = qp.shrink_and_verify(model, graph, masks)
    assert checked.dtype == "float64"
    assert checked.caution == ""
    assert checked.realisation == ("graph" if name in REWRITTEN else "modules")
    assert_slices(model, small, graph, masks)
    assert getattr(model.config, "use_cache", None) == before
    assert "forward" not in vars(model)
    if name not in REWRITTEN:
        assert type(small) is type(model)
    if (
        name not in NORMED
    ):  # what removal means, by plain PyTorch, in single precision as the model is written
        with torch.no_grad():
            got, want = first(small(**inputs)), first(zeroed(model, graph, masks)(**inputs))
        assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


def test_units_of_a_llama() -> None:
    """Two blocks of 4 heads of 8, whose keys and values are 2 groups; gates and values of the feed-forward together."""
    model, inputs = load("llama")
    graph = qp.trace(model, inputs)
    block = "model.layers.{}."
    free = {
        block.format(b) + part: n
        for b in (0, 1)
        for part, n in (("self_attn.q_proj", 2), ("mlp.gate_proj", 48))
    }
    assert widths(graph, free=True) == free
    projections = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48
    assert uses(graph)["macs"] == 12 * (2 * projections + 32 * 60) + 2 * 2 * 12 * 12 * 32
    small = qp.shrink(
        model, graph, keep(graph, model_layers_1_self_attn_q_proj=[1], model_layers_0_mlp_gate_proj=[5])
    )
    old, new = model.model.layers, small.model.layers
    attention, dense = new[1].self_attn, old[1].self_attn
    assert torch.equal(
        attention.q_proj.weight, dense.q_proj.weight[16:]
    )  # heads 2 and 3 read keys of group 1
    assert torch.equal(attention.k_proj.weight, dense.k_proj.weight[8:])
    assert torch.equal(attention.v_proj.weight, dense.v_proj.weight[8:])
    assert torch.equal(attention.o_proj.weight, dense.o_proj.weight[:, 16:])
    for gate in ("gate_proj", "up_proj"):
        assert torch.equal(getattr(new[0].mlp, gate).weight, getattr(old[0].mlp, gate).weight[5:6])
    assert torch.equal(new[0].mlp.down_proj.weight, old[0].mlp.down_proj.weight[:, 5:6])


def test_units_of_a_gpt2() -> None:
    """One matrix (32, 3 x 4 heads x 8) gives queries, keys and values: a head has columns in each third."""
    model, inputs = load("gpt2")
    graph = qp.trace(model, inputs)
    small = qp.shrink(model, graph, keep(graph, transformer_h_0_attn_c_attn=[0, 2]))
    dense, attention = model.transformer.h[0].attn, small.transformer.h[0].attn
    columns = dense.c_attn.weight.reshape(32, 3, 4, 8)[:, :, [0, 2]].reshape(32, 48)
    assert torch.equal(attention.c_attn.weight, columns)
    assert torch.equal(attention.c_proj.weight, dense.c_proj.weight.reshape(4, 8, 32)[[0, 2]].reshape(16, 32))
    assert (attention.split_size, attention.num_heads, attention.c_attn.nf) == (16, 2, 48)
    assert small.lm_head.weight is small.transformer.wte.weight


def test_a_table_of_relative_positions_goes_with_the_heads() -> None:
    """T5 has one table for all layers of a side, and of zeros for cross attention: heads go in all of them."""
    model, inputs = load("t5")
    graph = qp.trace(model, inputs)
    heads = {name: n for name, n in widths(graph, free=True).items() if "Attention" in name}
    assert heads == {
        "encoder.block.0.layer.0.SelfAttention.q": 4,
        "decoder.block.0.layer.0.SelfAttention.q": 4,
        "decoder.block.0.layer.1.EncDecAttention.q": 4,
    }
    kept = keep(
        graph,
        encoder_block_0_layer_0_SelfAttention_q=[1, 3],
        decoder_block_0_layer_1_EncDecAttention_q=[2],
    )
    small = qp.shrink(model, graph, kept)
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    assert torch.equal(small.get_submodule(table).weight, model.get_submodule(table).weight[:, [1, 3]])
    assert [b.layer[0].SelfAttention.n_heads for b in small.encoder.block] == [2, 2]
    assert [b.layer[1].EncDecAttention.n_heads for b in small.decoder.block] == [1, 1]


def greedy(
    model: nn.Module, graph: ChannelGraph, masks: Masks, inputs: dict[str, Tensor], steps: int
) -> Tensor:
    """Tokens of the masked network, one full pass for each."""
    network, key = masked(model, graph, masks), list(inputs)[-1]
    for _ in range(steps):
        logits = network(**inputs)["logits"]
        inputs = {**inputs, key: torch.cat([inputs[key], logits[:, -1:].argmax(-1)], 1)}
    return inputs[key]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generates(name: str) -> None:
    """Greedy, with a cache of keys and values, token by token what the masked network says."""
    model, inputs = load(name)
    graph = qp.trace(model, inputs)
    masks = random_masks(graph, 3)
    small = qp.shrink(model, graph, masks)
    assert small.config.use_cache
    assert not masks.flat(graph).all()
    assert small(**inputs).past_key_values is not None
    steps = 4
    if name == "t5":  # generate() makes the first token of the answer itself
        inputs = {"input_ids": inputs["input_ids"]}
    with torch.no_grad():
        tokens = small.generate(
            **inputs,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    if name == "t5":
        inputs = {**inputs, "decoder_input_ids": tokens[:, :1]}
    assert torch.equal(tokens, greedy(model, graph, masks, inputs, steps))


def solved(graph: ChannelGraph, model: nn.Module, share: str = "60%") -> Masks:
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": share})
    return qp.solve(problem, "block_coordinate", options=qp.SolveOptions(work_limit=2)).masks


def came_back(small: nn.Module, folder: Path) -> nn.Module:
    small.save_pretrained(folder)
    return type(small).from_pretrained(folder).eval()


def test_a_uniform_llama_goes_through_its_own_files(tmp_path: Path) -> None:
    model, inputs = load("llama")
    graph = qp.trace(model, inputs, uniform=True, min_keep=0.25)
    masks = solved(graph, model)
    assert counts_alike(graph, masks)
    assert not masks.flat(graph).all()
    small, checked = qp.shrink_and_verify(model, graph, masks)
    width = small.model.layers[0].mlp.gate_proj.out_features
    assert (small.config.intermediate_size, small.model.layers[1].mlp.intermediate_size) == (width, width)
    assert f"intermediate_size={width}" in checked.config
    assert model.config.intermediate_size == 48
    again = came_back(small, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, small(**inputs).logits)
        assert torch.equal(
            again.generate(**inputs, max_new_tokens=3), small.generate(**inputs, max_new_tokens=3)
        )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_smaller_heads_go_through_a_models_own_files(name: str, tmp_path: Path) -> None:
    """With the frequencies of the pairs that are left, which are not those of a dense model with smaller heads."""
    model, inputs = load(name)
    dense = model.config.head_dim
    graph = qp.trace(model, inputs, units="head_dim")
    masks = solved(graph, model, "92%")
    small, checked = qp.shrink_and_verify(model, graph, masks)
    (size,) = {layer.self_attn.head_dim for layer in small.model.layers}
    assert small.config.head_dim == size < dense == model.config.head_dim
    assert checked.config == f"the configuration says the new widths: head_dim={size}, rope_parameters"
    assert model.config.rope_parameters["rope_type"] == "default"
    again = came_back(small, tmp_path)
    with torch.no_grad():
        expected = small(**inputs).logits
        assert not torch.allclose(expected, model(**inputs).logits, atol=1e-3)
        assert torch.allclose(again(**inputs).logits, expected, atol=1e-6 * float(expected.abs().max()))
        assert torch.equal(
            again.generate(**inputs, max_new_tokens=3), small.generate(**inputs, max_new_tokens=3)
        )


def test_rotations_that_a_configuration_cannot_say(tmp_path: Path) -> None:
    """Frequencies that are scaled already have no second factor: a model of smaller heads would turn by others."""
    model, inputs = load("llama")
    torch.manual_seed(0)
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    model = type(model)(config).eval()
    graph = qp.trace(model, inputs, units="head_dim")
    small, checked = qp.shrink_and_verify(model, graph, solved(graph, model, "92%"))
    assert "a LlamaConfig cannot say" in checked.config
    assert "by other frequencies" in checked.config
    assert small.config.head_dim == model.config.head_dim
    with pytest.raises(qp.PlanError, match="by other frequencies"):
        small.save_pretrained(tmp_path / "hf")


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package()
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    code = page[page.index("    import torch") : page.index("`small` is a")]
    names: dict[str, Any] = {}
    exec(textwrap.dedent(code), names)
    assert names["tokens"].shape == (1, 17)
    inputs = names["inputs"]
    with torch.no_grad():
        assert torch.equal(names["again"].eval()(**inputs).logits, names["small"](**inputs).logits)


def test_the_widths_that_a_configuration_has_numbers_for(tmp_path: Path) -> None:
    """BERT divides its width by the number of heads, so heads stay; wav2vec2 lists the widths of its convolutions."""
    for name, options in (
        ("bert", {"uniform": True, "units": "widths", "ignored_layers": ["*pooler*"]}),
        (
            "wav2vec2",
            {"uniform": ["*intermediate_dense"], "ignored_layers": ["*attention*", "*conv_layers.2*"]},
        ),
    ):
        model, inputs = load(name)
        graph = qp.trace(model, inputs, **options)
        small, checked = qp.shrink_and_verify(model, graph, random_masks(graph, 1))
        assert "says the new widths" in checked.config
        again = came_back(small, tmp_path / name)
        with torch.no_grad():
            assert torch.allclose(first(again(**inputs)), first(small(**inputs)), atol=1e-6)
        if name == "wav2vec2":
            assert list(small.config.conv_dim) == [
                m.conv.out_channels for m in small.wav2vec2.feature_extractor.conv_layers
            ]


def test_widths_that_no_configuration_can_say(tmp_path: Path) -> None:
    """Refused with what to do instead, which then works; the dense number stays in the configuration."""
    model, inputs = load("llama")
    graph = qp.trace(model, inputs)
    masks = keep(
        graph, model_layers_0_mlp_gate_proj=list(range(20)), model_layers_1_mlp_gate_proj=list(range(30))
    )
    small, checked = qp.shrink_and_verify(model, graph, masks)
    assert "a LlamaConfig cannot say" in checked.config
    assert small.config.intermediate_size == 48
    for network in (small, copy.deepcopy(small)):
        with pytest.raises(qp.PlanError, match=r"qcqp_prune\.save\(\).*uniform=True"):
            network.save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    qp.save(small, tmp_path / "plan", graph=graph, masks=masks)
    again = qp.load(tmp_path / "plan", lambda: type(model)(model.config))
    with torch.no_grad():
        assert torch.equal(
            again.generate(**inputs, max_new_tokens=4), small.generate(**inputs, max_new_tokens=4)
        )


def test_uniform() -> None:
    model, inputs = load("llama")
    graph = qp.trace(model, inputs, uniform=["*.mlp.*"], round_to={"*.mlp.*": 8})
    ties = {g.id: g.tie for g in graph.groups if g.tie}
    assert ties == dict.fromkeys(
        [f"model.layers.{b}.mlp.gate_proj" for b in (0, 1)], "model.layers.0.mlp.gate_proj"
    )
    allowed = dict(zip([g.id for g in graph.groups], allowed_counts(graph), strict=True))
    assert allowed["model.layers.1.mlp.gate_proj"] == [8, 16, 24, 32, 40, 48]
    assert graph.fingerprint == qp.trace(model, inputs).fingerprint
    with pytest.raises(qp.UnknownLayerError, match="no layer is called"):
        qp.trace(model, inputs, uniform=["*.nlp.*"])
    with pytest.raises(qp.InvalidOptionError, match="uniform="):
        qp.trace(model, inputs, uniform=[3])  # type: ignore[list-item]


def test_globs_of_uniform_reach_over_names() -> None:
    """One number of a T5 stands for both sides: heads of one glob, widths of another; a frozen layer stays out."""
    model, inputs = load("t5")
    graph = qp.trace(
        model, inputs, uniform=["*Attention*", "*Dense*"], ignored_layers=["decoder.block.1.layer.2.*"]
    )
    ties: dict[str | None, list[str]] = {}
    for g in graph.groups:
        ties.setdefault(g.tie, []).append(g.id)
    (heads,) = [members for tie, members in ties.items() if tie and "Attention" in tie]
    (dense,) = [members for tie, members in ties.items() if tie and "Dense" in tie]
    assert (len(heads), len(dense)) == (3, 3)
    small, checked = qp.shrink_and_verify(model, graph, Masks.from_flat(graph, half_of_the_heads(graph)))
    assert "num_heads=2" in checked.config
    assert small.config.num_heads == 2


def half_of_the_heads(graph: ChannelGraph) -> np.ndarray:
    flat = np.ones(graph.unit_count, np.bool_)
    for g, group in enumerate(graph.groups):
        if group.tie and "Attention" in group.tie:
            flat[graph.units(g)] = np.arange(4) % 2 == 0
    return flat


def test_a_width_that_a_configuration_leaves_open_is_written_into_it(tmp_path: Path) -> None:
    """GPT-2's n_inner is None for four times the width; smaller it has to be said."""
    torch.manual_seed(0)
    transformers = package()
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    assert config.n_inner is None
    model = transformers.GPT2LMHeadModel(config).eval()
    inputs = {"input_ids": torch.randint(3, 60, (1, 12))}
    graph = qp.trace(model, inputs, uniform=True, units="widths")
    masks = solved(graph, model, "80%")
    small = qp.shrink(model, graph, masks)
    again = came_back(small, tmp_path)
    assert again.config.n_inner == small.config.n_inner == small.transformer.h[0].mlp.c_fc.nf < 128
    assert again.config.n_embd == 32
    assert torch.equal(again(**inputs).logits, small(**inputs).logits)
    assert model.config.n_inner is None
