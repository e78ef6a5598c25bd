"""ViCLIP: a video and a text encoder, with the parameter names of the published weights.

After the code of InternVideo (arXiv 2307.06942), as VBench carries it, in inference alone: no
masking, no dropout.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Tokenizer = Callable[[list[str]], Tensor]


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Attention and MLP of tokens (N, tokens, width), each normalised before and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionEncoder(nn.Module):
    """All patches of all frames attend to each other, and to one class token."""

    def __init__(
        self, width: int, layers: int, heads: int, dim: int, frames: int, patch: int, image: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((image // patch) ** 2 + 1, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, frames, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, dim))

    def forward(self, video: Tensor) -> Tensor:
        x = self.conv1(video).permute(0, 3, 4, 2, 1).flatten(1, 2)  # (N, patches, frames, width)
        x = x + self.positional_embedding[1:, None] + self.temporal_positional_embedding
        token = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([token, x.flatten(1, 2)], dim=1))
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class TextEncoder(nn.Module):
    """CLIP's text encoder: the feature of the end token, the largest of the vocabulary."""

    def __init__(
        self, width: int, layers: int, heads: int, dim: int, length: int, vocabulary: int
    ) -> None:
        super().__init__()
        self.transformer = Transformer(width, layers, heads)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf"), device=x.device).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ self.text_projection


class ViCLIP(nn.Module):
    """Videos and texts in one space; the defaults are ViCLIP-L/14.

    Args:
        tokenizer: texts to int64 (N, text_length), zeros after the end token.
        width, layers, heads, patch, image, frames: of the video encoder.
        text_width, text_layers, text_heads, text_length, vocabulary: of the text encoder.
        dim: features.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        width: int = 1024,
        layers: int = 24,
        heads: int = 16,
        patch: int = 14,
        image: int = 224,
        frames: int = 8,
        text_width: int = 768,
        text_layers: int = 12,
        text_heads: int = 12,
        text_length: int = 32,
        vocabulary: int = 49408,
        dim: int = 768,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.vision_encoder = VisionEncoder(width, layers, heads, dim, frames, patch, image)
        self.text_encoder = TextEncoder(
            text_width, text_layers, text_heads, dim, text_length, vocabulary
        )
        self.temp = nn.Parameter(torch.tensor(0.01))  # of the training; in the weights

    def encode_video(self, video: Tensor) -> Tensor:
        """Features (N, dim) of normalised videos (N, frames, 3, image, image)."""
        return self.vision_encoder(video.transpose(1, 2))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Features (N, dim) of texts; what is longer than the context is cut off."""
        return self.text_encoder(self.tokenizer(list(texts)).to(self.temp.device))
