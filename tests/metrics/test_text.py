"""Metrics that compare a video with its prompt, with small networks in place of CLIP and ViCLIP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sla_eval import backbones
from sla_eval.metrics import ClipScore, OverallConsistency
from sla_eval.preprocessing import CLIP_MEAN, CLIP_STD, clip_frames
from sla_eval.viclip import ViCLIP
from torch import Tensor, nn


class Clip(nn.Module):
    """Features of frames by their mean colour, of texts by their letters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(3 * 49, 8, generator=generator)
        self.texts = torch.randn(128, 8, generator=generator)
        self.frames_seen = 0

    def encode_image(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, 224, 224)
        self.frames_seen += len(images)
        return F.avg_pool2d(images, 32).flatten(1) @ self.images

    def encode_video(self, videos: Tensor) -> Tensor:
        assert videos.shape[1:] == (8, 3, 224, 224)
        return torch.stack([self.encode_image(video).mean(dim=0) for video in videos])

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self.texts[[ord(c) for c in text]].sum(dim=0) for text in texts])


def random_video(frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, 40, 56), dtype=torch.uint8, generator=generator)


def test_clip_score_is_the_mean_of_the_frames_cosines_not_below_zero() -> None:
    features = torch.tensor([[3.0, 4.0], [-1.0, 0.0], [5.0, 0.0], [0.0, 2.0]])
    clip = SimpleNamespace(
        encode_image=lambda frames: features, encode_text=lambda texts: torch.tensor([[2.0, 0.0]])
    )
    metric = ClipScore(backbone=clip)
    metric.update(random_video(4), prompt="a cat")
    assert metric.compute().item() == pytest.approx(100 * (0.6 + 0 + 1 + 0) / 4, abs=1e-4)


def test_clip_score_equals_torchmetrics_formula() -> None:
    clip, video = Clip(), random_video(5)
    metric = ClipScore(backbone=clip, batch_size=2)
    for prompt in ("a red ball", "zebra"):
        metric.reset()
        metric.update(video, prompt=prompt)
        # torchmetrics.functional.multimodal.clip_score, of each frame with the prompt.
        images = clip.encode_image(clip_frames(video))
        images = images / images.norm(p=2, dim=-1, keepdim=True)
        text = clip.encode_text([prompt])
        text = text / text.norm(p=2, dim=-1, keepdim=True)
        expected = (100 * (images * text).sum(dim=-1)).clamp_min(0).mean().item()
        assert metric.compute().item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_clip_score_in_batches(size: int) -> None:
    clip = Clip()
    scores = []
    for batch in (7, size):
        metric = ClipScore(backbone=clip, batch_size=batch)
        metric.update(random_video(7), prompt="hello")
        scores.append(metric.compute().item())
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert clip.frames_seen == 14


@pytest.mark.parametrize("cls", [ClipScore, OverallConsistency])
@pytest.mark.parametrize("prompt", [None, "", "  "])
def test_a_prompt_is_needed(
    cls: type[ClipScore] | type[OverallConsistency], prompt: str | None
) -> None:
    metric = cls(backbone=Clip())
    with pytest.raises(ValueError, match=f"prompt must be given: {cls.name}"):
        metric.update(random_video(8), prompt=prompt)
    assert metric.per_video == []


def test_overall_consistency_is_the_cosine_of_eight_frames() -> None:
    clip = Clip()
    seen = []
    encode = clip.encode_video

    def remember(videos: Tensor) -> Tensor:
        seen.append(videos)
        return encode(videos)

    clip.encode_video = remember  # type: ignore[method-assign]
    video = torch.arange(0, 160, 10, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 3, 32, 32)
    metric = OverallConsistency(backbone=clip)
    metric.update(video, prompt="a cat")
    level = seen[0][0, :, 0].mean(dim=(1, 2)) * CLIP_STD[0] + CLIP_MEAN[0]
    assert (level * 255).round().tolist() == [0, 20, 40, 60, 80, 100, 120, 140]
    expected = F.cosine_similarity(encode(seen[0]), clip.encode_text(["a cat"]))
    assert metric.compute().item() == pytest.approx(expected.item(), abs=1e-6)
    assert -1 <= metric.compute().item() <= 1
    short = OverallConsistency(backbone=clip)
    short.update(video[:3], prompt="a cat")
    level = seen[1][0, :, 0].mean(dim=(1, 2)) * CLIP_STD[0] + CLIP_MEAN[0]
    assert (level * 255).round().tolist() == [0, 10, 20, 20, 20, 20, 20, 20]


def small_viclip() -> ViCLIP:
    def tokenizer(texts: list[str]) -> Tensor:
        tokens = torch.zeros(len(texts), 12, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            codes = [98, *[ord(c) % 90 + 1 for c in text][:10], 99]
            row[: len(codes)] = torch.tensor(codes)
        return tokens

    torch.manual_seed(0)
    network = ViCLIP(
        tokenizer,
        width=32,
        layers=2,
        heads=4,
        patch=8,
        image=16,
        frames=4,
        text_width=16,
        text_layers=2,
        text_heads=2,
        text_length=12,
        vocabulary=100,
        dim=10,
    ).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


@torch.no_grad()
def test_viclip_sees_every_frame_in_its_place() -> None:
    network = small_viclip()
    video = torch.randn(2, 4, 3, 16, 16)
    features = network.encode_video(video)
    assert features.shape == (2, 10)
    torch.testing.assert_close(network.encode_video(video[1:]), features[1:])
    for t in range(4):
        changed = video.clone()
        changed[0, t] += 1
        assert not torch.allclose(network.encode_video(changed)[0], features[0])
    assert not torch.allclose(network.encode_video(video.flip(1)), features)
    # Without its temporal embedding the order of the frames is not seen.
    network.vision_encoder.temporal_positional_embedding.zero_()
    torch.testing.assert_close(
        network.encode_video(video.flip(1)), network.encode_video(video), atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_viclip_reads_a_text_up_to_its_end_and_no_further() -> None:
    network = small_viclip()
    texts = ["cat", "a dog runs"]
    features = network.encode_text(texts)
    torch.testing.assert_close(features[:1], network.encode_text(texts[:1]))
    assert not torch.allclose(network.encode_text(["cats"]), features[:1])
    # What comes after the end token changes nothing.
    tokens = network.tokenizer(texts)
    expected = network.text_encoder(tokens)
    tokens[0, 6:] = 5
    torch.testing.assert_close(network.text_encoder(tokens)[0], expected[0])


def test_viclip_has_the_published_parameters() -> None:
    with torch.device("meta"):
        network = ViCLIP(lambda texts: torch.zeros(len(texts), 32))
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert len(shapes) == 447
    assert shapes["vision_encoder.conv1.weight"] == (1024, 3, 1, 14, 14)
    assert shapes["vision_encoder.temporal_positional_embedding"] == (1, 8, 1024)
    assert shapes["vision_encoder.transformer.resblocks.23.attn.in_proj_weight"] == (3072, 1024)
    assert shapes["text_encoder.positional_embedding"] == (32, 768)
    assert shapes["temp"] == ()


def test_clip_loads_from_a_folder_of_the_hub_and_is_strict(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(
        text_config={
            **text, "num_attention_heads": 2, "vocab_size": 7, "eos_token_id": 6, "bos_token_id": 5
        },
        vision_config={**text, "num_attention_heads": 2, "image_size": 224, "patch_size": 32},
        projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    folder = tmp_path / "clip-vit-base-patch32"
    model.save_pretrained(folder)
    words = ["c", "a", "t</w>", "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    assert backbones.missing_backbone("clip_vit_b32", tmp_path) is None
    clip = backbones.load_backbone("clip_vit_b32", tmp_path)
    assert isinstance(clip, backbones.ClipBackbone)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(images).pooler_output)
        torch.testing.assert_close(clip.encode_image(images), expected)
        assert clip.encode_text(["c", "cat cat " * 60]).shape == (2, 12)
    metric = ClipScore(backbone=clip)
    metric.update(random_video(2), prompt="cat")
    assert 0 <= metric.compute().item() <= 100
    # A parameter less is an error, not a random parameter.
    state = model.state_dict()
    model.save_pretrained(
        folder, state_dict={k: v for k, v in state.items() if "visual_projection" not in k}
    )
    with pytest.raises(backbones.BackboneUnavailableError, match="visual_projection"):
        backbones.load_backbone("clip_vit_b32", tmp_path)
