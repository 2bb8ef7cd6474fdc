"""A run that was killed and resumed ends bit for bit where an uninterrupted one ends, and nothing else is resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qcqp_prune.data import Augmentation, digits
from qcqp_prune.errors import TrainingError
from qcqp_prune.train import Callback, FinetuneConfig, TrainingState, finetune


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 10)
    )


def own_loader() -> Any:
    images = digits().train.select(range(120))
    return images.loader(32, shuffle=True, augment=Augmentation(1, True), seed=3)


def tensors() -> TensorDataset:
    images = digits().train.select(range(120))
    return TensorDataset(images.normalise(images.images), images.labels)


def torch_loader() -> Any:
    return DataLoader(tensors(), batch_size=32, shuffle=True)


def torch_loader_with_generator() -> Any:
    return DataLoader(tensors(), batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(9))


class Kill(Callback):
    """Ends the run in the second batch of epoch `epoch`, as Ctrl-C does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_batch_end(self, state: TrainingState, /) -> None:
        if (state.epoch, state.batch) == (self.epoch, 1):
            raise KeyboardInterrupt


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("loader", [own_loader, torch_loader, torch_loader_with_generator])
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, loader: Callable[[], Any], optimizer: Any
) -> None:
    config = FinetuneConfig(optimizer=optimizer, lr=0.01, schedule="cosine", device="cpu")
    whole, first, second = net(), net(), net(seed=1)
    expected = finetune(whole, loader(), epochs=4, config=config)
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        finetune(first, loader(), epochs=4, config=config, checkpoint=path, callbacks=[Kill(2)])
    torch.manual_seed(77)  # a new process starts elsewhere
    history = finetune(second, loader(), epochs=4, config=config, checkpoint=path)
    assert same(whole, second)
    assert not same(whole, first)
    assert history.resumed_at == 2
    plain = [[replace(r, seconds=0.0) for r in h.epochs] for h in (expected, history)]
    assert plain[0] == plain[1]


def test_a_complete_run_is_loaded_and_not_repeated(tmp_path: Path) -> None:
    first, second = net(), net(seed=1)
    finetune(first, own_loader(), epochs=2, checkpoint=tmp_path / "c")
    history = finetune(second, [], epochs=2, checkpoint=tmp_path / "c")  # an empty loader would be an error
    assert same(first, second)
    assert len(history.epochs) == history.resumed_at == 2


def test_a_real_kill_leaves_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_checkpoint import *\n"
        "class Die(Callback):\n"
        "    def on_batch_end(self, state, /):\n"
        "        if (state.epoch, state.batch) == (1, 2):\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "finetune(net(), own_loader(), epochs=2, checkpoint=sys.argv[1], callbacks=[Die()],\n"
        "         config=FinetuneConfig(device='cpu'))\n"
    )
    path = tmp_path / "run.safetensors"
    done = subprocess.run([sys.executable, str(script), str(path)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    resumed, whole = net(seed=4), net()
    config = FinetuneConfig(device="cpu")
    assert finetune(resumed, own_loader(), epochs=2, config=config, checkpoint=path).resumed_at == 1
    finetune(whole, own_loader(), epochs=2, config=config)
    assert same(resumed, whole)


def test_a_kill_while_writing_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"

    class Dies(Callback):
        def on_epoch_end(self, state: TrainingState, /) -> None:
            if state.epoch == 1:
                monkeypatch.setattr(os, "fsync", self.die)

        @staticmethod
        def die(_file: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(net(), own_loader(), epochs=3, checkpoint=path, callbacks=[Dies()])
    monkeypatch.undo()
    assert finetune(net(), own_loader(), epochs=3, checkpoint=path).resumed_at == 1


def test_tied_parameters_are_kept_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x.flatten(1))))[:, :10]  # type: ignore[no-any-return]

    first, second = Tied(), Tied()
    finetune(first, own_loader(), epochs=1, checkpoint=tmp_path / "c")
    finetune(second, own_loader(), epochs=1, checkpoint=tmp_path / "c")
    assert second.a.weight is second.b.weight
    assert same(first, second)


# what is refused


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A checkpoint of `net()` after one epoch of two."""
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        finetune(net(), own_loader(), epochs=2, checkpoint=path, callbacks=[Kill(1)])
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": FinetuneConfig(lr=0.5)}, r"another run: lr was 0\.01 and is now 0\.5\. Use"),
        ({"config": FinetuneConfig(seed=1)}, "seed was 0 and is now 1"),
        ({"epochs": 3}, "epochs was 2 and is now 3"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    written: Path, change: dict[str, Any], message: str
) -> None:
    model, before = net(5), net(5)
    with pytest.raises(TrainingError, match=message):
        finetune(model, own_loader(), **{"epochs": 2, "checkpoint": written, **change})
    assert same(model, before)


def test_where_a_run_goes_on_and_whether_it_is_watched_are_free(written: Path) -> None:
    config = FinetuneConfig(device="cpu", progress=True)
    assert finetune(net(), own_loader(), epochs=2, config=config, checkpoint=written).resumed_at == 1


def test_a_checkpoint_of_another_network_is_refused(written: Path) -> None:
    wider = net()
    wider[0], wider[1], wider[5] = nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Linear(180, 10)
    with pytest.raises(TrainingError, match=r"another network: .*\(4, 1, 3, 3\) there and \(5, 1, 3, 3\)"):
        finetune(wider, own_loader(), epochs=2, checkpoint=written)


def test_a_checkpoint_with_other_frozen_parameters_is_refused(written: Path) -> None:
    model = net()
    model[0].requires_grad_(False)
    with pytest.raises(TrainingError, match="other parameters are trained"):
        finetune(model, own_loader(), epochs=2, checkpoint=written)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:-100],
        lambda b: b[:40],
        lambda b: b"not a checkpoint at all",
        lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:],  # one bit of one weight
        lambda b: b.replace(b"epochs", b"epoxhs", 1),
    ],
)
def test_a_broken_checkpoint_is_refused(written: Path, damage: Callable[[bytes], bytes]) -> None:
    written.write_bytes(damage(written.read_bytes()))
    with pytest.raises(TrainingError, match="not a whole checkpoint"):
        finetune(net(), own_loader(), epochs=2, checkpoint=written)


def test_a_safetensors_file_of_another_kind_is_refused(written: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, written)
    with pytest.raises(TrainingError, match="not a whole checkpoint"):
        finetune(net(), own_loader(), epochs=2, checkpoint=written)


def test_a_diverged_epoch_is_not_written(tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_batch_end(self, state: TrainingState, /) -> None:
            if state.epoch == 1 and state.batch + 1 == state.batches:
                state.model[0].weight.data[0] = torch.nan  # type: ignore[index]

    path = tmp_path / "c"
    with pytest.raises(TrainingError, match="a weight is not finite"):
        finetune(net(), own_loader(), epochs=3, checkpoint=path, callbacks=[Spoil()])
    assert finetune(net(), own_loader(), epochs=3, checkpoint=path).resumed_at == 1
