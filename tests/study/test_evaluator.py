"""The evaluator learns what is there to be seen; labels and prompts are those of the shards."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sla_eval.metrics.frechet import frechet_distance

from sla.data.module import DataConfig
from sla.study.evaluator import Evaluator, find, load_evaluator, train_evaluator
from sla.study.labels import read_labels, read_prompts
from sla.study.plan import EvaluatorConfig, StudyError
from sla.study.stills import Stills
from sla.study.testing import coloured_square, write_coloured_shards
from sla.training.config import TrainerConfig

CONFIG = EvaluatorConfig(
    weights="evaluator.safetensors",
    attributes=["colour", "motion"],
    width=16,
    features=16,
    steps=60,
    batch_size=12,
    learning_rate=5e-3,
)


def data(root: Path) -> DataConfig:
    return DataConfig(
        source="webdataset",
        shards=[f"{root}/train-*.tar"],
        shard_cache=str(root / "cache"),
        num_frames=4,
        height=16,
        width=16,
        frame_stride=[1],
        crop_scale=[1.0],
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_coloured_shards(folder, train=24, test=12)
    return folder


def test_it_learns_colours_and_motions_of_new_clips(root: Path) -> None:
    config = replace(CONFIG, weights=str(root / CONFIG.weights))
    shards = [f"{root}/test-*.tar"]
    trained = train_evaluator(config, data(root), shards, TrainerConfig(accelerator="cpu"))
    assert {name: values.shape for name, values in trained.accuracy.items()} == {
        "colour": (12,),
        "motion": (12,),
    }
    assert trained.accuracy["colour"].mean() == 1
    assert trained.accuracy["motion"].mean() == 1

    evaluator, reference = load_evaluator(trained.path)
    assert reference.shape == (12, 16)
    assert evaluator.classes == {"colour": ["blue", "green", "red"], "motion": ["left", "right"]}
    videos = np.stack([coloured_square("red", "left", 80), coloured_square("blue", "right", 80)])
    wanted = [{"colour": "red", "motion": "left"}, {"colour": "blue", "motion": "left"}]
    found = find(evaluator, videos, wanted, torch.device("cpu"))
    assert found.correct["colour"].tolist() == [1, 1]
    assert found.correct["motion"].tolist() == [1, 0]  # the second moves to the other side
    # Clips of one kind are further from the real ones than the real ones are from themselves.
    alike = torch.from_numpy(np.stack([found.features[0]] * 4))
    assert frechet_distance(alike, reference) > 10 * frechet_distance(reference, reference) + 1e-3


def test_the_seed_decides_what_is_trained(root: Path, tmp_path: Path) -> None:
    few = {"width": 8, "steps": 3, "batch_size": 4, "stills": ["colour"]}
    networks = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(networks))  # whatever was drawn before
        config = replace(CONFIG, **few, seed=seed, weights=str(tmp_path / "x.safetensors"))
        shards = [f"{root}/test-*.tar"]
        train_evaluator(config, data(root), shards, TrainerConfig(accelerator="cpu"))
        networks.append(load_evaluator(tmp_path / "x.safetensors")[0].state_dict())
    first, again, other = networks
    for name, tensor in first.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(first["stills.stem.weight"], other["stills.stem.weight"])


def test_stills_are_told_without_colours_and_motion() -> None:
    config = replace(CONFIG, attributes=["colour", "shape"], stills=["shape"])
    evaluator = Evaluator(config, {"colour": ["blue", "red"], "shape": ["ball", "cube"]}).eval()
    grey = torch.rand(2, 1, 8, 16, 16) - 0.5
    other = grey[:, :, torch.randperm(8)] + torch.tensor([0.1, 0.0, -0.299 / 1.14]).view(3, 1, 1, 1)
    (_, plain), (_, changed) = evaluator(grey.expand(-1, 3, -1, -1, -1)), evaluator(other)
    torch.testing.assert_close(plain["shape"], changed["shape"])
    assert (plain["colour"] - changed["colour"]).abs().max() > 1e-4


def bars(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips (count, 3, 4, 16, 16) of a bar across or upright, somewhere; 0 or 1 for each."""
    video, upright = torch.full((count, 3, 4, 16, 16), -0.5), torch.arange(count) % 2
    for clip, turned in zip(video, upright.tolist(), strict=True):
        top, left = torch.randint(0, 7, (2,)).tolist()
        across = clip.transpose(-1, -2) if turned else clip
        across[:, :, top : top + 3, left : left + 9] = 0.5
    return video, upright


def test_stills_learn_shapes_through_what_training_does_to_them() -> None:
    config = replace(CONFIG, attributes=["shape"], stills=["shape"], weights="")
    stills = Stills(config, {"shape": ["across", "upright"]})
    optimizer = torch.optim.AdamW(stills.parameters(), 2e-3)
    for _ in range(40):
        video, upright = bars(16)
        logits = stills(video)["shape"]
        loss = F.cross_entropy(logits.flatten(0, 1), upright.repeat_interleave(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    video, upright = bars(40)
    found = stills.eval()(video)["shape"].mean(1).argmax(1)
    assert (found == upright).float().mean() > 0.9


def test_one_frame_is_a_clip_too() -> None:
    evaluator = Evaluator(CONFIG, {"colour": ["blue", "red"]})
    features, logits = evaluator(torch.zeros(2, 3, 1, 64, 64))
    assert features.shape == (2, 16)
    assert logits["colour"].shape == (2, 2)


def test_clips_without_attributes_have_no_target() -> None:
    evaluator = Evaluator(CONFIG, {"colour": ["blue", "red"]})
    targets = evaluator.targets([{"colour": "red"}, {"colour": None}, {}, {"colour": "pink"}])
    assert targets["colour"].tolist() == [1, -1, -1, -1]


def test_prompts_are_spread_over_the_clips(root: Path) -> None:
    labels = read_labels([f"{root}/test-*.tar"], ["colour", "size"])
    assert labels["test-00000/000003"] == {"colour": "green", "size": None}
    prompts = read_prompts([f"{root}/test-*.tar"], ["colour"], 3)
    assert [prompt.id for prompt in prompts] == [f"test-00000/{k:06d}" for k in (2, 6, 10)]
    assert prompts[0].text == "A green square moves to the left."
    assert prompts[0].attributes == {"colour": "green"}
    assert read_prompts([f"{root}/test-*.tar"], [], 1, "colour")[0].text == "red"
    with pytest.raises(StudyError, match="no clip of"):
        read_prompts([f"{root}/test-*.tar"], ["size"], 3)


def test_what_cannot_be_trained_or_loaded_is_refused(root: Path, tmp_path: Path) -> None:
    wrong = replace(CONFIG, attributes=["size"], weights=str(tmp_path / "x.safetensors"))
    with pytest.raises(StudyError, match="nothing to tell apart"):
        train_evaluator(wrong, data(root), [f"{root}/test-*.tar"], TrainerConfig())
    with pytest.raises(StudyError, match="which is no file"):
        load_evaluator(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(StudyError, match="not an evaluator"):
        load_evaluator(tmp_path / "bad")
