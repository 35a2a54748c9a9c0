"""The prunable layers of a model, and the module and stage of each.

A *layer* is one weight tensor. Its *module* is its function in the network (QKV-M, PRJ-M and MLP-M in DIMAP;
everything else is AUX-M there and stays dense). Its *stage* is the level of a hierarchical model in which it
lies.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from pruners.errors import InputError, did_you_mean
from pruners.model.families import ATTENTION, Family, family_of

ISOTROPIC_STAGES = 4
_WEIGHT = re.compile(r"[._]weight$")  # nn.MultiheadAttention has an ``in_proj_weight``
_PARAMETRIZED = re.compile(r"^(.*?)parametrizations\.(\w+)\.original\d*$")
_REPARAMETRIZED = re.compile(r"^(.*[._]weight)_(?:orig|[gv])$")  # by the older hooks of torch.nn.utils
_IN_ATTENTION = re.compile(rf"^(?:.*\.)?{ATTENTION}(?=\.)")
_ATTENTION_CLASS = re.compile(r"Attention|Attn|MHSA|XCA")
# A list of stages, or one of lists of blocks: ``layers.0.blocks.1.``, ``layer1.0.``, ``blocks.0.1.``.
_STAGE = re.compile(
    r"(?:^|\.)(?:\w+_)?(?:stages?|levels|(?:layers?|blocks|transformers|network)"
    r"(?=[._]?\d+\.(?:\w*blocks\.)?\d+\.))[._]?(\d+)\."
)
_BLOCK = re.compile(r"(?:^|\.)\w*(?:blocks?|layers?)[._](\d+)\.")


@dataclass(frozen=True)
class PrunableLayer:
    """One weight tensor that may be pruned.

    Attributes:
        name: its parameter name in the model.
        module: its function in the network, ``QKV``, ``PRJ``, ``MLP`` or another group of layers.
        stage: the level of a hierarchical model in which it lies, from 0.
        shape: of the tensor: (out, in) of a linear layer, (out, in, height, width) of a convolution.
    """

    name: str
    module: str
    stage: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def find_layers(model: nn.Module, patterns: Mapping[str, Sequence[str]] | None = None) -> list[PrunableLayer]:
    """List the prunable layers of a model, in the order of its parameters.

    Stages are numbered from 0. The blocks of an isotropic model are divided into four equal groups.

    >>> find_layers(model)[0]
    PrunableLayer(name='blocks.0.attn.qkv.weight', module='QKV', stage=0, shape=(48, 16))
    >>> [layer.name for layer in find_layers(model, {"MLP": [r"mlp\\.fc1"]})]
    ['blocks.0.mlp.fc1.weight', 'blocks.1.mlp.fc1.weight']

    Args:
        model: the model, on any device, the meta device too.
        patterns: for each module's name regular expressions on the end of a layer's name, without
            ``.weight`` or ``_weight``: ``{"QKV": [r"attn\\.qkv"], "MLP": [r"mlp\\.fc\\d"]}``. By default the
            family of the model decides (:mod:`pruners.model.families`).

    Returns:
        The layers that are matched.

    Raises:
        InputError: a pattern is no regular expression or matches nothing, or patterns of two modules match
            the same layer; a matched weight is shared with another layer, or computed from other
            parameters; without ``patterns``, no name is known, or a part of a block has an unknown name.
    """
    weights, computed = _weights(model)
    if patterns is None:
        family = family_of(model)
        module_of = _match(family.patterns, _not_dense(weights, family))
        if module_of or family.classes:
            _refuse_unknown(model, family, weights, module_of)
        if next(iter(family.patterns)) not in module_of.values():
            expected = "has no attention and MLP weights by the usual names: give patterns of its own"
            raise InputError("layers", type(model).__name__, expected)
    else:
        module_of = _match(patterns, list(weights), each=True)
    for name, parameter in computed.items():
        if name in module_of:
            raise InputError("layers", parameter, f"{name} is computed from it, and cannot be pruned")
    _refuse_shared(model, module_of)
    names = [name for name in weights if name in module_of]
    stages = _stages(names)
    return [PrunableLayer(name, module_of[name], stages[name], weights[name]) for name in names]


def weights_of(model: nn.Module) -> dict[str, int]:
    """Number of entries of every weight that a pattern can name, by parameter name; tied weights once."""
    computed = _weights(model)[1]
    return {
        name: value.numel()
        for name, value in model.named_parameters()
        if value.ndim >= 2 and _WEIGHT.search(name) and name not in computed
    }


def _weights(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The weights of a model by the names that patterns match.

    Returns:
        Shapes by weight name, and for weights that are computed from a parameter (by a parametrisation)
        the name of that parameter.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    computed: dict[str, str] = {}
    for parameter, value in model.named_parameters(remove_duplicate=False):
        match = _PARAMETRIZED.match(parameter) or _REPARAMETRIZED.match(parameter)
        name = "".join(match.groups()) if match else parameter
        if value.ndim >= 2 and _WEIGHT.search(name):
            shapes[name] = tuple(value.shape)
            if match:
                computed[name] = parameter
    return shapes, computed


def _match(
    patterns: Mapping[str, Sequence[str]], names: Sequence[str], *, each: bool = False
) -> dict[str, str]:
    """The module of each matched name. With ``each``, every pattern must match at least one name."""
    module_of: dict[str, str] = {}
    for module, expressions in patterns.items():
        for expression in expressions:
            key = f"layers.{module}"
            matched = matching(key, expression, names)
            if each and not matched:
                known = "must match at least one weight of the model"
                raise InputError(key, expression, known + _closest(expression, names))
            for name in matched:
                if module_of.setdefault(name, module) != module:
                    raise InputError(key, expression, f"{name} already belongs to {module_of[name]}")
    return module_of


def has_attention(model: nn.Module) -> bool:
    """Return whether a model has an attention layer."""
    return any(_ATTENTION_CLASS.search(type(module).__name__) for module in model.modules())


def stem(name: str) -> str:
    """A layer's name as patterns match it: the parameter name without ``.weight`` or ``_weight``."""
    return _WEIGHT.sub("", name)


def matching(key: str, expression: str, names: Iterable[str]) -> list[str]:
    """Match the names of layers by a regular expression.

    Args:
        key: what to call the expression in an error.
        expression: matches whole trailing parts of a name, so ``fc1`` matches ``mlp.fc1`` but not ``xfc1``.
        names: parameter names.

    Returns:
        The names that are matched, in their order.

    Raises:
        InputError: ``expression`` is no regular expression.
    """
    try:
        compiled = re.compile(rf"(?:^|\.)(?:{expression})$")
    except re.error as error:
        raise InputError(key, expression, f"must be a regular expression ({error})") from None
    return [name for name in names if compiled.search(stem(name))]


def _closest(expression: str, names: Iterable[str]) -> str:
    tails = {".".join(stem(name).split(".")[-2:]) for name in names}
    return did_you_mean(expression.replace("\\", ""), sorted(tails))


def _not_dense(names: Iterable[str], family: Family) -> list[str]:
    dense = {name for expression in family.dense for name in matching("dense", expression, names)}
    return [name for name in names if name not in dense]


def _refuse_unknown(
    model: nn.Module, family: Family, names: Iterable[str], module_of: Mapping[str, str]
) -> None:
    """Raise an error if a part of a block has an unknown name.

    Otherwise one half of an attention could be pruned and the other half stay dense, unnoticed.
    """
    inside = re.compile(family.inside)
    attentions = tuple(
        f"{path}."
        for path, module in model.named_modules()
        if path and _ATTENTION_CLASS.search(type(module).__name__)
    )
    for name in _not_dense(names, family):
        if name not in module_of and (inside.search(stem(name)) or name.startswith(attentions)):
            expected = "lies in a block, an attention or an MLP, but is not known by its name: give patterns"
            raise InputError("layers", name, expected)
    attentions_with: dict[str, set[str]] = {"QKV": set(), "PRJ": set()}
    for name, kind in module_of.items():
        if kind in attentions_with and (attention := _IN_ATTENTION.match(name)):
            attentions_with[kind].add(attention[0])
    for attention_path in sorted(attentions_with["PRJ"] - attentions_with["QKV"]):
        expected = "has a projection, but no query, key and value known by their names: give patterns"
        raise InputError("layers", attention_path, expected)


def _refuse_shared(model: nn.Module, module_of: Mapping[str, str]) -> None:
    """Raise an error if a matched weight is tied: it would be pruned for one of its two uses only."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        if first != name and (name in module_of or first in module_of):
            raise InputError("layers", name, f"shares its weight with {first}; tied weights cannot be pruned")


def _stages(names: Sequence[str]) -> dict[str, int]:
    """The stage of each layer, by parameter name."""
    stage_of = _indices(names, _STAGE)
    if not stage_of:  # isotropic: equal groups of blocks
        blocks = _indices(names, _BLOCK)
        depth = max(blocks.values(), default=0) + 1
        groups = min(ISOTROPIC_STAGES, depth)
        stage_of = {name: block * groups // depth for name, block in blocks.items()}
    current = next(iter(stage_of.values()), 0)
    for name in names:  # layers outside stages and blocks (a stem, a last convolution) join their neighbour
        current = stage_of.setdefault(name, current)
    renumbered = {stage: number for number, stage in enumerate(sorted(set(stage_of.values())))}
    return {name: renumbered[stage] for name, stage in stage_of.items()}


def _indices(names: Sequence[str], pattern: re.Pattern[str]) -> dict[str, int]:
    """The index of each name in the module list that holds most of them; other names have none."""
    lists = Counter(name[: match.start(1)] for name in names if (match := pattern.search(name)))
    if not lists:
        return {}
    index = re.compile(rf"{re.escape(lists.most_common(1)[0][0])}(\d+)\.")
    return {name: int(match[1]) for name in names if (match := index.match(name))}
