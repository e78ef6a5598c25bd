"""VisionReward-Video, a model that answers questions about a video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla_eval.backbones.registry import Backbone, Source, WeightFile, register_backbone


class VisionReward(nn.Module):
    """Answers yes or no to questions about a video.

    Attributes:
        questions: texts, with [[prompt]] where the video's prompt belongs.
        question_weights: one a question.
    """

    def __init__(
        self, model: Any, tokenizer: Any, questions: list[str], question_weights: list[float]
    ) -> None:
        super().__init__()
        if len(questions) != len(question_weights):
            raise ValueError(f"{len(questions)} questions, {len(question_weights)} weights")
        self.model = model
        self.tokenizer = tokenizer
        self.questions = questions
        self.question_weights = question_weights

    def ask(self, frames: Tensor, question: str) -> bool:
        """The answer on uint8 frames (3, N, H, W)."""
        model, device = self.model, self.model.device
        inputs = model.build_conversation_input_ids(
            tokenizer=self.tokenizer,
            query=question,
            images=[frames.cpu()],
            history=[],
            template_version="chat",
        )
        tokens = {
            key: inputs[key].unsqueeze(0).to(device)
            for key in ("input_ids", "token_type_ids", "attention_mask")
        }
        images = [[inputs["images"][0].to(device, model.dtype)]]
        output = model.generate(
            **tokens, images=images, max_new_tokens=1, pad_token_id=128002, do_sample=False
        )
        return self.tokenizer.decode(output[0, tokens["input_ids"].shape[1]]) == "yes"


def _load_vision_reward(folder: Path, questions: Path, weights: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": True, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    lines = questions.read_text(encoding="utf-8").splitlines(keepends=True)
    return VisionReward(model, tokenizer, lines, json.loads(weights.read_text(encoding="utf-8")))


register_backbone(
    Backbone(
        "vision_reward",
        "VisionReward-Video",
        (
            Source(
                (
                    WeightFile(
                        "VisionReward-Video", "hub: THUDM/VisionReward-Video, whose code is run"
                    ),
                    WeightFile("VisionReward_video_qa_select.txt", "GitHub THUDM/VisionReward"),
                    WeightFile("weight.json", "GitHub THUDM/VisionReward, of the video model"),
                ),
                {"transformers": "pip install transformers"},
                _load_vision_reward,
            ),
        ),
        why_not_random="its code comes with its weights",
    )
)
