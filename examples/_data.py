"""The images of examples/train.py: scikit-learn's digits, which it ships, or MNIST from a file of the user's."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
from torch import Tensor

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Images:
    """Images (count, side, side) in [0, 1], of torch's default dtype, and their labels (count,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Images":
        return Images(self.pixels[index], self.labels[index])


def load(name: str, limit: int | None = None) -> tuple[Images, Images]:
    """The training images of a data set and its test images: a fifth, the same in every run.

    `limit` keeps that many of the training images, and of the test images at most as many.
    """
    if name == "digits":
        pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
        pixels = pixels.reshape(-1, 8, 8) / 16
    elif name == "mnist":
        pixels, labels = _read_npz("mnist10k.npz")
        pixels = pixels / 255
    else:
        raise ValueError(f"data must be 'digits' or 'mnist': got {name!r}")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    images = Images(
        torch.as_tensor(pixels, dtype=torch.get_default_dtype())[order],
        torch.as_tensor(labels, dtype=torch.int64)[order],
    )
    test, train = images[: len(images) // 5], images[len(images) // 5 :]
    return train[:limit], test[:limit]


def _read_npz(name: str) -> tuple[np.ndarray, np.ndarray]:
    path = Path(os.environ.get("PFDE_DATA", SHARED)) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: set the environment variable PFDE_DATA to the folder of {name} "
            "(arrays x: n x 28 x 28 uint8, y: n), or use --data digits, which needs no file"
        )
    with np.load(path, allow_pickle=False) as file:
        return file["x"], file["y"]
