"""Units: which modules of a model are switched together, worked out from module paths alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from loraloom.registry import UnknownName

KINDS = ("layer", "module", "projection")

_PREFIX = "base_model.model."
_BLOCK = re.compile(r"(?:^|_|res)(?:blocks?|h)$")
_STAGE = re.compile(r"^(?:stages?|levels?|down_blocks|up_blocks|\w*groups)$")
_WHOLE = re.compile(r"^(?:|encoders|decoders|towers|models|backbones|branches)$")  # lists of models, not of layers
_LAYERS = re.compile(r"^layers?$")
_EXPERT = re.compile(r"^experts?$")
_MODALITY = re.compile(r"\[(?!\d+/\d+\])[^\[\]]+\]$")  # not that of an expert, [3/8]
_NAMED_EXPERT = re.compile(r"^experts?_\d+$")


def base_path(name: str) -> str:
    """The module path in the base model: without PEFT's ``base_model.model.``, and the modality of a MokA adapter's.

    Example:
        >>> base_path("base_model.model.lm_head"), base_path("layers.0.q_proj[image]")
        ('lm_head', 'layers.0.q_proj')
    """
    while name.startswith(_PREFIX):
        name = name[len(_PREFIX) :]
    return _MODALITY.sub("", name)


def layer(name: str) -> str:
    """The transformer block that a module belongs to, as a path.

    The rule: indexed parts of the path are candidates, consecutive indices count as one (``block.0.1``). Taken is the
    innermost one whose container is called ``block``, ``blocks``, ``h`` or ends in ``_block(s)`` or ``resblocks``
    (T5's ``block.0.layer.1``, Swin's ``layers.0.blocks.1``); otherwise the first one whose container is not a mere
    stage (ConvNext's ``stages.0.layers.1``; a UNet's ``down_blocks`` and ``up_blocks`` are stages too), so that
    experts and the parts of a Sequential belong to their layer; otherwise the first. A model in a Sequential
    (``0.encoder.layer.3``) or a list of towers (``encoders.1.layers.3``) is no layer. A module without an index is a
    layer of its own. Where a model is laid out in another way (XLM keeps ``attentions.3`` and ``ffns.3`` apart), a
    regular expression as unit says what belongs together.

    Example:
        >>> layer("model.layers.3.mlp.experts.7.w1")
        'model.layers.3'
        >>> layer("encoder.block.0.layer.1.DenseReluDense.wi")
        'encoder.block.0'
        >>> layer("swin.encoder.layers.0.blocks.1.attention.self.query")
        'swin.encoder.layers.0.blocks.1'
    """
    parts = base_path(name).split(".")
    runs: list[tuple[str, int]] = []  # container, end of the run of indices
    for at, part in enumerate(parts):
        if not part.isdecimal():
            continue
        if runs and runs[-1][1] == at:
            runs[-1] = (runs[-1][0], at + 1)
        else:
            runs.append((parts[at - 1] if at else "", at + 1))
    if not runs:
        return ".".join(parts)
    no_stage = [run for run in runs if not _STAGE.match(run[0])]
    blocks = [run for run in no_stage if _BLOCK.search(run[0])]
    while len(no_stage) > 1 and _WHOLE.match(no_stage[0][0]) and any(_LAYERS.match(name) for name, _ in no_stage[1:]):
        no_stage = no_stage[1:]
    end = (blocks[-1:] or no_stage[:1] or runs[:1])[0][1]
    return ".".join(parts[:end])


def role(name: str) -> str:
    """What a module does in its layer: its path from there on, without the numbers of experts.

    A module outside all layers has its whole path as role; one that is itself an entry of a list, the list's path.

    Example:
        >>> role("model.layers.3.self_attn.q_proj")
        'self_attn.q_proj'
        >>> role("model.layers.3.mlp.experts.7.w1")
        'mlp.experts.w1'
    """
    path = base_path(name)
    block = layer(path)
    if block == path:
        return tower(path) or path
    kept: list[str] = []
    before = ""
    for part in path[len(block) + 1 :].split("."):
        if not (_NAMED_EXPERT.match(part) or (part.isdecimal() and _EXPERT.match(before))):
            kept.append(part)
        before = part
    return ".".join(kept)


def tower(unit: str) -> str:
    """The stack of layers that a unit is in: the path of its layer without indices.

    Example:
        >>> tower("vision_model.encoder.layers.3")
        'vision_model.encoder.layers'
        >>> tower("encoder.layers.0.blocks.1") == tower("encoder.layers.2.blocks.0")
        True
    """
    return ".".join(part for part in layer(unit).split(".") if not part.isdecimal())


def _place(unit: str) -> tuple[int, ...]:
    return tuple(int(part) for part in layer(unit).split(".") if part.isdecimal())


def depths(units: Sequence[str]) -> tuple[float, ...]:
    """How high each unit lies in its tower: 0 the lowest layer, 1 the highest, evenly spaced.

    Counted among the layers that occur, not by their numbers. Units of one layer share a depth; a tower of one layer,
    and so each unit without an index, lies in the middle.

    Example:
        >>> depths(["text.layers.0", "text.layers.1", "text.layers.5", "vision.layers.0", "lm_head"])
        (0.0, 0.5, 1.0, 0.5, 0.5)
    """
    towers: dict[str, list[tuple[int, ...]]] = {}
    for unit in units:
        places = towers.setdefault(tower(unit), [])
        if _place(unit) not in places:
            places.append(_place(unit))
    order = {name: {place: at for at, place in enumerate(sorted(places))} for name, places in towers.items()}
    found = []
    for unit in units:
        ranks = order[tower(unit)]
        found.append(ranks[_place(unit)] / (len(ranks) - 1) if len(ranks) > 1 else 0.5)
    return tuple(found)


def group(names: Iterable[str], unit: str = "layer") -> dict[str, tuple[str, ...]]:
    """Group module paths into the units that are switched together.

    Towers come in the order of their first module, the layers of a tower by number, all else in the order given.

    Args:
        names: module paths; PEFT's ``base_model.model.`` in front is ignored, repeated names count once.
        unit: ``layer`` (the transformer block, see :func:`layer`), ``module`` (each by itself), ``projection`` (the
            same :func:`role` in all layers of all towers), or a regular expression that is searched in each path.
            Then a unit is what matched (its groups joined by dots, where it has groups); modules without a match are
            in no unit, that is, they are never switched.

    Returns:
        Module paths (as given) by unit name.

    Raises:
        ValueError: there are no names, the expression is invalid or matches none of them.
        UnknownName: ``unit`` is a misspelt kind.

    Example:
        >>> group(["layers.10.q_proj", "layers.2.q_proj", "layers.2.v_proj"])
        {'layers.2': ('layers.2.q_proj', 'layers.2.v_proj'), 'layers.10': ('layers.10.q_proj',)}
        >>> group(["layers.0.q_proj", "layers.1.q_proj", "layers.1.v_proj"], unit="projection")
        {'q_proj': ('layers.0.q_proj', 'layers.1.q_proj'), 'v_proj': ('layers.1.v_proj',)}
        >>> group(["layers.0.q_proj", "layers.1.q_proj", "layers.1.fc"], unit=r"layers\\.(\\d+)\\.q")
        {'0': ('layers.0.q_proj',), '1': ('layers.1.q_proj',)}
    """
    check_unit(unit)
    paths = list(dict.fromkeys(names))
    if not paths:
        raise ValueError("there are no modules to group into units")
    found: dict[str, list[str]] = {}
    for path in paths:
        label = _label(base_path(path), unit)
        if label:
            found.setdefault(label, []).append(path)
    if not found:
        first = base_path(paths[0])
        raise ValueError(f"unit {unit!r} matches none of {len(paths)} module paths (the first is {first!r})")
    towers: dict[str, int] = {}
    for label in found:
        towers.setdefault(tower(label), len(towers))
    order = sorted(found, key=lambda label: (towers[tower(label)], _place(label)))
    return {label: tuple(found[label]) for label in order}


def check_unit(unit: str) -> None:
    """Refuse a unit that is neither a kind nor a regular expression.

    Raises:
        UnknownName: a misspelt kind ("layers").
        ValueError: the expression is invalid.
    """
    if unit in KINDS:
        return
    if not isinstance(unit, str) or not unit:
        raise ValueError(f"unit must be one of {', '.join(KINDS)} or a regular expression, got {unit!r}")
    if unit.isidentifier() and get_close_matches(unit, KINDS, n=1, cutoff=0.75):
        raise UnknownName("unit", unit, [*KINDS, "a regular expression"])
    try:
        re.compile(unit)
    except re.error as error:
        raise ValueError(f"unit {unit!r} is not a valid regular expression: {error}") from error


def _label(path: str, unit: str) -> str:
    if unit == "layer":
        return layer(path)
    if unit == "module":
        return path
    if unit == "projection":
        return role(path)
    match = re.search(unit, path)
    if match is None:
        return ""
    groups = [text for text in match.groups() if text]
    return ".".join(groups) if match.re.groups else match.group()
