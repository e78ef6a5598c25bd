"""CLIP, from OpenAI's files by open_clip or from a folder of the hub by transformers."""

from __future__ import annotations

import contextlib
import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla_eval.backbones.registry import EVAL_EXTRA, Backbone, Source, WeightFile, register_backbone


class ClipBackbone(nn.Module, ABC):
    """What the CLIP metrics call: images and texts to features of one space.

    On a GPU products are in float16: OpenAI's loader, by which VBench and CLIPScore take it, makes
    a float16 network there (and a float32 one on a CPU).
    """

    @abstractmethod
    def encode_image(self, images: Tensor) -> Tensor:
        """Features (N, D) of normalised images (N, 3, 224, 224)."""

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Features (N, D) of texts; what is longer than the context is cut off."""


def _half_on_gpu(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    on_gpu = device.type == "cuda"
    return torch.autocast("cuda", torch.float16) if on_gpu else contextlib.nullcontext()


class OpenClip(ClipBackbone):
    """CLIP as open_clip loads it from OpenAI's own file."""

    def __init__(self, model: nn.Module, tokenizer: Callable[[list[str]], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    def encode_image(self, images: Tensor) -> Tensor:
        with _half_on_gpu(images.device):
            return self.model.encode_image(images)  # type: ignore[operator]

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(list(texts)).to(device)
        with _half_on_gpu(device):
            return self.model.encode_text(tokens)  # type: ignore[operator]


class TransformersClip(ClipBackbone):
    """CLIP as transformers loads it from a folder of the hub."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    def encode_image(self, images: Tensor) -> Tensor:
        with _half_on_gpu(images.device):
            pooled = self.model.vision_model(pixel_values=images).pooler_output
            return self.model.visual_projection(pooled)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        tokens = tokens.to(self.model.device)
        with _half_on_gpu(self.model.device):
            return self.model.text_projection(self.model.text_model(**tokens).pooler_output)


def _load_open_clip(path: Path) -> nn.Module:
    import open_clip

    model = open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
    return OpenClip(model, open_clip.get_tokenizer("ViT-B-32"))  # one tokenizer for all of them


def _random_open_clip(architecture: str) -> nn.Module:
    import open_clip

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that the weights are random
    try:
        model = open_clip.create_model(
            architecture, pretrained=None, precision="fp32", device=torch.get_default_device()
        )
    finally:
        logger.setLevel(level)
    return OpenClip(model, open_clip.get_tokenizer("ViT-B-32"))


def _load_transformers_clip(folder: Path) -> nn.Module:
    from transformers import CLIPModel, CLIPTokenizer

    loaded: Any = CLIPModel.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
    )
    model, info = loaded
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    # Buffers that some versions saved; they hold 0, 1, 2, ... and are made anew.
    wrong = [key for key in wrong if not str(key).endswith("position_ids")]
    if wrong:
        raise ValueError(f"parameters missing, unknown or of another shape: {wrong[:5]}")
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return TransformersClip(model, tokenizer)


def _clip(name: str, title: str, file: str, sha256: str, hub_id: str) -> None:
    register_backbone(
        Backbone(
            name,
            title,
            (
                Source(
                    (
                        WeightFile(
                            file, f"OpenAI's {title}, as GitHub openai/CLIP names it", sha256
                        ),
                    ),
                    {"open_clip": EVAL_EXTRA, "torchvision": EVAL_EXTRA},
                    _load_open_clip,
                ),
                Source(
                    (WeightFile(hub_id.split("/")[1], f"hub: {hub_id}, the whole folder"),),
                    {"transformers": "pip install transformers"},
                    _load_transformers_clip,
                ),
            ),
            # open_clip's name of what it builds from OpenAI's file.
            random=functools.partial(_random_open_clip, f"{file.removesuffix('.pt')}-quickgelu"),
        )
    )


_clip(
    "clip_vit_b32",
    "CLIP ViT-B/32",
    "ViT-B-32.pt",
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "openai/clip-vit-base-patch32",
)
_clip(
    "clip_vit_l14",
    "CLIP ViT-L/14",
    "ViT-L-14.pt",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "openai/clip-vit-large-patch14",
)
