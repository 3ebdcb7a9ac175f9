"""Clusters of rank-one units."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods


@merge_methods.register(
    "lego",
    paper="https://arxiv.org/abs/2409.16167",
    space="units",
    spaces=("units",),
    lacks="delta, core, knots: only factors have rank-one units",
    rank="largest",
    size="clusters",
    breaks=("order", "scaling"),
)
def lego(
    deltas: Float[Tensor, " k r n"], weights: Float[Tensor, " k"], *, clusters: int | None = None
) -> Float[Tensor, " p n"]:
    """Rank-one units of all adapters are clustered; centroids are those of the result (LoRA-LEGO: Zhao et al. 2025).

    A unit is a row ``[b_i, a_i]``, the root of the adapter's scale in both. The units that are not zero go through
    k-means, weighted by their adapters' weights. Averages are smaller than their members: each centroid is brought to
    the weighted mean of its members' largest absolute entries (parameter reweighting), and the update of p clusters is
    multiplied by ``sqrt(r / p)``, r the largest number of units of an adapter (output reweighting), and by the sum of
    the weights. No code of the authors is public: three reimplementations agree on the parameters' reweighting, two on
    clustering units as they are (one makes both halves of length 1) and two on this r (one takes the number of all
    units). Where they draw first centres, here these are units that are far apart (each the one farthest from those
    before; the first is the longest), so nothing is drawn.

    Twice the weights multiply the rows by sqrt(2), the update by 2, and rows come in the order of the adapters: the
    laws ``scaling`` and ``order`` are about rows.

    Args:
        deltas: the units of k adapters, r x (out + in) each; zero rows fill up.
        weights: one weight per adapter, not negative.
        clusters: rows of the result, no more than there are units; by default r.

    Raises:
        ValueError: ``clusters`` is below 1, or a weight is negative.

    Example:
        >>> units = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 4.0]]])
        >>> lego(units, torch.tensor([0.5, 0.5]))
        tensor([[1., 0.],
                [0., 3.]])
    """
    from sklearn.cluster import KMeans

    wanted = deltas.shape[1] if clusters is None else clusters
    if wanted < 1 or float(weights.min()) < 0:
        raise ValueError(f"clusters must be at least 1 and weights not negative, got {wanted} and {weights.tolist()}")
    shares = weights.repeat_interleave(deltas.shape[1]).double()
    rows = deltas.flatten(0, 1).double()
    used = (rows.norm(dim=1) > 0) & (shares > 0)
    rows, shares = rows[used], shares[used]
    if len(rows) <= wanted:
        wanted = max(len(rows), 1)
        if not len(rows):
            return torch.zeros_like(deltas[0, :1])
    centres = rows[_spread(rows, wanted)].cpu().numpy()
    found = KMeans(wanted, init=centres, n_init=1).fit(rows.cpu().numpy(), sample_weight=shares.cpu().numpy())
    member = torch.nn.functional.one_hot(torch.from_numpy(found.labels_).long(), wanted).to(rows)
    mass = member.T * shares  # clusters x units
    whole = mass.sum(dim=1, keepdim=True).clamp(min=1e-300)
    mean, largest = mass @ rows / whole, mass @ _largest(rows) / whole
    result = mean * (largest / _largest(mean).clamp(min=1e-300))
    most = int(used.view(len(deltas), -1).sum(dim=1).max())
    scale = float(weights.sum()) ** 0.5 * (most / wanted) ** 0.25  # in both factors of the update
    order = member.argmax(dim=0).argsort(stable=True)  # by the first member, so that one adapter stays as it is
    return (scale * result[order]).to(deltas.dtype)


def _largest(rows: Tensor) -> Tensor:
    """The largest absolute entry of every row, as a column."""
    return rows.abs().amax(dim=1, keepdim=True)


def _spread(rows: Tensor, count: int) -> list[int]:
    """Places of rows that are far apart, the longest first."""
    chosen = [int(rows.norm(dim=1).argmax())]
    nearest = (rows - rows[chosen[0]]).norm(dim=1)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).norm(dim=1))
    return chosen
