"""What fits is loaded, what does not is refused before anything changes, and no code in a file runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcqp_prune.errors import ModelLoadError
from qcqp_prune.models import load_pretrained, resnet20, resnet32


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_published_layouts_load(tmp_path: Path, nested: bool, prefix: str) -> None:
    source = resnet20()
    state = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 91.7} if nested else state, tmp_path / "weights.th")
    loaded = resnet20(pretrained=tmp_path / "weights.th")
    for name, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_files_without_batch_counters_load(tmp_path: Path) -> None:
    state = {n: v for n, v in resnet20().state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.th")
    assert torch.equal(resnet20(pretrained=tmp_path / "old.th").conv1.weight, state["conv1.weight"])


def test_another_architecture_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    torch.save(resnet32().state_dict(), tmp_path / "resnet32.th")
    model = resnet20()
    before = snapshot(model)
    with pytest.raises(ModelLoadError, match=r"does not fit ResNetCifar: has layer1\.3\.conv1\.weight"):
        load_pretrained(model, tmp_path / "resnet32.th")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    torch.save(resnet20(100).state_dict(), tmp_path / "cifar100.th")
    with pytest.raises(
        ModelLoadError, match=r"linear\.weight has shape \(100, 64\) where the model's is \(10, 64\)"
    ):
        resnet20(10, pretrained=tmp_path / "cifar100.th")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no file .*absent\.th"):
        resnet20(pretrained=tmp_path / "absent.th")


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut short"])
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.th").write_bytes(content)
    with pytest.raises(ModelLoadError, match="cannot be read as weights"):
        resnet20(pretrained=tmp_path / "broken.th")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save(resnet20().state_dict(), tmp_path / "whole.th")
    whole = (tmp_path / "whole.th").read_bytes()
    (tmp_path / "half.th").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelLoadError, match="cannot be read as weights"):
        resnet20(pretrained=tmp_path / "half.th")


def test_something_else_than_weights_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2, 3], tmp_path / "list.th")
    with pytest.raises(ModelLoadError, match="holds no state dict"):
        resnet20(pretrained=tmp_path / "list.th")


class Touch:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("torch_format", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, torch_format: bool) -> None:
    payload = {"state_dict": Touch(tmp_path / "made")}
    file = tmp_path / "evil.th"
    if torch_format:
        torch.save(payload, file)
    else:
        file.write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(ModelLoadError):
        resnet20(pretrained=file)
    assert not (tmp_path / "made").exists()
