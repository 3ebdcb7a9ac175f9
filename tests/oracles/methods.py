"""Slow, obvious merge methods on numpy in float64, entry by entry or straight from the formula."""

from __future__ import annotations

import numpy as np


def kept(values: np.ndarray, count: int) -> np.ndarray:
    """Mask of the ``count`` largest magnitudes, of equal ones the first."""
    flat = values.ravel()
    order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
    mask = np.zeros(flat.size, dtype=bool)
    mask[order[:count]] = True
    return mask.reshape(values.shape)


def count(density: float, n: int) -> int:
    return max(1, round(density * n))


def elected(updates: list[np.ndarray], weights: list[float], votes: list[float] | None = None) -> np.ndarray:
    result = np.zeros_like(updates[0])
    for at in np.ndindex(*result.shape):
        parts = [(w * u[at], abs(w)) for u, w in zip(updates, weights, strict=True)]
        sign = 1 if sum(v * u[at] for u, v in zip(updates, votes or weights, strict=True)) >= 0 else -1
        agreeing = [(p, w) for p, w in parts if p * sign > 0]
        if agreeing:
            mean = sum(p for p, _ in agreeing) / sum(w for _, w in agreeing)
            result[at] = mean * sum(abs(w) for w in weights)
    return result


def ties(d, w, density=0.2):
    return elected([u * kept(u, count(density, u.size)) for u in d], w)


def magnitude(d, w, density=0.2):
    return sum(x * u * kept(u, count(density, u.size)) for u, x in zip(d, w, strict=True))


def breadcrumbs(d, w, density=0.85, gamma=0.01):
    total = np.zeros_like(d[0])
    for u, x in zip(d, w, strict=True):
        out = min(round(gamma * u.size), u.size - 1)
        stays = kept(u, min(out + count(density, u.size), u.size)) & ~kept(u, out)
        total += x * u * stays
    return total


def sce(d, w, density=0.1):
    if len(d) == 1:
        return w[0] * d[0]
    mask = kept(np.var(np.stack(d), axis=0), count(density, d[0].size))
    chosen = [u * mask for u in d]
    energy = np.array([(u**2).sum() for u in chosen])
    share = np.array(w) * energy / energy.sum()
    if not np.abs(share).sum():
        return np.zeros_like(d[0])
    return elected(chosen, list(share), list(w)) * np.abs(w).sum() / np.abs(share).sum()


def consensus(d, w, agree=2, strictness=0.4):
    used = [(u, x) for u, x in zip(d, w, strict=True) if x]
    whole = sum(np.sign(x) * u for u, x in used)
    votes = sum((np.abs(u) >= strictness * np.abs(whole - np.sign(x) * u)) & (u != 0) for u, x in used)
    return sum(x * u for u, x in zip(d, w, strict=True)) * (votes >= min(agree, len(used)))


def svd(matrix):
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    there = s > 1e-10 * max(s.max(), 1e-300)
    return u[:, there], s[there], vh[there]


def polar(columns):
    u, _, vh = svd(columns)
    return u @ vh


def iso_c(d, w):
    u, s, vh = svd(sum(x * m for m, x in zip(d, w, strict=True)))
    return s.mean() * u @ vh


def iso_cts(d, w, common=0.8):
    u, s, vh = svd(sum(x * m for m, x in zip(d, w, strict=True)))
    own = min(round((len(s) - int(common * len(s))) / len(d)), len(s) // len(d))
    c = len(s) - own * len(d)
    left, values, right = [u[:, :c]], [s[:c]], [vh[:c].T]
    for m, x in zip(d, w, strict=True):
        a, b, e = svd(x * m - u[:, :c] @ (u[:, :c].T @ (x * m)))
        left.append(a[:, :own]), values.append(b[:own]), right.append(e[:own].T)
    return np.concatenate(values).mean() * polar(np.hstack(left)) @ polar(np.hstack(right)).T


def tsv_m(d, w):
    parts = [svd(m) for m in d]
    s = np.concatenate([x * p[1] for p, x in zip(parts, w, strict=True)])
    return polar(np.hstack([p[0] for p in parts])) * s @ polar(np.hstack([p[2].T for p in parts])).T


def cart(d, w, density=0.1, gain=1.0):
    mean = sum(abs(x) * m for m, x in zip(d, w, strict=True)) / np.abs(w).sum()
    total = sum(w) * mean
    for m, x in zip(d, w, strict=True):
        if np.linalg.norm(m - mean) > 1e-6 * np.linalg.norm(m):
            u, s, vh = svd(m - mean)
            r = int(np.ceil(density * len(s)))
            total = total + len(d) * gain * x * (u[:, :r] * s[:r]) @ vh[:r]
    return total


def pico(b, a):
    """The mean of the calibrated updates at the mean norm (Tang and Yang 2026), from the factors."""
    u, s, _ = np.linalg.svd(np.hstack(b), full_matrices=False)
    shrink = np.eye(len(u)) + u * (1 / (1 + (len(b) - 1) * s**2 / (s**2).sum()) - 1) @ u.T
    merged = sum(shrink @ x @ y for x, y in zip(b, a, strict=True)) / len(b)
    return merged * np.mean([np.linalg.norm(x @ y) for x, y in zip(b, a, strict=True)]) / np.linalg.norm(merged)


def slerp(d, w):
    """Two updates: directions by the sine formula, norms on the line."""
    (a, b), t = d, w[1] / sum(w)
    na, nb = np.linalg.norm(a), np.linalg.norm(b)
    angle = np.arccos((a * b).sum() / (na * nb))
    direction = (np.sin((1 - t) * angle) * a / na + np.sin(t * angle) * b / nb) / np.sin(angle)
    return sum(w) * ((1 - t) * na + t * nb) * direction


def model_stock(d, w):
    k = len(d)
    cosines = [(d[i] * d[j]).sum() / (np.linalg.norm(d[i]) * np.linalg.norm(d[j])) for i in range(k) for j in range(i)]
    c = np.clip(np.mean(cosines), 0, 1) if k > 1 else 1.0
    return k * c / (1 + (k - 1) * c) * sum(x * m for m, x in zip(d, w, strict=True))
