"""rearrange(): einops' own where einops is installed, and the same for tensors where it is not."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import torch

_TOKEN = re.compile(r"\.\.\.|[A-Za-z_]\w*|\S")
_ELLIPSIS = "..."

# Names of the dimensions that make one; None is an ellipsis outside of parentheses.
Groups = list[list[str] | None]


def rearrange(tensor: Any, pattern: str, **axes_lengths: int) -> Any:
    """Splits, permutes and joins dimensions, as `einops.rearrange` does.

    Arguments:
        tensor: a tensor; with einops, anything that it takes.
        pattern: such as "b s ... -> (b s) ...": names of dimensions before and after. Parentheses
            join dimensions, 1 is a dimension of that size, an ellipsis stands for any number.
        axes_lengths: sizes of the dimensions that the shape leaves open.

    Returns:
        The same elements in the new shape; a view of `tensor` where strides allow it.

    Raises:
        ValueError: the pattern is wrong, or does not fit the shape (einops: EinopsError, which is a
            RuntimeError).
    """
    implementation = _einops_rearrange() or rearrange_tensor
    return implementation(tensor, pattern, **axes_lengths)


@functools.cache
def _einops_rearrange() -> Callable[..., Any] | None:
    try:
        import einops
    except ImportError:
        return None
    return einops.rearrange


def rearrange_tensor(tensor: torch.Tensor, pattern: str, **axes_lengths: int) -> torch.Tensor:
    """rearrange() of a tensor, without einops."""
    left, right = _parse(pattern)
    folded = None in left
    rank = len(left) - folded
    if tensor.dim() < rank or (not folded and tensor.dim() != rank):
        raise ValueError(f"{pattern!r}: does not fit the shape {list(tensor.shape)}")
    extra = [f"{_ELLIPSIS}{i}" for i in range(tensor.dim() - rank)]
    left = _expand(left, extra)
    right = _expand(right, extra)
    sizes = _sizes(left, tuple(tensor.shape), axes_lengths, pattern)
    before = [name for group in left for name in group]
    after = [name for group in right for name in group]
    split = tensor.reshape([sizes[name] for name in before])
    permuted = split.permute([before.index(name) for name in after])
    return permuted.reshape([math.prod(sizes[name] for name in group) for group in right])


@functools.lru_cache(maxsize=256)
def _parse(pattern: str) -> tuple[Groups, Groups]:
    sides = pattern.split("->")
    if len(sides) != 2:
        raise ValueError(f"{pattern!r}: must have one '->'")
    left, right = (_parse_side(side, pattern) for side in sides)
    names, others = (
        sorted(name for group in side for name in group or [_ELLIPSIS] * (group is None))
        for side in (left, right)
    )
    if names != others or len({*names}) != len(names):
        raise ValueError(f"{pattern!r}: must have the same names on both sides, once on each")
    if any(group and _ELLIPSIS in group for group in left):
        raise ValueError(f"{pattern!r}: an ellipsis on the left cannot be in parentheses")
    return left, right


def _parse_side(side: str, pattern: str) -> Groups:
    groups: Groups = []
    inside = False
    for token in _TOKEN.findall(side):
        if token == "(" and not inside:
            inside = True
            groups.append([])
        elif token == ")" and inside:
            inside = False
        elif token == _ELLIPSIS or token.isidentifier():
            if inside:
                groups[-1].append(token)
            else:
                groups.append(None if token == _ELLIPSIS else [token])
        elif token == "1":
            if not inside:
                groups.append([])
        else:
            raise ValueError(f"{pattern!r}: has an unexpected {token!r}")
    if inside:
        raise ValueError(f"{pattern!r}: has an open parenthesis")
    return groups


def _expand(groups: Groups, extra: list[str]) -> list[list[str]]:
    """Puts the dimensions that the ellipsis stands for in its place."""
    expanded: list[list[str]] = []
    for group in groups:
        if group is None:
            expanded.extend([name] for name in extra)
        else:
            expanded.append([x for name in group for x in (extra if name == _ELLIPSIS else [name])])
    return expanded


def _sizes(
    left: list[list[str]], shape: tuple[int, ...], given: dict[str, int], pattern: str
) -> dict[str, int]:
    unknown = given.keys() - {name for group in left for name in group}
    if unknown:
        raise ValueError(f"{pattern!r}: has no dimension {sorted(unknown)}")
    sizes = dict(given)
    for group, size in zip(left, shape):
        open_names = [name for name in group if name not in sizes]
        known = math.prod(sizes[name] for name in group if name in sizes)
        if len(open_names) == 1 and known > 0 and size % known == 0:
            sizes[open_names[0]] = size // known
        elif open_names or known != size:
            raise ValueError(
                f"{pattern!r}: does not split a dimension of size {size} into"
                f" {{{', '.join(f'{name}: {sizes.get(name)}' for name in group)}}}"
            )
    return sizes
