"""Makes the samples of pretrain_mae.py: crops of pictures, with noise that masks them.

Each sample is made from a seed and a number.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from megatron_moa.errors import UserError, one_line

PROGRAM = "pretrain_mae.py"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels
FEW = 20  # pictures: with fewer, a part of each is held out instead of some pictures


def packaged_pictures() -> list[Path]:
    """The photographs that scikit-learn and matplotlib bring along; [] without them."""
    wanted = {
        "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
        "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    }
    found = {package: find_spec(package) for package in wanted}
    paths = [
        Path(found[package].origin).parent / name for package in wanted if found[package] for name in wanted[package]
    ]
    return [path for path in paths if path.is_file()]


def list_pictures(flag: str, folder: Path) -> list[Path]:
    """All pictures below a folder, in the order of their names."""
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: not a folder; name one with pictures, at any depth")
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
    if not pictures:
        raise UserError(f"{flag} {folder}: has no pictures ({' '.join(IMG_EXTENSIONS)}); name a folder that has")
    return pictures


@dataclass(frozen=True)
class Pictures:
    """Files, and from where to where of each picture's width crops are taken."""

    files: Sequence[Path]
    part: tuple[float, float] = (0.0, 1.0)

    def describe(self) -> str:
        """How many, and a hash of their names: tells whether they are the same, wherever the folder lies."""
        root = os.path.commonpath([path.parent for path in self.files])
        names = "\n".join(path.relative_to(root).as_posix() for path in self.files)
        return f"{len(self.files)} pictures ({hashlib.sha256(names.encode()).hexdigest()[:8]})"


def split_pictures(data: Path | None, val_data: Path | None) -> tuple[Pictures, Pictures]:
    """The pictures to train on and those to validate on.

    Without a folder to validate on, 1 of 20 pictures is held out; with fewer than 20, each picture's right quarter.

    Raises:
        UserError: a folder that is none, or has no pictures.
    """
    files = list_pictures("--data", data) if data else packaged_pictures()
    if not files:
        raise UserError(
            "--data: neither scikit-learn nor matplotlib is here to lend pictures; name a folder of pictures"
        )
    if val_data:
        return Pictures(files), Pictures(list_pictures("--val-data", val_data))
    if len(files) >= FEW:
        return Pictures([file for index, file in enumerate(files) if index % FEW]), Pictures(files[::FEW])
    return Pictures(files, (0.0, 0.75)), Pictures(files, (0.75, 1.0))


@functools.lru_cache(maxsize=FEW)
def decode(path: str) -> Image.Image:
    """A picture in RGB; of a few pictures none is decoded twice."""
    with Image.open(path) as image:
        return image.convert("RGB")


@functools.lru_cache(maxsize=2)
def order_of_epoch(seed: int, stream: int, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch goes through so many pictures."""
    return np.random.default_rng([seed, stream, epoch]).permutation(count)


class Crops(Dataset):
    """Gives endless samples: pixels of a crop, and the noise that masks the crop.

    Pixels are [3, s, s], scaled to ImageNet's mean and variance; noise is [patches] in [0, 1).

    Args:
        size: s, the pixels of a crop's side.
        patches: into which a crop will be cut.
        stream: 0 for training, 1 for validation: other draws for the same seed.
    """

    def __init__(self, pictures: Pictures, size: int, patches: int, seed: int, stream: int) -> None:
        self.names = np.array([str(file) for file in pictures.files])  # no list: each worker would copy its objects
        self.part, self.patches, self.seed, self.stream = pictures.part, patches, seed, stream
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | UserError:
        """Returns sample ``number`` of the run, or an error for a picture that cannot be read.

        The error is returned, since a worker's exception would arrive as a traceback.
        """
        epoch, position = divmod(number, len(self.names))
        name = str(self.names[order_of_epoch(self.seed, self.stream, epoch, len(self.names))[position]])
        try:
            image = decode(name)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return UserError(f"{name}: cannot be read as a picture ({one_line(error)}); repair or remove the file")
        left, right = (round(edge * image.width) for edge in self.part)
        draws = np.random.SeedSequence([self.seed, self.stream, number]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(draws[0]))
            noise = torch.rand(self.patches)
            return self.transform(image.crop((left, 0, right, image.height))), noise


def collate(samples: list[tuple[Tensor, Tensor] | UserError]) -> list[Tensor] | UserError:
    """Stacks samples into pixels [b, 3, s, s] and noise [b, patches].

    If there are errors among the samples, the first of them is returned instead.
    """
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    return errors[0] if errors else default_collate(samples)


def batches(crops: Crops, numbers: Sequence[range], workers: int, device: torch.device) -> Iterator[list[Tensor]]:
    """For each range of sample numbers their pixels [b, 3, s, s] and noise [b, patches], on the device."""
    loader = DataLoader(
        crops, batch_sampler=numbers, num_workers=workers, collate_fn=collate, pin_memory=device.type == "cuda"
    )
    for batch in loader:
        if isinstance(batch, UserError):  # of one rank, which may not be the first
            print(f"{PROGRAM}: error: {batch}", file=sys.stderr, flush=True)
            raise SystemExit(2)
        yield [tensor.to(device, non_blocking=True) for tensor in batch]
