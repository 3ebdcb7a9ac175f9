"""What can be told of adapters from their factors alone: sizes, norms by layer, cosines between updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loraloom.adapter import Adapter, AdapterMismatch
from loraloom.experts import as_stored
from loraloom.strategies.units import group


def summary(adapter: Adapter) -> dict[str, Any]:
    """Kind, base, sizes and the Frobenius norm of the update, in all and by layer; which modules' updates are zero.

    For HiRA the norm is that of B A, for DoRA that of the update before the magnitudes, for MokA that of every
    modality's B A, whatever it then finds in the text.

    Example:
        >>> import torch
        >>> from loraloom.adapter import Factors
        >>> one = Factors(B=torch.ones(2, 1), A=torch.ones(1, 2))
        >>> summary(Adapter({"peft_type": "LORA"}, {"layers.0.q": one, "layers.1.q": one}))["norm"]
        2.8284271247461903
    """
    squares, parameters, ranks = {}, 0, set()
    for name, factors in adapter.modules.items():
        squares[name] = factors.inner(factors)
        parameters += factors.A.numel() + factors.B.numel()
        ranks.add(factors.rank)
    if adapter.kind == "moka":  # its modalities share B
        parameters = sum(layer.A.numel() + layer.B.numel() for layer in as_stored(adapter).modules.values())
    layers = [
        {"layer": unit, "modules": len(names), "norm": math.sqrt(max(sum(squares[name] for name in names), 0.0))}
        for unit, names in group(list(squares), "layer").items()
    ]
    return {
        "kind": adapter.kind,
        "base": adapter.base,
        "modules": len(squares),
        "rank": "-".join(str(rank) for rank in sorted({min(ranks), max(ranks)})) if ranks else "",
        "parameters": parameters,
        "extras": len(adapter.extras),
        "norm": math.sqrt(max(sum(squares.values()), 0.0)),
        "layers": layers,
        "zero": [name for name, square in squares.items() if square == 0],
    }


def cosines(adapters: Sequence[Adapter]) -> list[list[float]]:
    """Cosine of every pair of updates over all modules, k x k; a module that one of them lacks counts as zero.

    Computed in factor space: no out x in matrix is formed. A zero update has cosine 0 with all others.

    Raises:
        AdapterMismatch: two adapters have different sizes for one module.

    Example:
        >>> import torch
        >>> from loraloom.adapter import Factors
        >>> one, other = (Adapter({}, {"q": Factors(B=torch.eye(2)[:, [i]], A=torch.ones(1, 2))}) for i in (0, 1))
        >>> cosines([one, other])
        [[1.0, 0.0], [0.0, 1.0]]
    """
    kinds = {adapter.kind for adapter in adapters}
    if len(kinds) > 1:
        raise AdapterMismatch(f"updates of different kinds cannot be compared: {', '.join(sorted(kinds))}")
    k = len(adapters)
    gram = [[0.0] * k for _ in range(k)]
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    for name in names:
        held = [(i, adapter.modules[name]) for i, adapter in enumerate(adapters) if name in adapter.modules]
        for i, left in held:
            for j, right in held:
                if left.shape[:2] != right.shape[:2]:
                    raise AdapterMismatch(f"{name}: sizes {left.shape[:2]} and {right.shape[:2]} differ")
                if j >= i:
                    gram[i][j] += left.inner(right)
    norms = [math.sqrt(max(gram[i][i], 0.0)) for i in range(k)]

    def cosine(i: int, j: int) -> float:
        size = norms[i] * norms[j]
        return 1.0 if i == j and size > 0 else gram[min(i, j)][max(i, j)] / size if size > 0 else 0.0

    return [[cosine(i, j) for j in range(k)] for i in range(k)]
