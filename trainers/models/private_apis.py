"""The private APIs of timm and torch on which this package depends, in one place for upgrades.

Checked with timm 1.0.31 and torch 2.15.0. Each has no public counterpart:

- ``timm.models._hub.save_for_hf`` writes ``config.json`` and ``model.safetensors`` in timm's hub format;
- ``timm.models._hub.download_from_hf`` and ``load_cfg_from_json`` read the ``config.json`` of a model of the
  hub;
- ``_BatchNorm`` and ``_ConvNd`` are the base classes of all batch norms and of all convolutions of torch;
- ``_orig_mod`` is the module that ``torch.compile`` wraps.
"""

from __future__ import annotations

from timm.models._hub import download_from_hf, load_cfg_from_json, save_for_hf
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.conv import _ConvNd as AnyConvolution

__all__ = [
    "AnyBatchNorm",
    "AnyConvolution",
    "download_from_hf",
    "load_cfg_from_json",
    "save_for_hf",
    "uncompiled",
]


def uncompiled(network: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped; a module that is not compiled is returned as it is."""
    module: nn.Module = getattr(network, "_orig_mod", network)
    return module
