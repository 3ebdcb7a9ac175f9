"""What merge methods that look at single entries share: work by blocks of rows, draws, sign election, disjoint mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.products import Updates, as_rows, each_block


def by_blocks(deltas: Updates, combine: Callable[[Sequence[Tensor], int], Tensor]) -> Float[Tensor, " *shape"]:
    """A result that depends on the updates entry by entry, or row by row, made a block of rows at a time.

    Blocks are made in any order, several at once.

    Args:
        deltas: the k updates, stacked.
        combine: gets the same rows of every update (rows x columns) and the flat index of their first entry, and gives
            the rows of the result.

    Example:
        >>> by_blocks(torch.ones(2, 3), lambda rows, start: rows[0] + rows[1])
        tensor([2., 2., 2.])
    """
    rows = [as_rows(delta) for delta in deltas]
    result = torch.empty(rows[0].shape, dtype=deltas.dtype, device=deltas.device)

    def make(block: slice) -> None:
        result[block] = combine([one[block] for one in rows], block.start * result.shape[1])

    each_block(rows[0], make)
    return result.view(deltas[0].shape)


def block_generators(generator: torch.Generator) -> Callable[[int], torch.Generator]:
    """A generator for every block, by the flat index of its first entry: the order of the blocks does not matter.

    Example:
        >>> first, again = (block_generators(torch.Generator().manual_seed(0))(8) for _ in range(2))
        >>> torch.equal(torch.rand(2, generator=first), torch.rand(2, generator=again))
        True
    """
    seed = int(torch.randint(1 << 62, (), generator=generator))
    return lambda start: torch.Generator().manual_seed(seed + start)


def elected_mean(
    updates: Sequence[Float[Tensor, " *shape"]],
    weights: Float[Tensor, " k"],
    votes: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, " *shape"]:
    """Of every entry the weighted mean of the updates that have the elected sign, times the sum of the weights.

    The elected sign is that of ``sum_i w_i d_i`` (a tie elects ``+``); with the updates ``e_i = sign(w_i) d_i`` that
    have it, the result is ``sum |w_i| e_i / sum |w_i|`` over those, times ``sum |w_i|`` over all. So equal weights that
    add up to 1 give the disjoint mean of Yadav et al. 2023, section 3, and twice the weights give twice the result.

    Args:
        updates: already trimmed: entries of 0 do not take part.
        weights: one per update.
        votes: other weights for the election alone, of the same signs.

    Example:
        >>> updates = torch.tensor([[1.0, 2.0], [-0.8, 4.0], [-0.8, 0.0]])
        >>> elected_mean(updates, torch.tensor([1.0, 0.2, 0.2])) / 1.4
        tensor([1.0000, 2.3333])
    """
    shares = weights.tolist()
    total = torch.zeros_like(updates[0])
    for update, vote in zip(updates, shares if votes is None else votes.tolist(), strict=True):
        total.add_(update, alpha=vote)
    elected = total.ge_(0).mul_(2).sub_(1)
    total, taken = torch.zeros_like(elected), torch.zeros_like(elected)
    for update, weight in zip(updates, shares, strict=True):
        agrees = torch.mul(update, elected if weight >= 0 else -elected).clamp_(min=0)
        total.add_(agrees, alpha=abs(weight))
        taken.add_(agrees.sign_(), alpha=abs(weight))
    taken.clamp_(min=min((abs(weight) for weight in shares if weight), default=1.0))  # where none agrees, total is 0
    return total.mul_(elected).div_(taken).mul_(sum(map(abs, shares)))
