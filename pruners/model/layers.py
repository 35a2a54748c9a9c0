"""Which weights of a model are prunable, and each one's module and stage.

A *layer* is one weight tensor. Its *module* is its function in the whole network (DIMAP's QKV-M, PRJ-M,
MLP-M; all else is AUX-M and stays dense), its *stage* the level of a hierarchical model it lies in.
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
_WEIGHT = re.compile(r"[._]weight$")  # nn.MultiheadAttention calls its own ``in_proj_weight``
_PARAMETRIZED = re.compile(r"^(.*?)parametrizations\.(\w+)\.original\d*$")
_REPARAMETRIZED = re.compile(r"^(.*[._]weight)_(?:orig|[gv])$")  # the hooks of torch.nn.utils, before that
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
    """One weight tensor that may be pruned; ``name`` is its parameter name in the model."""

    name: str
    module: str
    stage: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def find_layers(model: nn.Module, patterns: Mapping[str, Sequence[str]] | None = None) -> list[PrunableLayer]:
    """List the prunable layers of ``model``, in the order of its parameters.

    ``patterns`` maps a module's name to regular expressions on the trailing part of a layer's name without
    ``.weight`` or ``_weight`` (``attn\\.qkv``, ``mlp\\.fc\\d``); without it the model's family says what is
    taken (:mod:`pruners.model.families`). Stages are numbered from 0; an isotropic model's blocks are cut
    into four equal groups.

    Raises:
        InputError: a pattern is no regular expression, matches nothing, or two match the same layer; a
            matched weight is shared with another layer, or computed from other parameters; without
            ``patterns``: nothing is known by its name, or a part of a block is not.
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
    """Sizes of all weights that patterns could name, by their parameters' names; tied ones once."""
    computed = _weights(model)[1]
    return {
        name: value.numel()
        for name, value in model.named_parameters()
        if value.ndim >= 2 and _WEIGHT.search(name) and name not in computed
    }


def _weights(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of the weights that a pattern may take, and of which parameter those are made that are none."""
    shapes: dict[str, tuple[int, ...]] = {}
    computed: dict[str, str] = {}
    for parameter, value in model.named_parameters(remove_duplicate=False):
        made = _PARAMETRIZED.match(parameter) or _REPARAMETRIZED.match(parameter)
        name = "".join(made.groups()) if made else parameter
        if value.ndim >= 2 and _WEIGHT.search(name):
            shapes[name] = tuple(value.shape)
            if made:
                computed[name] = parameter
    return shapes, computed


def _match(
    patterns: Mapping[str, Sequence[str]], names: Sequence[str], *, each: bool = False
) -> dict[str, str]:
    """The module of each matched name; with ``each``, every pattern must match."""
    module_of: dict[str, str] = {}
    for module, expressions in patterns.items():
        for expression in expressions:
            key = f"layers.{module}"
            matched = _matching(key, expression, names)
            if each and not matched:
                known = "must match at least one weight of the model"
                raise InputError(key, expression, known + _closest(expression, names))
            for name in matched:
                if module_of.setdefault(name, module) != module:
                    raise InputError(key, expression, f"{name} already belongs to {module_of[name]}")
    return module_of


def has_attention(model: nn.Module) -> bool:
    """Whether a model is a transformer, or has some attention in it."""
    return any(_ATTENTION_CLASS.search(type(part).__name__) for part in model.modules())


def stem(name: str) -> str:
    """A layer's name as patterns read it."""
    return _WEIGHT.sub("", name)


def _matching(key: str, expression: str, names: Iterable[str]) -> list[str]:
    try:
        compiled = re.compile(rf"(?:^|\.)(?:{expression})$")
    except re.error as error:
        raise InputError(key, expression, f"must be a regular expression ({error})") from None
    return [name for name in names if compiled.search(stem(name))]


def _closest(expression: str, names: Iterable[str]) -> str:
    tails = {".".join(stem(name).split(".")[-2:]) for name in names}
    return did_you_mean(expression.replace("\\", ""), sorted(tails))


def _not_dense(names: Iterable[str], family: Family) -> list[str]:
    dense = {name for expression in family.dense for name in _matching("dense", expression, names)}
    return [name for name in names if name not in dense]


def _refuse_unknown(
    model: nn.Module, family: Family, names: Iterable[str], module_of: Mapping[str, str]
) -> None:
    """An attention of which one half is pruned and the other left out by its name was nobody's wish."""
    inside = re.compile(family.inside)
    attentions = tuple(
        f"{path}."
        for path, part in model.named_modules()
        if path and _ATTENTION_CLASS.search(type(part).__name__)
    )
    for name in _not_dense(names, family):
        if name not in module_of and (inside.search(stem(name)) or name.startswith(attentions)):
            expected = "lies in a block, an attention or an MLP, but is not known by its name: give patterns"
            raise InputError("layers", name, expected)
    found: dict[str, set[str]] = {"QKV": set(), "PRJ": set()}
    for name, module in module_of.items():
        if module in found and (attention := _IN_ATTENTION.match(name)):
            found[module].add(attention[0])
    for attention_path in sorted(found["PRJ"] - found["QKV"]):
        expected = "has a projection, but no query, key and value known by their names: give patterns"
        raise InputError("layers", attention_path, expected)


def _refuse_shared(model: nn.Module, module_of: Mapping[str, str]) -> None:
    """A weight used in two places would be pruned for one of them only: name it instead."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        if first != name and (name in module_of or first in module_of):
            raise InputError("layers", name, f"shares its weight with {first}; tied weights cannot be pruned")


def _stages(names: Sequence[str]) -> dict[str, int]:
    found = _indices(names, _STAGE)
    if not found:  # isotropic: equal groups of blocks
        blocks = _indices(names, _BLOCK)
        depth = max(blocks.values(), default=0) + 1
        groups = min(ISOTROPIC_STAGES, depth)
        found = {name: block * groups // depth for name, block in blocks.items()}
    current = next(iter(found.values()), 0)
    for name in names:  # what lies outside stages and blocks (a stem, a last convolution) joins its neighbour
        current = found.setdefault(name, current)
    renumbered = {stage: number for number, stage in enumerate(sorted(set(found.values())))}
    return {name: renumbered[stage] for name, stage in found.items()}


def _indices(names: Sequence[str], place: re.Pattern[str]) -> dict[str, int]:
    """Each name's index in the list in which most of them lie; names outside it have none."""
    lists = Counter(name[: match.start(1)] for name in names if (match := place.search(name)))
    if not lists:
        return {}
    index = re.compile(rf"{re.escape(lists.most_common(1)[0][0])}(\d+)\.")
    return {name: int(match[1]) for name in names if (match := index.match(name))}
