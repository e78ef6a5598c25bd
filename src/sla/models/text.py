"""Text encoders: captions in, embeddings and a mask out.

`TrainedTextEncoder` (over bytes or words) is trained with the model and needs no download;
`UMT5TextEncoder` is Wan's frozen one. Shapes: B captions, L tokens.
"""

from __future__ import annotations

import html
import json
import os
import re
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sla.models.dit import DiTConfig
from sla.models.identity import DTYPES, require_source, weights_checksum

TEXT_ENCODERS = ("trained", "umt5")


@runtime_checkable
class TextEncoder(Protocol):
    """What turns captions into what `VideoDiT` reads.

    A caption's embedding is a function of that caption alone, and the empty caption has one: it
    is the unconditional embedding of classifier-free guidance.

    Attributes:
        text_dim: width of the embeddings.
    """

    text_dim: int

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, text_dim) and mask (B, L) bool, True for real tokens."""
        ...


@dataclass
class TextEncoderConfig:
    """Which text encoder a model reads.

    Attributes:
        name: `trained` (a `TrainedTextEncoder`, trained with the model; its sizes are the section
            `text`) or `umt5` (Wan's, frozen; embeddings come from a latent cache).
        source: hub id or local folder of umt5's weights and tokenizer; empty for `trained`.
        revision: commit of the hub repository, all 40 digits; not used for a local folder.
        max_tokens: length that umt5 pads or cuts captions to.
        dtype: of umt5's weights: `float32`, `bfloat16` or `float16`.

    Raises:
        ValueError: a value that cannot be used; names the field and what would do.
    """

    name: str = "trained"
    source: str = ""
    revision: str = ""
    max_tokens: int = 512
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.name not in TEXT_ENCODERS:
            raise ValueError(
                f"text_encoder.name is {self.name!r}; it must be one of {', '.join(TEXT_ENCODERS)}"
            )
        if self.max_tokens < 1:
            raise ValueError(f"text_encoder.max_tokens is {self.max_tokens}; it must be at least 1")
        if self.name != "trained":
            require_source("text_encoder", self.name, self.source, self.revision, self.dtype)


@dataclass
class TrainedTextEncoderConfig:
    """Sizes of a `TrainedTextEncoder`.

    Attributes:
        text_dim: width, of the layers and of the embeddings; the model's `text_dim`.
        depth: transformer layers.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over the width.
        max_tokens: bytes of UTF-8 that are read of a caption, or words where `words` is not 0; the
            rest is cut off.
        words: 0 for tokens that are bytes. Otherwise tokens are words and punctuation marks, each
            hashed to one of so many ids: fewer tokens, and captions of few different words are
            learned sooner. Words of one id cannot be told apart.

    Raises:
        ValueError: a size that no encoder can have; names the field and what is allowed.
    """

    text_dim: int = DiTConfig.text_dim
    depth: int = 2
    num_heads: int = 2
    mlp_ratio: float = 4.0
    max_tokens: int = 127
    words: int = 0

    def __post_init__(self) -> None:
        for name in ("text_dim", "depth", "num_heads", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.words < 0:
            raise ValueError(f"words is {self.words}; it must be a number of ids, or 0 for bytes")
        if self.text_dim % self.num_heads:
            raise ValueError(
                f"text_dim is {self.text_dim}; it must be a multiple of num_heads "
                f"({self.num_heads})"
            )
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}; it must be positive")

    @property
    def identity(self) -> str:
        """What the token ids of a caption depend on. The weights are trained: no part of it."""
        if self.words:
            return f"words ids={self.words} max_tokens={self.max_tokens}"
        return f"bytes max_tokens={self.max_tokens}"


class TrainedTextEncoder(nn.Module):
    """A small transformer over the bytes of a caption, or its words, trained with the model.

    A token is a byte (0 to 255) or the hash of a word, BOS at the start, or PAD. BOS makes the
    empty caption valid.

    Attributes:
        BOS, PAD: the ids after those of bytes or words.
    """

    def __init__(self, config: TrainedTextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.text_dim = config.text_dim
        self.BOS = config.words or 256
        self.PAD = self.BOS + 1
        self.token_embedding = nn.Embedding(self.PAD + 1, config.text_dim)
        self.position_embedding = nn.Parameter(torch.empty(config.max_tokens + 1, config.text_dim))
        self.layers = nn.ModuleList(_EncoderLayer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.text_dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.02)

    @property
    def identity(self) -> str:
        """The config's: of the tokens, not of the weights."""
        return self.config.identity

    def tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Bytes or words of the captions, on the CPU.

        A longer caption is cut at a whole character or word. The length is always max_tokens + 1,
        so that a compiled model sees one shape.

        Args:
            captions: B strings, possibly empty.

        Returns:
            ids (B, max_tokens + 1) int64 and mask (B, max_tokens + 1) bool.

        Raises:
            TypeError: a single string, or an item that is not a string.
        """
        _check_captions(captions)
        words, most = self.config.words, self.config.max_tokens
        rows = [(self.BOS, *_tokens_of(caption, words, most)) for caption in captions]
        padded = [row + (self.PAD,) * (most + 1 - len(row)) for row in rows]
        ids = torch.tensor(padded, dtype=torch.int64).view(len(captions), most + 1)
        return ids, ids != self.PAD

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode tokens.

        Args:
            ids: (B, L) int64, L <= max_tokens + 1.
            mask: (B, L) bool, True for real tokens.

        Returns:
            (B, L, text_dim) in the weights' dtype; zero where the mask is False.

        Raises:
            ValueError: shapes that do not fit.
        """
        if ids.ndim != 2 or ids.shape[1] > self.config.max_tokens + 1:
            raise ValueError(
                f"ids have shape {tuple(ids.shape)}; they must be (B, L), "
                f"L at most {self.config.max_tokens + 1}"
            )
        if mask.shape != ids.shape:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}; it must be {tuple(ids.shape)}, as ids"
            )
        hidden = self.token_embedding(ids) + self.position_embedding[: ids.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.norm(hidden).to(hidden.dtype) * mask.unsqueeze(-1)

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, max_tokens + 1, text_dim) and mask, on the encoder's device."""
        ids, mask = self.tokenize(captions)
        device = self.position_embedding.device
        # Blocking copies would wait for all that the device was given before.
        ids, mask = ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)
        return self(ids, mask), mask


@lru_cache(maxsize=16384)  # every pass over a set has the same captions
def _tokens_of(caption: str, words: int, most: int) -> tuple[int, ...]:
    if words:
        found = re.findall(r"\w+|[^\w\s]", caption.lower())[:most]
        return tuple(zlib.crc32(word.encode("utf-8", "replace")) % words for word in found)
    data = caption.encode("utf-8", errors="replace")[:most]
    return tuple(data.decode("utf-8", errors="ignore").encode("utf-8"))


class _EncoderLayer(nn.Module):
    """Pre-norm transformer layer; masked tokens are never attended to."""

    def __init__(self, config: TrainedTextEncoderConfig) -> None:
        super().__init__()
        dim = config.text_dim
        mlp_width = round(config.mlp_ratio * dim)
        self.num_heads = config.num_heads
        self.norm_attention = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_width), nn.GELU(approximate="tanh"), nn.Linear(mlp_width, dim)
        )

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        projected = self.query_key_value(self.norm_attention(hidden))
        query, key, value = (
            projected.unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        hidden = hidden + self.output(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.norm_mlp(hidden))


class UMT5TextEncoder(nn.Module):
    """Wan's text encoder: the encoder of UMT5, frozen.

    Stays in evaluation mode, has no gradients, and is never part of our checkpoints. Embeddings
    are zero where the mask is False, as Wan pads them; Wan's own cross-attention then attends to
    those zeros too, so an adapter of Wan passes it no mask.

    Args:
        encoder: transformers' `UMT5EncoderModel`.
        tokenizer: its tokenizer.
        max_tokens: length every caption is padded or cut to; 512 in Wan.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any, max_tokens: int = 512) -> None:
        super().__init__()
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
        self.encoder = encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.text_dim = int(encoder.config.d_model)  # type: ignore[union-attr, arg-type]

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        encoder_subfolder: str = "text_encoder",
        tokenizer_subfolder: str = "tokenizer",
        max_tokens: int = 512,
        dtype: torch.dtype = torch.bfloat16,
        local_files_only: bool = False,
    ) -> UMT5TextEncoder:
        """Load from a hub id (`Wan-AI/Wan2.1-T2V-1.3B-Diffusers`) or a local folder.

        Args:
            name_or_folder: hub id, or folder with the two subfolders.
            revision: branch, tag or commit on the hub; name a commit to be reproducible.
            encoder_subfolder, tokenizer_subfolder: where the parts lie; "" for the top.
            max_tokens: see the class.
            dtype: dtype of the weights.
            local_files_only: never ask the network.

        Raises:
            FileNotFoundError: files are not there and could not be had; says which to fetch.
            ValueError: the weights do not fill the encoder.
        """
        # Heavy, and only needed here.
        from transformers import AutoTokenizer, UMT5EncoderModel

        name = os.fspath(name_or_folder)
        where: dict[str, Any] = {"local_files_only": local_files_only}
        if revision is not None:
            where["revision"] = revision
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, subfolder=tokenizer_subfolder, **where)
            loaded: Any = UMT5EncoderModel.from_pretrained(
                name, subfolder=encoder_subfolder, dtype=dtype, output_loading_info=True, **where
            )
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                _missing_message(name, encoder_subfolder, tokenizer_subfolder, error)
            ) from error
        encoder, report = loaded
        # transformers fills what a file lacks with random numbers and only logs it.
        lacking = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
        if lacking:
            raise ValueError(f"{name}: the file does not fill these weights: {', '.join(lacking)}")
        return cls(encoder, tokenizer, max_tokens)

    @property
    def identity(self) -> str:
        """Name and checksum of weights and tokenizer: what embeddings depend on. Reads them all."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is None:
            rules = self.tokenizer.get_vocab()
        else:
            rules = json.loads(fast.to_str())
            for state in ("truncation", "padding"):  # set by each call
                rules.pop(state, None)
        checksum = weights_checksum(self.encoder, {"tokenizer": rules})
        return f"{type(self.encoder).__name__} max_tokens={self.max_tokens} sha256:{checksum}"

    def train(self, mode: bool = True) -> UMT5TextEncoder:
        """Does nothing: the encoder is frozen and stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, max_tokens, d_model) and mask, on the encoder's device."""
        _check_captions(captions)
        tokens = self.tokenizer(
            [clean_caption(caption) for caption in captions],
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        device = next(self.encoder.parameters()).device
        ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
        mask = mask.bool()
        return hidden.masked_fill(~mask.unsqueeze(-1), 0.0), mask


class FrozenTextEncoder:
    """Keeps a frozen encoder out of the module that uses it: not moved, averaged or saved with it.

    Args:
        encoder: stays on its device; its embeddings come from there.
    """

    def __init__(self, encoder: UMT5TextEncoder) -> None:
        self.encoder = encoder
        self.text_dim = encoder.text_dim

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTextEncoder:
        return self  # averaging the weights copies the module

    @cached_property
    def identity(self) -> str:
        """The encoder's."""
        return self.encoder.identity

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """The encoder's embeddings and mask."""
        return self.encoder.encode(captions)


def build_text_encoder(
    config: TextEncoderConfig, sizes: TrainedTextEncoderConfig
) -> TrainedTextEncoder | FrozenTextEncoder:
    """The text encoder of a config: freshly initialised if it is trained, else with its weights.

    Args:
        sizes: of the `trained` encoder.

    Raises:
        FileNotFoundError, ValueError: from `UMT5TextEncoder.from_pretrained`.
    """
    if config.name == "trained":
        return TrainedTextEncoder(sizes)
    return FrozenTextEncoder(
        UMT5TextEncoder.from_pretrained(
            config.source,
            revision=config.revision or None,
            max_tokens=config.max_tokens,
            dtype=DTYPES[config.dtype],
        )
    )


def clean_caption(caption: str) -> str:
    """Wan's cleaning without its optional ftfy: HTML entities resolved, white space collapsed."""
    return " ".join(html.unescape(html.unescape(caption)).split())


def _check_captions(captions: list[str]) -> None:
    if isinstance(captions, str):
        raise TypeError("captions is one string; it must be a list of strings")
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"captions[{index}] is a {type(caption).__name__}; it must be a string")


def _missing_message(name: str, encoder: str, tokenizer: str, error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0]
    parts = [part for part in (encoder, tokenizer) if part]
    # A path, rather than a hub id `owner/name`.
    local = Path(name).exists() or Path(name).is_absolute() or name.startswith(".")
    if local:
        folders = " and ".join(f"{name}/{part}" for part in parts) or name
        fetch = f"the folder must hold the encoder and the tokenizer in {folders}"
    else:
        include = "".join(f' --include "{part}/*"' for part in parts)
        fetch = (
            f"fetch them once with `hf download {name}{include} --local-dir FOLDER` "
            "and give FOLDER instead of the name, or put them into the hub's cache"
        )
    return f"no UMT5 text encoder in {name!r}: {fetch} ({first_line})"


__all__ = [
    "FrozenTextEncoder",
    "TextEncoder",
    "TextEncoderConfig",
    "TrainedTextEncoder",
    "TrainedTextEncoderConfig",
    "UMT5TextEncoder",
    "build_text_encoder",
    "clean_caption",
]
