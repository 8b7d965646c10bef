"""Patches of an image as tokens (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.utils import _pair

from ..ops.fused_dense import FusedDense

__all__ = ["PatchEmbed"]


class PatchEmbed(nn.Module):
    """Embeds the patches of images by one linear layer.

    Arguments:
        img_size, patch_size: height and width, or one number for both.
        in_chans: channels of an image.
        embed_dim: of a token.
        norm_layer: None, or a function of embed_dim that makes a norm.
        flatten: whether to return [batch, patches, embed_dim] rather than [batch, rows, columns,
            embed_dim].
        bias: whether the linear layer has one.
        fused_bias_fc: whether that layer is a FusedDense.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten: bool = True,
        bias: bool = True,
        fused_bias_fc: bool = False,
    ) -> None:
        super().__init__()
        self.img_size = _pair(img_size)
        self.patch_size = _pair(patch_size)
        self.grid_size = tuple(i // p for i, p in zip(self.img_size, self.patch_size))
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.flatten = flatten
        linear = FusedDense if fused_bias_fc else nn.Linear
        self.proj = linear(in_chans * self.patch_size[0] * self.patch_size[1], embed_dim, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens of images [batch, in_chans, height, width]; ValueError for another size."""
        batch, channels, *size = x.shape
        if tuple(size) != tuple(self.img_size):
            raise ValueError(
                f"x: must have images of size {list(self.img_size)}, has shape {list(x.shape)}"
            )
        (rows, columns), (height, width) = self.grid_size, self.patch_size
        patches = x.reshape(batch, channels, rows, height, columns, width)
        # [batch, rows, columns, channels * height * width]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        tokens = self.proj(patches)
        return self.norm(tokens.flatten(1, 2) if self.flatten else tokens)
