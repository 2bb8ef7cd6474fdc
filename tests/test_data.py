"""Readers against files written by hand from the formats' descriptions, and batches that repeat."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from qcqp_prune.data import (
    Augmentation,
    ImageSet,
    augmented,
    cifar10,
    digits,
    epoch_seed,
    fashion_mnist,
    mnist,
    read_cifar10_batch,
    read_idx,
)
from qcqp_prune.errors import DataError


def image_set(count: int = 10, size: int = 4) -> ImageSet:
    """Image i is filled with the value i and has the label i mod 3."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].repeat(1, 2, size, size)
    return ImageSet(images, torch.arange(count) % 3, ("a", "b", "c"), (0.5, 0.0), (0.25, 1.0), scale=10.0)


# CIFAR-10


def cifar_row(label: int, red: int = 1, green: int = 2, blue: int = 3) -> bytes:
    return bytes([label]) + bytes([red]) * 1024 + bytes([green]) * 1024 + bytes([blue]) * 1024


def test_cifar_rows_are_a_label_and_three_planes(tmp_path: Path) -> None:
    second = bytearray(cifar_row(9))
    second[1 + 1024 + 5 * 32 + 7] = 200  # green plane, row 5, column 7
    (tmp_path / "batch.bin").write_bytes(cifar_row(4) + bytes(second))
    images, labels = read_cifar10_batch(tmp_path / "batch.bin")
    assert images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [4, 9]
    assert images[0, :, 31, 31].tolist() == [1, 2, 3]
    assert np.argwhere(images[1] == 200).tolist() == [[1, 5, 7]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (cifar_row(1)[:-1], "3072 bytes long"),
        (cifar_row(1) + b"x", "not a multiple"),
        (cifar_row(10), "label 10"),
    ],
)
def test_a_bad_cifar_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "batch.bin").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_cifar10_batch(tmp_path / "batch.bin")


def test_a_missing_cifar_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"batches\.meta\.txt.*cifar-10-batches-bin"):
        cifar10(tmp_path)


def test_a_cifar_file_cut_between_two_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n")
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (tmp_path / f"{name}.bin").write_bytes(cifar_row(1) * 7)
    with pytest.raises(DataError, match="holds 7 images where 10000 belong"):
        cifar10(tmp_path)


@pytest.mark.data
def test_cifar10_is_whole(data_root: Path) -> None:
    train, test = cifar10(data_root)
    assert train.images.shape == (50_000, 3, 32, 32)
    assert torch.bincount(train.labels).tolist() == [5_000] * 10
    assert torch.bincount(test.labels).tolist() == [1_000] * 10
    assert train.classes[:2] == ("airplane", "automobile")
    assert test.normalise(
        torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    ).flatten().tolist() == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])


# idx


def idx(code: int, shape: tuple[int, ...], data: bytes) -> bytes:
    return bytes([0, 0, code, len(shape)]) + b"".join(struct.pack(">I", n) for n in shape) + data


def test_idx_reads_shape_type_and_byte_order(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(idx(0x08, (2, 3), bytes([0, 1, 2, 3, 4, 255])))
    (tmp_path / "shorts.gz").write_bytes(gzip.compress(idx(0x0B, (2,), struct.pack(">hh", -2, 258))))
    found = read_idx(tmp_path / "bytes")
    assert found.dtype == np.uint8
    assert found.tolist() == [[0, 1, 2], [3, 4, 255]]
    assert read_idx(tmp_path / "shorts.gz").tolist() == [-2, 258]
    assert read_idx(tmp_path / "shorts").tolist() == [-2, 258]  # .gz found beside it
    assert read_idx(tmp_path / "bytes.gz").shape == (2, 3)  # and the other way round


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin like an idx file"),
        (b"\x01\x00\x08\x01", "does not begin like an idx file"),
        (idx(0x07, (1,), b"x"), "does not begin like an idx file"),
        (b"\0\0\x08\x03\0\0", "ends within its header"),
        (idx(0x08, (2, 2), b"abc"), "holds 3 bytes of data where its header"),
        (idx(0x08, (2, 2), b"abcde"), "holds 5 bytes of data"),
        (idx(0x08, (2**31, 2**31, 4), b""), "holds 0 bytes of data"),  # the product is 0 modulo 2^64
    ],
)
def test_a_bad_idx_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "file")


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b"x" + b, lambda b: b[:20] + b"\xff" * 9 + b[29:]]
)
def test_a_bad_gzip_file_is_refused(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    whole = gzip.compress(idx(0x08, (1000,), bytes(range(250)) * 4))
    (tmp_path / "file.gz").write_bytes(damage(whole))
    with pytest.raises(DataError, match="not a whole gzip file"):
        read_idx(tmp_path / "file.gz")


def write_mnist(folder: Path, *, labels: bytes = b"\x05\x00") -> None:
    folder.mkdir()
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(0x08, (2, 28, 28), bytes(2 * 28 * 28)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(0x08, (len(labels),), labels))


def test_mnist_is_found_in_its_folder_or_by_it(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist")
    for root in (tmp_path, tmp_path / "mnist"):
        train, test = mnist(root)
        assert train.images.shape == (2, 1, 28, 28)
        assert test.labels.tolist() == [5, 0]


@pytest.mark.parametrize(("labels", "message"), [(b"\0", "do not belong together"), (b"\0\x0a", "above 9")])
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: bytes, message: str) -> None:
    write_mnist(tmp_path / "mnist", labels=labels)
    with pytest.raises(DataError, match=message):
        mnist(tmp_path)


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
        fashion_mnist(tmp_path)


@pytest.mark.data
@pytest.mark.parametrize("read", [mnist, fashion_mnist])
def test_mnists_are_whole_and_normalised(data_root: Path, read) -> None:  # type: ignore[no-untyped-def]
    train, test = read(data_root)
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.images.shape == (10_000, 1, 28, 28)
    pixels = train.normalise(train.images)
    assert abs(pixels.mean().item()) < 1e-3
    assert abs(pixels.std().item() - 1) < 1e-3


# digits


def test_digits_are_split_by_class_without_overlap() -> None:
    train, test = digits()
    assert len(train) + len(test) == 1797
    counts = torch.bincount(test.labels)
    for digit in range(10):
        whole = int((train.labels == digit).sum() + counts[digit])
        assert counts[digit] == whole // 5
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)
    assert train.images.max() == 16
    pixels = torch.cat([train.normalise(train.images), test.normalise(test.images)])
    assert abs(pixels.mean().item()) < 1e-3
    assert abs(pixels.std().item() - 1) < 1e-3


def test_digits_repeat_and_depend_on_the_seed() -> None:
    assert torch.equal(digits().test.images, digits().test.images)
    assert not torch.equal(digits(seed=1).test.images, digits(seed=2).test.images)


def test_a_bad_test_fraction_is_refused() -> None:
    with pytest.raises(DataError, match="test_fraction"):
        digits(test_fraction=1.0)


# sets and loaders


def test_items_are_normalised_by_hand() -> None:
    image, label = image_set()[4]
    assert label.item() == 1
    assert image[0].unique().tolist() == pytest.approx([(0.4 - 0.5) / 0.25])
    assert image[1].unique().tolist() == pytest.approx([0.4])
    assert torch.equal(image_set()[-1][0], image_set()[9][0])
    assert len(list(image_set(3))) == 3  # type: ignore[call-overload]  # ends by IndexError


def test_a_torch_loader_takes_an_image_set() -> None:
    images, labels = next(iter(DataLoader(image_set(), batch_size=5)))
    assert images.shape == (5, 2, 4, 4)
    assert labels.tolist() == [0, 1, 2, 0, 1]


def labels_of(batches: list[tuple[Tensor, Tensor]]) -> list[int]:
    # Channel 1 of image i holds i / 10.
    return [round(10 * float(image[1, 0, 0])) for images, _ in batches for image in images]


def test_batches_cover_the_set_in_order() -> None:
    loader = image_set().loader(4)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert len(loader) == 3
    assert labels_of(batches) == list(range(10))
    short = image_set().loader(4, drop_last=True)
    assert len(short) == len(list(short)) == 2


def test_each_epoch_has_its_own_order_which_repeats() -> None:
    first, second = image_set(100).loader(7, shuffle=True), image_set(100).loader(7, shuffle=True)
    epochs = [labels_of(list(first)) for _ in range(3)]
    assert all(sorted(order) == list(range(100)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3
    second.set_epoch(2)
    assert labels_of(list(second)) == epochs[2]
    other = image_set(100).loader(7, shuffle=True, seed=1)
    assert labels_of(list(other)) != epochs[0]


def test_labels_stay_with_their_images() -> None:
    loader = image_set(60).loader(16, shuffle=True, augment=Augmentation(pad=0, flip=True))
    for images, labels in loader:
        assert torch.equal((images[:, 1, 0, 0] * 10).round().long() % 3, labels)


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(DataError, match="batch_size is 0"):
        image_set().loader(0)


def test_augmented_images_are_crops_and_mirrored_crops() -> None:
    pad, size = 2, 5
    image = torch.arange(1, 2 * size * size + 1, dtype=torch.uint8).reshape(2, size, size)
    canvas = torch.zeros(2, size + 2 * pad, size + 2 * pad, dtype=torch.uint8)
    canvas[:, pad : pad + size, pad : pad + size] = image
    possible = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = canvas[:, top : top + size, left : left + size]
            possible[crop.contiguous().numpy().tobytes()] = (top, left, False)
            possible[crop.flip(2).contiguous().numpy().tobytes()] = (top, left, True)
    batch = image.repeat(2000, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    found = [possible[i.numpy().tobytes()] for i in augmented(batch, Augmentation(pad, True), generator)]
    assert len(set(found)) == 50  # every one of 5 x 5 crops, mirrored and not
    assert 0.4 < sum(flip for _, _, flip in found) / 2000 < 0.6
    plain = [possible[i.numpy().tobytes()] for i in augmented(batch, Augmentation(pad, False), generator)]
    assert not any(flip for _, _, flip in plain)


def test_neighbouring_seeds_share_no_epoch() -> None:
    assert len({epoch_seed(seed, epoch) for seed in range(20) for epoch in range(20)}) == 400
    assert 0 <= epoch_seed(-1, 0) < 2**63
