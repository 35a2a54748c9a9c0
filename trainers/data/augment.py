"""Training images: what is drawn for each picture, and what is reckoned for a whole batch on the device."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision import transforms

from trainers.config.training import AugmentSettings
from trainers.data.sampler import Sample

_NOTHING = torch.zeros(4, dtype=torch.int64)
_BITS = (1 << 64) - 1


class Augment:
    """Resize or crop, augment; pixels stay 8 bits wide, and :class:`Normalise` takes them from there.

    Args:
        data_config: timm's preprocessing of the model.
    """

    def __init__(self, data_config: dict[str, Any], settings: AugmentSettings) -> None:
        size = tuple(data_config["input_size"][1:])
        self.bytes = 3 * size[0] * size[1]  # of an image as it is handed on
        steps: list[Any] = []
        if settings.scale is not None:
            bicubic = transforms.InterpolationMode.BICUBIC
            steps.append(transforms.RandomResizedCrop(size, scale=settings.scale, interpolation=bicubic))
        else:
            steps.append(transforms.Resize(size))
        if settings.shift:
            steps.append(transforms.RandomCrop(size, padding=settings.shift))
        if settings.flip:
            steps.append(transforms.RandomHorizontalFlip(settings.flip))
        if settings.rand_augment is not None:
            fill = tuple(round(255 * channel) for channel in data_config["mean"])
            steps.append(rand_augment_transform(settings.rand_augment, {"img_mean": fill}))
        self._picture = transforms.Compose(steps)
        self._draws_elsewhere = settings.rand_augment is not None  # timm's draws from python and numpy
        self._erasing = transforms.RandomErasing(settings.erasing)

    def __call__(self, image: Image.Image, seed: int) -> tuple[Tensor, Tensor]:
        """Pixels (H, W, 3) of 8 bits, and the rectangle to erase: top, left, height, width.

        Args:
            seed: of 64 bits; all that is drawn follows from it.
        """
        torch.default_generator.manual_seed(seed)
        if self._draws_elsewhere:
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
        pixels = torch.from_numpy(np.array(self._picture(image)))
        return pixels, self._rectangle(pixels)

    def _rectangle(self, pixels: Tensor) -> Tensor:
        erasing = self._erasing
        if not erasing.p or torch.rand(1) >= erasing.p:
            return _NOTHING
        view = pixels.permute(2, 0, 1)
        *rectangle, value = erasing.get_params(view, erasing.scale, erasing.ratio, [0.0])
        return _NOTHING if value is view else torch.tensor(rectangle)  # no place was found


class Normalise:
    """A batch of pixels as the model takes them; what is erased has the mean's value."""

    def __init__(self, data_config: dict[str, Any], settings: AugmentSettings, device: torch.device) -> None:
        self._erases = settings.erasing > 0
        self._mean = torch.tensor(data_config["mean"], device=device).view(-1, 1, 1)
        self._std = torch.tensor(data_config["std"], device=device).view(-1, 1, 1)

    def __call__(self, pixels: Tensor, rectangles: Tensor) -> Tensor:
        """Images (N, 3, H, W) of pixels (N, H, W, 3) and their rectangles (N, 4), on the device."""
        images = pixels.permute(0, 3, 1, 2).contiguous().float().div_(255).sub_(self._mean).div_(self._std)
        return self._erased(images, rectangles) if self._erases else images

    @staticmethod
    def _erased(images: Tensor, rectangles: Tensor) -> Tensor:
        top, left, height, width = rectangles.unsqueeze(-1).unbind(1)
        rows = torch.arange(images.shape[2], device=images.device)
        columns = torch.arange(images.shape[3], device=images.device)
        down, across = (rows >= top) & (rows < top + height), (columns >= left) & (columns < left + width)
        return images.masked_fill_(down[:, None, :, None] & across[:, None, None, :], 0.0)


def sample_seed(seed: int, sample: Sample) -> int:
    """64 bits for an image in an epoch. Two cheap mixes, as it is done for each image."""
    mixed = (seed * 0x9E3779B97F4A7C15 + sample.epoch * 0xBF58476D1CE4E5B9 + sample.row) & _BITS
    mixed = ((mixed ^ (mixed >> 31)) * 0x94D049BB133111EB) & _BITS
    return mixed ^ (mixed >> 29)
