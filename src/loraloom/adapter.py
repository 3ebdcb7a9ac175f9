"""Adapters and their factors: frozen data, and algebra that never forms an out x in matrix unless asked for it.

A LoRA update of a module with weight W0 (out x in) is ``delta = scale * B @ A`` with B (out x r) and A (r x in). All
that depends on delta alone (norms, inner products, singular values, sums) is computed on the factors: with QR
decompositions of B and A^T it costs O((out + in) r^2) instead of O(out * in * min(out, in)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class AdapterMismatch(ValueError):
    """Adapters, or an adapter and a request, that do not fit together; the message names the module and both sides."""


class UnsupportedKind(AdapterMismatch):
    """An operation that cannot be done exactly on this kind of adapter; the message says which and why."""


class Shape(NamedTuple):
    """Sizes of one adapted module: delta is ``out`` x ``in_``, of rank at most ``rank``."""

    out: int
    in_: int
    rank: int


@dataclass(frozen=True, eq=False)
class Factors:
    """The low-rank update of one module, ``delta = scale * B @ A``.

    Convolutions and embeddings are held as matrices too: ``kernel`` and ``embedding`` say how the file stores them.

    Attributes:
        B: out x r.
        A: r x in (for a convolution ``in`` is in_channels/groups * kernel height * kernel width).
        scale: the number that multiplies B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA.
        bias: the bias of B where PEFT's ``lora_bias`` was on, (out,). It is scaled like B @ A.
        magnitude: DoRA's column norms, (out,).
        kernel: A's stored trailing shape for a convolution, as (in_channels, *kernel_size).
        embedding: whether the module is an embedding (stored as ``lora_embedding_A`` and ``_B``).
        experts: of how many experts the factors are packed into one pair, as PEFT stores them (see ``experts.py``).

    Example:
        >>> f = Factors(B=torch.ones(3, 1), A=torch.tensor([[1.0, 2.0]]), scale=0.5)
        >>> f.delta()
        tensor([[0.5000, 1.0000],
                [0.5000, 1.0000],
                [0.5000, 1.0000]])
        >>> f.shape
        Shape(out=3, in_=2, rank=1)
    """

    B: Float[Tensor, "out r"]
    A: Float[Tensor, "r in"]
    scale: float = 1.0
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    kernel: tuple[int, ...] | None = None
    embedding: bool = False
    experts: int = 1

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise AdapterMismatch(f"B {tuple(self.B.shape)} and A {tuple(self.A.shape)} do not multiply to a matrix")

    @property
    def shape(self) -> Shape:
        """(out, in, rank)."""
        return Shape(self.B.shape[0], self.A.shape[1], self.A.shape[0])

    @property
    def rank(self) -> int:
        """Number of columns of B; the rank of delta is at most this."""
        return self.A.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the factors are stored."""
        return self.B.dtype

    def delta(self) -> Float[Tensor, "out in"]:
        """The dense update ``scale * B @ A``, out x in."""
        return self.scale * (self.B @ self.A)

    def inner(self, other: Factors) -> float:
        """Frobenius inner product of two deltas, O((out + in) r s): tr((B^T B')(A' A^T)) times both scales.

        Example:
            >>> f = Factors(B=torch.ones(3, 1), A=torch.tensor([[1.0, 2.0]]))
            >>> f.inner(f)
            15.0
        """
        if self.shape[:2] != other.shape[:2]:
            raise AdapterMismatch(f"deltas of sizes {self.shape[:2]} and {other.shape[:2]} have no inner product")
        left = self.B.double().T @ other.B.double()
        right = self.A.double() @ other.A.double().T
        return float(self.scale * other.scale * (left * right).sum())

    def norm(self) -> float:
        """Frobenius norm of delta."""
        return max(self.inner(self), 0.0) ** 0.5

    def singular_values(self) -> Float[Tensor, " k"]:
        """Singular values of delta, falling, in float64; k is its numerical rank (see :func:`basis`)."""
        return torch.linalg.svdvals(self.scale * (basis(self.B).root @ basis(self.A.T).root.T))

    def svd(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
        """Thin SVD, ``delta = U @ diag(S) @ Vh``, in float64; k is the numerical rank of delta (see :func:`basis`)."""
        found = spectrum(self)
        return self.B.double() @ found.left, found.values, found.right.T @ self.A.double()

    def scaled(self, weight: float) -> Factors:
        """The factors of ``weight * delta``; B and A are shared, only ``scale`` differs."""
        return replace(self, scale=self.scale * weight)

    def baked(self) -> Factors:
        """The same delta with ``scale`` 1: it is multiplied into B (and the bias)."""
        if self.scale == 1.0:
            return self
        b, bias = _times(self.B, self.scale), None if self.bias is None else _times(self.bias, self.scale)
        return replace(self, B=b, A=self.A.to(b.dtype), bias=bias, scale=1.0)

    def to(self, device: torch.device | str) -> Factors:
        """The same factors on another device."""
        bias, magnitude = (None if held is None else held.to(device) for held in (self.bias, self.magnitude))
        return replace(self, B=self.B.to(device), A=self.A.to(device), bias=bias, magnitude=magnitude)


def _times(b: Tensor, by: float) -> Tensor:
    """B times a number, in float32 where float16 would lose more to its smallest numbers than to rounding."""
    small = b.dtype == torch.float16 and b.numel() > 0 and abs(by) < 1
    wide = small and 0 < abs(by) * float(b.abs().max()) < 2.0**-12
    return (b.float() if wide else b) * by


def concat(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Exact weighted sum of deltas: rank adds up, scale is 1, ``sum_i w_i s_i B_i A_i``.

    Raises:
        AdapterMismatch: the deltas differ in size, or the numbers of parts and weights do.

    Example:
        >>> f = Factors(B=torch.ones(2, 1), A=torch.ones(1, 2))
        >>> concat([f, f], [1.0, 2.0]).delta()
        tensor([[3., 3.],
                [3., 3.]])
    """
    if len(parts) != len(weights) or not parts:
        raise AdapterMismatch(f"{len(parts)} parts and {len(weights)} weights; one weight per part is needed")
    sizes = {part.shape[:2] for part in parts}
    if len(sizes) > 1:
        raise AdapterMismatch(f"deltas of different sizes do not add: {sorted(sizes)}")
    b = torch.cat([_times(p.B.to(parts[0].dtype), w * p.scale) for p, w in zip(parts, weights, strict=True)], dim=1)
    a = torch.cat([part.A.to(b.dtype) for part in parts], dim=0)
    return Factors(B=b, A=a, kernel=parts[0].kernel, embedding=parts[0].embedding)


def truncate(factors: Factors, rank: int) -> tuple[Factors, float]:
    """Best approximation of delta of at most ``rank`` (Eckart-Young), and its relative error.

    The singular values are split evenly: B = U sqrt(S), A = sqrt(S) Vh, scale 1. Where the rank of the factors is
    smaller, zero columns fill up, so that the result always has exactly ``rank`` of them.

    Returns:
        The factors, and ``|delta - result| / |delta|`` (0 for a zero delta) from the tail of the singular values.

    Raises:
        ValueError: ``rank`` is below 1.

    Example:
        >>> f = Factors(B=torch.eye(2), A=torch.diag(torch.tensor([3.0, 4.0])))
        >>> cut, error = truncate(f, rank=1)
        >>> round(error, 3)
        0.6
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return spectrum(factors).cut(rank)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of a delta, and the way to the best approximation of any rank.

    Attributes:
        factors: whose they are.
        values: falling, in float64, as many as the numerical rank.
        left: r x k; ``B @ left`` are the left singular vectors.
        right: r x k; ``A^T @ right`` are the right ones.
    """

    factors: Factors
    values: Tensor
    left: Tensor
    right: Tensor

    def cut(self, rank: int) -> tuple[Factors, float]:
        """What :func:`truncate` gives."""
        factors, s = self.factors, self.values
        root = s[:rank].sqrt()
        working = torch.promote_types(factors.dtype, torch.float32)
        b = factors.B.to(working) @ (self.left[:, :rank] * root).to(working)
        a = (self.right[:, :rank] * root).T.to(working) @ factors.A.to(working)
        total, tail = float(s.norm()), float(s[rank:].norm())
        cut = replace(factors.baked(), B=padded(b, rank).to(factors.dtype), A=padded(a.T, rank).T.to(factors.dtype))
        return cut, (tail / total if total > 0 else 0.0)


def spectrum(factors: Factors) -> Spectrum:
    """Singular values and vectors of delta, from small matrices alone (see :func:`basis`).

    Example:
        >>> spectrum(Factors(B=torch.eye(2), A=torch.diag(torch.tensor([3.0, 4.0])))).values.round(decimals=3)
        tensor([4., 3.], dtype=torch.float64)
    """
    b, a = basis(factors.B), basis(factors.A.T)
    u, s, vh = torch.linalg.svd(factors.scale * (b.root @ a.root.T), full_matrices=False)
    return Spectrum(factors, s, b.map @ u, a.map @ vh.T)


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; the sum, fifty times faster than a look at every entry, tells most often.

    Example:
        >>> is_finite(torch.tensor([1.0, float("nan")])), is_finite(torch.ones(2))
        (False, True)
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # A sum is not finite if any entry is not; it may also just be too large, so then the extremes decide.
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def padded(columns: Float[Tensor, "n k"], rank: int) -> Float[Tensor, "n rank"]:
    """The matrix with zero columns added on the right, up to ``rank`` of them."""
    return torch.nn.functional.pad(columns, (0, rank - columns.shape[1]))


class Basis(NamedTuple):
    """An orthonormal basis Q (n x p) of the columns of a tall X (n x r), never formed itself.

    ``Q = X @ map`` and ``X = Q @ root``, both in float64; p is the numerical rank of X.
    """

    map: Float[Tensor, "r p"]
    root: Float[Tensor, "p r"]


def basis(x: Float[Tensor, "n r"]) -> Basis:
    """Orthonormal basis of the columns of X, from small matrices alone.

    The columns are brought to length 1 first, so a gauge with very unequal columns costs no accuracy. Types of 32 bits
    and less go through the eigenvalues of X^T X in float64, n r^2 multiplications and no Q, which is exact to their own
    precision; float64 goes through a QR decomposition. Directions below 3e-7 (float64: 1e-13) of the largest singular
    value of the scaled X are dropped: in the stored precision they are rounding.

    Example:
        >>> x = torch.tensor([[3.0, 6.0], [4.0, 8.0]])
        >>> b = basis(x)
        >>> b.root.shape
        torch.Size([1, 2])
        >>> (x.double() @ b.map).abs().flatten()
        tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    wide = x.double()
    if x.dtype == torch.float64:
        root = torch.linalg.qr(wide, mode="r").R
        length = root.norm(dim=0)
    else:
        gram = wide.T @ wide
        length = gram.diagonal().sqrt()
    inverse = torch.where(length > 0, 1 / length, 0.0)
    if x.dtype == torch.float64:
        _, s, vh = torch.linalg.svd(root * inverse, full_matrices=False)
        v, tolerance = vh.T, 1e-13
    else:
        squares, v = torch.linalg.eigh(inverse[:, None] * gram * inverse)
        s, tolerance = squares.clamp(min=0).sqrt(), 3e-7
    kept = s > tolerance * s.max() if s.numel() else s > 0
    s, v = s[kept], v[:, kept]
    return Basis(v / s * inverse[:, None], s[:, None] * v.T * length)


class Modules(Mapping[str, Factors]):
    """Factors by module path, each made when it is asked for and not kept: what makes operators stream.

    Args:
        names: the module paths, in order.
        read: makes the factors of one module.
        shape: tells the sizes of one module without making it; by default it is made for that.
        heavy: each takes all cores and much memory by itself, so no two should be made at once.
    """

    def __init__(
        self,
        names: Sequence[str],
        read: Callable[[str], Factors],
        shape: Callable[[str], Shape] | None = None,
        *,
        heavy: bool = False,
    ) -> None:
        self.heavy = heavy
        self._names = dict.fromkeys(names)
        self._read = read
        self._shape = shape

    def __getitem__(self, name: str) -> Factors:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> Shape:
        """Sizes of one module, from the file's header where there is one."""
        return self._shape(name) if self._shape is not None else self._read(name).shape


@dataclass(frozen=True, eq=False)
class Adapter:
    """A whole trained adapter: what a PEFT folder holds, read-only.

    Attributes:
        config: the content of ``adapter_config.json``.
        modules: factors by module path in the base model (``model.layers.0.self_attn.q_proj``), read when asked for.
        extras: whole tensors beside the factors, by parameter path in the base model: trained biases and the weights
            of ``modules_to_save``.
        provenance: where it comes from: inputs with their hashes, operation, version, seed. Empty when unknown.

    Example:
        >>> one = Factors(B=torch.ones(3, 1), A=torch.ones(1, 2))
        >>> Adapter({"peft_type": "LORA", "base_model_name_or_path": "tiny"}, {"layers.0.q": one})
        Adapter(kind='lora', base='tiny', modules=1, extras=0)
    """

    config: Mapping[str, Any]
    modules: Mapping[str, Factors]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """``lora``, ``dora`` or ``hira`` (rsLoRA, PiSSA and the like differ only in scale or start: ``lora``)."""
        kind = str(self.config.get("peft_type", "LORA")).lower()
        return "dora" if kind == "lora" and self.config.get("use_dora") else kind

    @property
    def base(self) -> str:
        """Name or path of the base model, as the configuration gives it."""
        return str(self.config.get("base_model_name_or_path") or "")

    def shape(self, name: str) -> Shape:
        """Sizes of one module, without reading its factors where the file's header tells."""
        return self.modules.shape(name) if isinstance(self.modules, Modules) else self.modules[name].shape

    @property
    def heavy(self) -> bool:
        """Whether each module takes all cores and much memory to make, so that no two should be made at once."""
        return getattr(self.modules, "heavy", False)

    def derived(
        self,
        names: Sequence[str],
        read: Callable[[str], Factors],
        shape: Callable[[str], Shape],
        *,
        heavy: bool = False,
    ) -> Modules:
        """Modules that are made of this adapter's when they are read: heavy where those are, or of themselves."""
        return Modules(names, read, shape, heavy=heavy or self.heavy)

    def on(self, device: str) -> Adapter:
        """The same adapter, each module on a device when it is read."""
        there = self.derived(tuple(self.modules), lambda name: self.modules[name].to(device), self.shape)
        return replace(self, modules=there)

    def loaded(self) -> Adapter:
        """The same adapter with every module in memory: for repeated use of a lazy result."""
        return replace(self, modules=dict(self.modules.items()), extras=dict(self.extras.items()))

    def __repr__(self) -> str:
        return (
            f"Adapter(kind={self.kind!r}, base={self.base!r}, modules={len(self.modules)}, extras={len(self.extras)})"
        )
