"""Small image sets in memory: readers for the formats they come in, and batches that repeat exactly from a seed."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from qcqp_prune.errors import DataError

StrPath = str | os.PathLike[str]

_CIFAR_ROW = 1 + 3 * 32 * 32
_CIFAR_FILE_ROWS = 10_000
# The published CIFAR-10 weights of the zoo were trained with ImageNet's constants.
_CIFAR_MEAN, _CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images: a crop out of the zero-padded image, and a mirror image half of the time.

    Attributes:
        pad: zero pixels added on each side before the crop to the old size.
        flip: whether to mirror left and right with probability 1/2.
    """

    pad: int = 4
    flip: bool = True


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images held as bytes and handed out as normalised floats, `(pixel / scale - mean) / std`.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, class indices.
        classes: the names of the classes.
        mean: one for each channel, of the scaled pixels.
        std: one for each channel, of the scaled pixels.
        scale: the value of a white pixel.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index = range(len(self))[index]  # an IndexError outside, which ends a plain for loop
        return self.normalise(self.images[index : index + 1])[0], self.labels[index]

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 images (N, C, H, W) into the float32 that a network reads."""
        mean = torch.tensor(self.mean)[:, None, None]
        std = torch.tensor(self.std)[:, None, None]
        return (images.float() / self.scale - mean) / std

    def select(self, indices: Sequence[int] | NDArray[np.integer] | Tensor) -> ImageSet:
        """Return the images at `indices`, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.long)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def loader(
        self,
        batch_size: int = 128,
        *,
        shuffle: bool = False,
        augment: Augmentation | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> BatchLoader:
        """Return an iterable of batches; see `BatchLoader`."""
        return BatchLoader(self, batch_size, shuffle=shuffle, augment=augment, drop_last=drop_last, seed=seed)


class DataSplit(NamedTuple):
    """A training set and the test set that belongs to it."""

    train: ImageSet
    test: ImageSet


class BatchLoader:
    """Batches `(images, labels)` of an `ImageSet`, made whole in this process; far quicker than image by image.

    Order and augmentation of an epoch depend on the seed and the number of the epoch alone, so a run that is resumed
    sees what an uninterrupted run would have seen. Each pass counts as the next epoch; `set_epoch` chooses one.

    Args:
        dataset: where the images come from.
        batch_size: images in a batch.
        shuffle: whether each epoch has an order of its own.
        augment: random changes of the images, if any.
        drop_last: whether to leave out a last batch that is not full.
        seed: of order and augmentation.

    Raises:
        DataError: `batch_size` is not positive.
    """

    def __init__(
        self,
        dataset: ImageSet,
        batch_size: int = 128,
        *,
        shuffle: bool = False,
        augment: Augmentation | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; give a positive number.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.drop_last = drop_last
        self.seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass the one numbered `epoch`, from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self._epoch))
        self._epoch += 1
        count = len(self.dataset)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for chosen in torch.split(order, self.batch_size)[: len(self)]:
            images = self.dataset.images[chosen]
            if self.augment is not None:
                images = augmented(images, self.augment, generator)
            yield self.dataset.normalise(images), self.dataset.labels[chosen]


def augmented(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Return images (N, C, H, W), each cropped and mirrored by its own draw from `generator`."""
    count, _, height, width = images.shape
    pad = augmentation.pad
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    rows = torch.randint(2 * pad + 1, (count, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(2 * pad + 1, (count, 1), generator=generator) + torch.arange(width)
    if augmentation.flip:
        mirrored = torch.rand((count, 1), generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    # One gather does both; it puts the channels last: (N, H, W, C).
    cut = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()


def epoch_seed(seed: int, epoch: int) -> int:
    """Return one 63-bit seed for a pair, so that neighbouring seeds and epochs share no random stream."""
    return int(np.random.SeedSequence((seed % 2**64, epoch)).generate_state(1, np.uint64)[0] >> 1)


def seed_epoch(loader: Any, seed: int, epoch: int) -> None:
    """Make what an epoch draws depend on `(seed, epoch)` alone, whatever ran before it."""
    value = epoch_seed(seed, epoch)
    torch.manual_seed(value)
    sampler = getattr(loader, "sampler", None)
    for owner in (loader, sampler, getattr(loader, "batch_sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(value)
        if callable(set_epoch := getattr(owner, "set_epoch", None)):
            set_epoch(epoch)


def cifar10(root: StrPath) -> DataSplit:
    """Read CIFAR-10 from `cifar-10-batches-bin`.

    Args:
        root: that folder, or the folder it lies in.

    Raises:
        DataError: a file is missing, truncated or corrupt.

    References:
        Krizhevsky: Learning multiple layers of features from tiny images, 2009;
        https://www.cs.toronto.edu/~kriz/cifar.html, "binary version".
    """
    inner = Path(root) / "cifar-10-batches-bin"
    folder = inner if inner.is_dir() else Path(root)
    names = folder / "batches.meta.txt"
    if not names.is_file():
        raise DataError(
            f"There is no {names}. Give the folder that holds cifar-10-batches-bin, the binary version of CIFAR-10."
        )
    classes = tuple(names.read_text(encoding="utf-8").split())
    if len(classes) != 10:
        raise DataError(f"{names} names {len(classes)} classes where 10 belong. Unpack the archive again.")

    def part(files: Sequence[str]) -> ImageSet:
        read = [read_cifar10_batch(folder / file) for file in files]
        for file, (_, labels) in zip(files, read, strict=True):
            if len(labels) != _CIFAR_FILE_ROWS:
                raise DataError(
                    f"{folder / file} holds {len(labels)} images where {_CIFAR_FILE_ROWS} belong. "
                    "Unpack the archive again."
                )
        images = np.concatenate([images for images, _ in read])
        labels = np.concatenate([labels for _, labels in read])
        return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), classes, _CIFAR_MEAN, _CIFAR_STD)

    return DataSplit(part([f"data_batch_{i}.bin" for i in range(1, 6)]), part(["test_batch.bin"]))


def read_cifar10_batch(path: StrPath) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read one file of CIFAR-10's binary version: a label byte and 3,072 bytes of RGB planes for each image.

    Returns:
        images (N, 3, 32, 32) uint8 and labels (N,) int64.

    Raises:
        DataError: the file is missing, not a whole number of images long, or holds a label above 9.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"There is no file {file}. Unpack the binary version of CIFAR-10 there.")
    content = np.frombuffer(file.read_bytes(), np.uint8)
    if content.size == 0 or content.size % _CIFAR_ROW:
        raise DataError(
            f"{file} is {content.size} bytes long, not a multiple of {_CIFAR_ROW}: it is truncated or of another "
            "format. Unpack the binary version of CIFAR-10 again."
        )
    rows = content.reshape(-1, _CIFAR_ROW)
    labels = rows[:, 0].astype(np.int64)
    if labels.max() > 9:
        raise DataError(f"{file} holds the label {labels.max()}, above 9: it is corrupt. Unpack it again.")
    return rows[:, 1:].reshape(-1, 3, 32, 32).copy(), labels


def mnist(root: StrPath) -> DataSplit:
    """Read MNIST from its four idx files in `root`, or in `root/mnist`; raises `DataError` as `read_idx` does."""
    return _idx_split(root, "mnist", tuple("0123456789"), 0.1307, 0.3081)


def fashion_mnist(root: StrPath) -> DataSplit:
    """Read Fashion-MNIST from its four idx files in `root`, or in `root/fashion_mnist`.

    Raises:
        DataError: a file is missing, truncated or corrupt.

    References:
        Xiao, Rasul, Vollgraf: Fashion-MNIST, arXiv 1708.07747.
    """
    classes = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Boot",
    )
    return _idx_split(root, "fashion_mnist", classes, 0.2860, 0.3530)


def read_idx(path: StrPath) -> NDArray[np.generic]:
    """Read an idx file, compressed where its name ends in `.gz`.

    Where `path` is missing, the same name with or without `.gz` is tried.

    Returns:
        the array, of the shape and type that the file's header gives, in the machine's byte order.

    Raises:
        DataError: the file is missing, truncated, corrupt, or not an idx file.

    References:
        LeCun, Cortes, Burges: The MNIST database, section "file formats".
    """
    file = _with_or_without_gz(Path(path))
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file} is not a whole gzip file ({error}). Fetch it again.") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_TYPES or not content[3]:
        raise DataError(f"{file} does not begin like an idx file. Fetch it again, or give the right file.")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{file} ends within its header. Fetch it again.")
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4"))
    dtype = np.dtype(_IDX_TYPES[content[2]])
    # Python integers: the product of a corrupt header's sizes may not fit 64 bits.
    wanted = dtype.itemsize
    for size in shape:
        wanted *= size
    if len(content) - start != wanted:
        raise DataError(
            f"{file} holds {len(content) - start} bytes of data where its header, {shape}, asks for {wanted}: "
            "it is truncated or corrupt. Fetch it again."
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def digits(*, test_fraction: float = 0.2, seed: int = 0) -> DataSplit:
    """Return scikit-learn's 1,797 handwritten digits, 8 x 8 pixels of 17 shades; no file or network is needed.

    Args:
        test_fraction: share of each class that goes into the test set, rounded down.
        seed: of the choice.

    Raises:
        DataError: scikit-learn is not installed, or `test_fraction` is not between 0 and 1.

    References:
        Alpaydin, Kaynak: Optical recognition of handwritten digits, UCI machine learning repository, 1998.
    """
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction is {test_fraction}; give a number between 0 and 1.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("The digits come with scikit-learn. Install it: pip install scikit-learn.") from error
    pixels, labels = load_digits(return_X_y=True)
    labels = labels.astype(np.int64)
    images = torch.from_numpy(pixels.astype(np.uint8).reshape(-1, 1, 8, 8))
    scaled = pixels / 16
    whole = ImageSet(
        images,
        torch.from_numpy(labels),
        tuple("0123456789"),
        (round(float(scaled.mean()), 4),),
        (round(float(scaled.std()), 4),),
        16.0,
    )
    generator = np.random.default_rng(seed)
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = generator.permutation(np.flatnonzero(labels == digit))
        test[members[: int(test_fraction * len(members))]] = True
    return DataSplit(whole.select(np.flatnonzero(~test)), whole.select(np.flatnonzero(test)))


def _idx_split(root: StrPath, name: str, classes: tuple[str, ...], mean: float, std: float) -> DataSplit:
    inner = Path(root) / name
    folder = inner if inner.is_dir() else Path(root)

    def part(prefix: str) -> ImageSet:
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        if images.ndim != 3 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise DataError(
                f"The {prefix} files in {folder} do not belong together: images {images.shape} of {images.dtype}, "
                f"labels {labels.shape}. Fetch all four files again."
            )
        if not len(labels) or int(labels.max()) >= len(classes):
            raise DataError(f"The {prefix} labels in {folder} are empty or above 9. Fetch the files again.")
        return ImageSet(
            torch.from_numpy(images[:, None]),
            torch.from_numpy(labels.astype(np.int64)),
            classes,
            (mean,),
            (std,),
        )

    return DataSplit(part("train"), part("t10k"))


def _with_or_without_gz(file: Path) -> Path:
    other = file.with_suffix("") if file.suffix == ".gz" else file.with_name(file.name + ".gz")
    for candidate in (file, other):
        if candidate.is_file():
            return candidate
    raise DataError(f"There is neither {file} nor {other.name}. Put one of them there.")
