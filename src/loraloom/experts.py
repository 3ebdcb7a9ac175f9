"""Expert parameters (PEFT's ``target_parameters``) and grouped convolutions: one module per expert or group.

PEFT keeps the factors of all E experts of a 3-D parameter in one pair: A is (E r) x in, the rows of one expert
together; B is out x (r E), the experts varying fastest. Here expert 3 of 8 is the module ``...mlp.experts[3/8]`` with
factors of its own, so that every operator is right for every expert. When several parameters of one module are adapted,
PEFT names all but the last ``...experts.base_layer``; so do we.

A convolution of g groups has one A that sees all input, and a grouped B: the update of group j of the output is
``B_j A_j``, with r / g rows of A. Group 3 of 4 is the module ``...conv[3/4]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loraloom.adapter import Adapter, Factors, Shape, padded
from loraloom.modalities import packed_modalities
from loraloom.untrusted import expression

_PART = re.compile(r"\[[^\[\]]+\]$")  # of several modules that are stored as one
_EXPERT = re.compile(r"(?P<owner>.+)\[(?P<at>\d+)/(?P<of>\d+)\]")


@dataclass(frozen=True, eq=False)
class Grouped(Factors):
    """All groups of a convolution, as PEFT stores them: B is out x (r / groups)."""

    def __post_init__(self) -> None:
        pass


def owner_of(name: str) -> str:
    """The module path under which PEFT stores a module.

    Example:
        >>> owner_of("layers.0.mlp.experts[3/8]"), owner_of("layers.0.q_proj")
        ('layers.0.mlp.experts', 'layers.0.q_proj')
    """
    return _PART.sub("", name)


def parameters_of(config: Mapping[str, Any], name: str) -> set[str]:
    """Which parameters of a module ``target_parameters`` names.

    Example:
        >>> parameters_of({"target_parameters": ["mlp.experts.gate_up_proj"]}, "layers.0.mlp.experts.base_layer")
        {'gate_up_proj'}
    """
    path = re.sub(r"(\.base_layer)+$", "", name)
    named = [str(parameter).rpartition(".") for parameter in config.get("target_parameters") or ()]
    return {leaf for owner, _, leaf in named if path == owner or path.endswith("." + owner)}


def with_owners(config: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The configuration with the modules of its ``target_parameters``: PEFT takes a bare name for that of any module.

    Args:
        config: the adapter's configuration.
        names: of its modules; those that ``target_modules`` does not select are of parameters.

    Example:
        >>> told = {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]}
        >>> with_owners(told, ["0.q_proj", "0.experts"])["target_parameters"]
        ['experts.down_proj']
    """
    told = config.get("target_parameters")
    if not isinstance(told, list | set) or all("." in str(parameter) for parameter in told):
        return config
    targets = config.get("target_modules") or []
    owners = dict.fromkeys(re.sub(r"(\.base_layer)+$", "", name) for name in names)
    if isinstance(targets, str):
        selects = expression(rf"(?:{targets})\Z")
    else:
        selects = expression(rf"(.*\.)?({'|'.join(re.escape(str(one)) for one in targets)})\Z")
    last = dict.fromkeys(name.rpartition(".")[2] for name in owners if not selects(name))
    named = [[one] if "." in one else [f"{name}.{one}" for name in last] for one in map(str, told)]
    return {**config, "target_parameters": list(dict.fromkeys(path for each in named for path in each))}


def holds_experts(config: Mapping[str, Any], name: str) -> bool:
    """Whether a module path is that of a module of whose parameters ``target_parameters`` names some.

    Example:
        >>> holds_experts({"target_parameters": ["mlp.experts.gate_up_proj"]}, "layers.0.mlp.experts.base_layer")
        True
    """
    return bool(parameters_of(config, name))


def all_parameters(adapters: Sequence[Adapter]) -> list[str]:
    """The ``target_parameters`` of several adapters, together."""
    return list(dict.fromkeys(path for one in adapters for path in one.config.get("target_parameters") or ()))


def names_of(owner: str, experts: int) -> list[str]:
    """The modules of the experts of one parameter.

    Example:
        >>> names_of("mlp.experts", 2)
        ['mlp.experts[0/2]', 'mlp.experts[1/2]']
    """
    return [f"{owner}[{at}/{experts}]" for at in range(experts)]


def groups_of(a: Sequence[int], b: Sequence[int]) -> int:
    """Groups of a convolution whose factors are stored in these sizes; 1 for all else.

    Example:
        >>> groups_of((4, 8, 3, 3), (6, 2, 1, 1)), groups_of((4, 8), (6, 4))
        (2, 1)
    """
    groups = a[0] // b[1]
    return groups if len(a) > 2 and groups * b[1] == a[0] and b[0] % groups == 0 else 1


def spread(
    stored: Mapping[str, Shape], ranks: Mapping[str, int], groups: Mapping[str, int] | None = None
) -> dict[str, Shape]:
    """Sizes by module, of those by path in the file and the rank of one expert, or groups, where there are several.

    Example:
        >>> spread({"q": Shape(3, 4, 2), "experts": Shape(5, 6, 4)}, {"experts": 2})
        {'q': Shape(out=3, in_=4, rank=2), 'experts[0/2]': Shape(out=5, in_=6, rank=2), 'experts[1/2]': Shape(...)}
    """
    found: dict[str, Shape] = {}
    for owner, shape in stored.items():
        of = (groups or {}).get(owner, 1)
        count = shape.rank // ranks.get(owner, shape.rank) * of
        for name in names_of(owner, count) if count > 1 else [owner]:
            found[name] = Shape(shape.out // of, shape.in_, shape.rank // count)
    return found


def place_of(name: str) -> tuple[int, int]:
    """Number of an expert and how many there are; (0, 1) for any other module.

    Example:
        >>> place_of("mlp.experts[3/8]")
        (3, 8)
    """
    match = _EXPERT.fullmatch(name)
    return (int(match["at"]), int(match["of"])) if match else (0, 1)


def unpacked(packed: Factors, at: int, experts: int) -> Factors:
    """The factors of one expert or group.

    Example:
        >>> pair = Factors(B=torch.tensor([[1.0, 2.0]]), A=torch.tensor([[3.0], [4.0]]))
        >>> unpacked(pair, 1, 2).delta()
        tensor([[8.]])
    """
    rank = packed.rank // experts
    if isinstance(packed, Grouped):
        step = len(packed.B) // experts
        rows, columns = slice(at * step, (at + 1) * step), slice(at * rank, (at + 1) * rank)
        bias = None if packed.bias is None else packed.bias[rows].clone()
        b, a = packed.B[rows].clone(), packed.A[columns].clone()
        return Factors(B=b, A=a, scale=packed.scale, bias=bias, kernel=packed.kernel)
    b = packed.B.reshape(-1, rank, experts)[:, :, at].contiguous()
    return replace(packed, B=b, A=packed.A[at * rank : (at + 1) * rank].clone())


def expert_part(stored: Factors, name: str) -> Factors:
    """The factors of a module, one of several that are stored as one."""
    return unpacked(stored, *place_of(name))


def packed(parts: Sequence[Factors | None], rank: int) -> Factors:
    """One pair for all experts or groups at one rank, its scale 1; one that is None adds nothing.

    Example:
        >>> one = Factors(B=torch.ones(1, 1), A=torch.ones(1, 1))
        >>> packed([one, one.scaled(2.0)], 1).B
        tensor([[1., 2.]])
    """
    like = next(part for part in parts if part is not None)
    bias = None if like.bias is None else torch.zeros_like(like.bias)
    none = replace(like, B=torch.zeros_like(like.B), A=torch.zeros_like(like.A), bias=bias)
    baked = [(none if part is None else part).baked() for part in parts]
    columns = [padded(part.B, rank) for part in baked]
    a = torch.cat([padded(part.A.T, rank).T for part in baked])
    if like.kernel is not None:
        biases = [part.bias for part in baked if part.bias is not None]
        return Grouped(B=torch.cat(columns), A=a, bias=torch.cat(biases) if biases else None, kernel=like.kernel)
    b = torch.stack(columns, dim=2).flatten(1)
    return replace(like, B=b, A=a, scale=1.0, bias=None, experts=len(parts))


def as_stored(adapter: Adapter) -> Adapter:
    """The adapter as PEFT stores it: experts and groups (at the largest rank of any) and MokA's modalities packed."""
    if adapter.kind == "moka":
        return packed_modalities(adapter)
    owners: dict[str, list[str]] = {}
    for name in adapter.modules:
        owners.setdefault(owner_of(name), []).append(name)
    of = {owner: place_of(names[0])[1] for owner, names in owners.items()}
    single = {owner for owner, names in owners.items() if names == [owner]}
    if len(single) == len(owners):
        return adapter
    rank = max(adapter.shape(name).rank for owner, names in owners.items() if owner not in single for name in names)

    def read(owner: str) -> Factors:
        if owner in single:
            return adapter.modules[owner]
        there = {place_of(name)[0]: name for name in owners[owner]}
        parts = [adapter.modules[there[at]] if at in there else None for at in range(of[owner])]
        return packed(parts, rank)

    def shape(owner: str) -> Shape:
        if owner not in single and not holds_experts(adapter.config, owner):
            return read(owner).shape
        first = adapter.shape(owners[owner][0])
        return first if owner in single else first._replace(rank=rank * of[owner])

    return replace(adapter, modules=adapter.derived(tuple(owners), read, shape))
