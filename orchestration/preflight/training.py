"""Preflight checks of training settings that need timm and torch: optimizer, augmentation, teacher."""

from __future__ import annotations

import inspect
from collections.abc import Collection

import timm
import torch
from timm.data.auto_augment import rand_augment_transform
from timm.models import is_model_pretrained
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from torch import nn

from orchestration.recipe.schema import Recipe
from pruners.errors import InputError, did_you_mean, first_line
from trainers import storage
from trainers.checkpoint.folder import check_exists, open_verified
from trainers.config.training import TrainingSettings
from trainers.loop.optimization import matching_parameters

# arguments of timm's factory that we set ourselves, or that a recipe cannot express
_OURS = frozenset({"model_or_params", "opt", "lr", "weight_decay", "layer_decay", "param_group_fn", "kwargs"})


def trainings(recipe: Recipe) -> dict[str, TrainingSettings]:
    """The trainings of a recipe by their keys, without the training for INT8."""
    structured = recipe.structured
    by_key = {
        "dense": recipe.dense,
        "structured.recovery": structured.recovery if structured else None,
        "recovery": recipe.recovery,
    }
    return {key: training for key, training in by_key.items() if training is not None}


def remarks(recipe: Recipe) -> list[str]:
    """Warnings about settings that are unexpectedly slow on this machine."""
    if recipe.resources.gpus_per_worker or _fast_in_bfloat16():
        return []
    return [
        f"{key}.precision = bfloat16: this processor has no instructions for it, float32 is many times faster"
        for key, training in trainings(recipe).items()
        if training.precision == "bfloat16"
    ]


def _fast_in_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16.

    Measured where it has none (AVX2): a step of a small ViT took 13 times as long as in float32. The call is
    private; checked with torch 2.15.0.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_training(training: TrainingSettings, prefix: str) -> None:
    """Check training settings: try the optimizer on one weight, parse the augmentation, find the teacher.

    Args:
        training: the settings.
        prefix: goes before the keys of errors, as ``recovery.``.

    Raises:
        InputError: an optimizer that timm does not have or that does not work here, an argument that it does
            not take, an unknown augmentation, a teacher that does not exist.
    """
    _check_optimizer(training, prefix)
    text = training.augment.rand_augment
    if text is not None:
        try:
            rand_augment_transform(text, {})
        except (AssertionError, ValueError, KeyError, OverflowError):
            key = f"{prefix}augment.rand_augment"
            raise InputError(key, text, "must be a RandAugment of timm, as rand-m9-mstd0.5-inc1") from None
    if training.distill is not None:
        _check_teacher(training.distill.teacher, f"{prefix}distill.teacher")


def _check_optimizer(training: TrainingSettings, prefix: str) -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    name, arguments = training.optimizer, training.optimizer_args
    settings = {"lr": training.lr.peak, "weight_decay": training.weight_decay}
    try:
        create_optimizer_v2([weight], name, **settings).step()
    except (
        Exception
    ) as error:  # optimizers raise errors of all kinds; some need closures, or packages that are missing
        known = list_optimizers()
        reason = f"no timm optimizer{did_you_mean(name, known)}" if name not in known else first_line(error)
        raise InputError(f"{prefix}optimizer", name, f"must be one that works here ({reason})") from None
    taken = _arguments_of(name)
    for key, value in arguments.items():
        if taken is not None and key not in taken:
            expected = f"{name} takes no such argument{did_you_mean(key, taken)}; it takes {', '.join(taken)}"
            raise InputError(f"{prefix}optimizer_args.{key}", value, expected)
    try:
        create_optimizer_v2([weight], name, **settings, **arguments).step()
    except Exception as error:
        expected = f"must be arguments that {name} works with ({first_line(error)})"
        raise InputError(f"{prefix}optimizer_args", arguments, expected) from None


def _arguments_of(name: str) -> list[str] | None:
    """Names of the arguments of a timm optimizer; ``None`` if it takes any.

    timm's factory silently drops some arguments that an optimizer does not take (``betas`` of SGD).
    """
    inner = name.lower().rpartition("_")[2]  # lookahead_NAME
    signature = inspect.signature(get_optimizer_class(inner, bind_defaults=False)).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.values()):
        return None
    own = [key for key in signature if key not in {"self", "params", *_OURS}]
    info = get_optimizer_info(inner)
    unused = {key for key, has in (("eps", info.has_eps), ("betas", info.has_betas)) if not has}
    general = [
        key
        for key in inspect.signature(create_optimizer_v2).parameters
        if key not in _OURS | {"momentum", "foreach"} and key not in own
    ]
    return [key for key in own if key not in unused] + general


def _check_teacher(name: str, key: str) -> None:
    if name == "dense" and key.startswith("dense."):
        raise InputError(key, name, "no model is there before it; name a teacher")
    if name == "dense" or name.startswith("hf-hub:"):
        return
    if "/" not in name and timm.is_model(name):
        if not is_model_pretrained(name):
            near = did_you_mean(name, timm.list_pretrained(f"{name.partition('.')[0]}*"))
            raise InputError(
                key, name, f"timm has no pretrained weights of it{near}, and a teacher needs some"
            )
        return
    location = storage.absolute(name, key)
    if "/" not in name and not storage.exists(location):
        near = did_you_mean(name, timm.list_models())
        raise InputError(key, name, f"must be dense, a timm model or a checkpoint folder{near}")
    check_exists(location, key=key)
    if storage.is_local(location):  # a remote folder is checked when it is fetched
        with open_verified(location, key=key):
            pass


def check_frozen(training: TrainingSettings, model: nn.Module, pruned: Collection[str], prefix: str) -> None:
    """Check that each pattern of ``freeze`` matches parameters, but no pruned ones: those must recover.

    Args:
        training: the settings.
        model: whose parameters are matched.
        pruned: names of the parameters that are pruned.
        prefix: goes before the keys of errors, as ``recovery.``.

    Raises:
        InputError: a pattern matches nothing, or a pruned parameter.
    """
    with InputError.renamed(lambda error: error.replaced(key=error.key.replace("training.", prefix))):
        matching_parameters(model, training.freeze, pruned)
