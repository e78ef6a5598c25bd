"""The vision transformer of DINO, with the parameter names of its published weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention of tokens (N, tokens, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        output = F.scaled_dot_product_attention(query, key, value)
        return self.proj(output.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers, four times wider between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each normalised before and added."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Patches of `patch` x `patch` pixels as tokens, row by row."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DinoViT(nn.Module):
    """The class token of a vision transformer; the defaults are ViT-B/16 at 224 x 224.

    Other sizes are taken by interpolating the position embedding as DINO's own code does (timm
    and transformers do it otherwise, and give other features for frames that are not square).

    Args:
        dim: width.
        depth: blocks.
        heads: of attention.
        patch: pixels.
        image: pixels a side of the images it was trained on.
    """

    def __init__(
        self, dim: int = 768, depth: int = 12, heads: int = 12, patch: int = 16, image: int = 224
    ) -> None:
        super().__init__()
        self.patch = patch
        self.side = image // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2 + 1, dim))
        self.patch_embed = PatchEmbed(dim, patch)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, dim) of normalised images (N, 3, H, W)."""
        tokens = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        x = x + self._positions(*images.shape[-2:])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def _positions(self, height: int, width: int) -> Tensor:
        rows, columns = height // self.patch, width // self.patch
        if rows == columns == self.side and height == width:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        # DINO passes scale factors a little above the ratio of the sizes (against a size that is
        # rounded down), and the interpolation samples at these: the 0.1 is part of the definition.
        scale = (rows + 0.1) / math.sqrt(self.side**2), (columns + 0.1) / math.sqrt(self.side**2)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
