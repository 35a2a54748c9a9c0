"""Augmentation of training images: random changes on the CPU, image by image; normalisation on the device."""

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

_NO_RECTANGLE = torch.zeros(4, dtype=torch.int64)
_MASK_64 = (1 << 64) - 1


class Augment:
    """Resize or crop an image and augment it; pixels stay 8 bits wide, for :class:`Normalise`.

    Args:
        data_config: timm's preprocessing of the model.
        settings: which augmentations are used.

    Attributes:
        bytes: size of an image that :meth:`__call__` returns.
    """

    def __init__(self, data_config: dict[str, Any], settings: AugmentSettings) -> None:
        size = tuple(data_config["input_size"][1:])
        self.bytes = 3 * size[0] * size[1]
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
        self._transform = transforms.Compose(steps)
        # timm's RandAugment draws from the generators of Python and numpy
        self._seeds_all = settings.rand_augment is not None
        self._erasing = transforms.RandomErasing(settings.erasing)

    def __call__(self, image: Image.Image, seed: int) -> tuple[Tensor, Tensor]:
        """Augment one image.

        Args:
            image: RGB.
            seed: 64 bits; it decides all random choices.

        Returns:
            Pixels (H, W, 3), uint8, and the rectangle to erase (4,), int64: top, left, height, width.
        """
        torch.default_generator.manual_seed(seed)
        if self._seeds_all:
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
        pixels = torch.from_numpy(np.array(self._transform(image)))
        return pixels, self._rectangle(pixels)

    def _rectangle(self, pixels: Tensor) -> Tensor:
        erasing = self._erasing
        if not erasing.p or torch.rand(1) >= erasing.p:
            return _NO_RECTANGLE
        view = pixels.permute(2, 0, 1)
        *rectangle, value = erasing.get_params(view, erasing.scale, erasing.ratio, [0.0])
        # torchvision returns the image itself where no rectangle fits
        return _NO_RECTANGLE if value is view else torch.tensor(rectangle)


class Normalise:
    """Normalise a batch of pixels for the model, and erase rectangles, which get the value of the mean.

    Args:
        data_config: timm's preprocessing of the model.
        settings: whether rectangles are erased.
        device: where batches are normalised.
    """

    def __init__(self, data_config: dict[str, Any], settings: AugmentSettings, device: torch.device) -> None:
        self._erases = settings.erasing > 0
        self._mean = torch.tensor(data_config["mean"], device=device).view(-1, 1, 1)
        self._std = torch.tensor(data_config["std"], device=device).view(-1, 1, 1)

    def __call__(self, pixels: Tensor, rectangles: Tensor) -> Tensor:
        """Normalise pixels (N, H, W, 3), uint8, with rectangles (N, 4), on the device.

        Returns:
            Images (N, 3, H, W), float32.
        """
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
    """64 bits for an image in an epoch: two cheap rounds of mixing with the constants of SplitMix64."""
    mixed = (seed * 0x9E3779B97F4A7C15 + sample.epoch * 0xBF58476D1CE4E5B9 + sample.row) & _MASK_64
    mixed = ((mixed ^ (mixed >> 31)) * 0x94D049BB133111EB) & _MASK_64
    return mixed ^ (mixed >> 29)
