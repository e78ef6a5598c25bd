"""Where weights are looked for, and what is said when they are missing or wrong."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from sla_eval import backbones
from sla_eval.backbones import (
    Backbone,
    BackboneUnavailableError,
    Source,
    WeightFile,
    available_backbones,
    backbone_table,
    comes_with_weights,
    load_backbone,
    missing_backbone,
    missing_random_backbone,
    random_backbone,
    register_backbone,
    registry,
    weight_checksums,
    weights_folder,
)
from sla_eval.backbones.clip import OpenClip
from sla_eval.metrics import FVD, AestheticQuality, MetricUnavailableError, metric_class
from sla_eval.metrics.registry import available_metrics
from torch import nn


def load_linear(path: Path) -> nn.Module:
    network = nn.Linear(2, 1)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKBONES", dict(registry._BACKBONES))
    monkeypatch.delenv("SLA_EVAL_WEIGHTS", raising=False)


def register(sha256: str | None = None, package: str | None = None) -> None:
    packages = {} if package is None else {package: f"pip install {package}"}
    file = WeightFile("small.pth", "the shelf", sha256)
    register_backbone(
        Backbone("small", "A small network", (Source((file,), packages, load_linear),))
    )


def test_folder_is_the_argument_then_the_variable_then_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLA_EVAL_WEIGHTS", raising=False)
    assert weights_folder() == Path("weights")
    monkeypatch.setenv("SLA_EVAL_WEIGHTS", "elsewhere")
    assert weights_folder() == Path("elsewhere")
    assert weights_folder("given") == Path("given")


@pytest.mark.usefixtures("own_registry")
def test_loads_what_is_there_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.pth"
    torch.save(nn.Linear(2, 1).state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    register(sha256=digest[:8])
    assert missing_backbone("small", tmp_path) is None
    network = load_backbone("small", tmp_path)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert weight_checksums("small", tmp_path) == {"small.pth": digest}
    monkeypatch.setenv("SLA_EVAL_WEIGHTS", str(tmp_path))
    assert missing_backbone("small") is None


@pytest.mark.usefixtures("own_registry")
def test_says_what_is_missing(tmp_path: Path) -> None:
    register(package="no_such_package")
    text = missing_backbone("small", tmp_path)
    assert text is not None
    assert "\n" not in text
    for part in ("A small network", "pip install no_such_package", "small.pth", "the shelf"):
        assert part in text
    assert str(tmp_path) in text
    for call in (load_backbone, weight_checksums):
        with pytest.raises(BackboneUnavailableError, match="A small network is missing"):
            call("small", tmp_path)


@pytest.mark.usefixtures("own_registry")
def test_another_file_of_the_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.pth"
    torch.save(nn.Linear(2, 1).state_dict(), path)
    register(sha256="0" * 64)
    with pytest.raises(BackboneUnavailableError, match="is not the published file: its SHA-256"):
        load_backbone("small", tmp_path)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"weight": torch.zeros(1, 2)}, "Missing key"),
        ({"weight": torch.zeros(1, 2), "bias": torch.zeros(1), "x": torch.zeros(1)}, "Unexpected"),
        ({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, "size mismatch"),
        (b"not weights", "cannot load A small network"),
    ],
)
def test_loading_is_strict(tmp_path: Path, content: object, reason: str) -> None:
    path = tmp_path / "small.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    register()
    with pytest.raises(BackboneUnavailableError, match=reason) as caught:
        load_backbone("small", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("own_registry")
def test_the_first_complete_source_is_taken(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 1).state_dict(), tmp_path / "b.pth")
    sources = tuple(
        Source((WeightFile(name, "the shelf"),), {}, load_linear) for name in ("a.pth", "b.pth")
    )
    register_backbone(Backbone("two", "Two ways", sources))
    assert weight_checksums("two", tmp_path).keys() == {"b.pth"}
    assert isinstance(load_backbone("two", tmp_path), nn.Linear)
    text = missing_backbone("two", tmp_path / "empty")
    assert text is not None
    assert "a.pth" in text
    assert "; or: b.pth" in text


class Zeros(nn.Linear):
    """As a constructor leaves what is always loaded."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.token = nn.Parameter(torch.zeros(4))


@pytest.mark.usefixtures("own_registry")
def test_random_weights_are_always_the_same_and_no_zeros() -> None:
    source = Source((WeightFile("small.pth", "the shelf"),), {}, load_linear)
    register_backbone(Backbone("drawn", "A drawn network", (source,), random=Zeros))
    assert missing_random_backbone("drawn") is None
    state = torch.get_rng_state()
    first, second = random_backbone("drawn"), random_backbone("drawn")
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are his"
    assert not first.training
    assert first.state_dict().keys() == {"weight", "bias", "token"}
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert not one.requires_grad
        assert one.any()
        assert torch.equal(one, other)


@pytest.mark.usefixtures("own_registry")
def test_what_cannot_have_random_weights_says_why() -> None:
    source = Source((WeightFile("small.pth", "the shelf"),), {"no_such_package": "how"}, Zeros)
    register_backbone(Backbone("packaged", "A", (source,), random=Zeros))
    register_backbone(Backbone("filed", "B", (source,), why_not_random="it is all in its file"))
    register_backbone(Backbone("whole", "C", (Source((), {}, Zeros),)))
    with pytest.raises(BackboneUnavailableError, match=r"A is missing: .*no_such_package \(how\)"):
        random_backbone("packaged")
    with pytest.raises(BackboneUnavailableError, match="B with random weights: it is all in its"):
        random_backbone("filed")
    assert not random_backbone("whole").token.any(), "its own weights, as loaded"
    assert [comes_with_weights(name) for name in ("packaged", "filed", "whole")] == [0, 0, 1]


@pytest.mark.parametrize("name", available_backbones())
def test_every_network_can_be_built_or_says_why_not(name: str) -> None:
    backbone = backbones.get_backbone(name)
    without_files = comes_with_weights(name)
    assert (backbone.random is not None) + bool(backbone.why_not_random) + without_files == 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dino_vitb16", [torch.zeros(1, 3, 224, 224)]),
        ("inception_v3", [torch.zeros(1, 3, 64, 64, dtype=torch.uint8)]),
        ("lpips_alex", [torch.zeros(1, 3, 64, 64)] * 2),
        ("raft", [torch.zeros(1, 3, 128, 128)] * 2),
    ],
)
def test_networks_with_random_weights_run(name: str, arguments: list[torch.Tensor]) -> None:
    if missing := missing_random_backbone(name):
        pytest.skip(missing)
    output = random_backbone(name)(*arguments)
    assert output.isfinite().all()
    if name == "raft":
        assert not output.any(), "no video ends early"


def test_a_random_clip_is_what_open_clip_makes_of_openais_file() -> None:
    openai = pytest.importorskip("open_clip.openai", exc_type=ImportError)
    drawn = random_backbone("clip_vit_b32").model
    state = dict(drawn.state_dict())
    made = openai.build_model_from_openai_state_dict(state, cast_dtype=None).float()
    assert repr(made) == repr(drawn)
    image = torch.rand(1, 3, 224, 224)
    half = made.encode_image(image)  # its weights went through float16
    assert torch.allclose(drawn.encode_image(image), half, rtol=1e-2, atol=1e-2)


class Product(torch.nn.Module):
    """What open_clip's model is called as."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 2))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images @ self.weight

    encode_text = encode_image


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    ],
)
def test_clip_computes_as_openais_loader_makes_it(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    clip = OpenClip(Product(), lambda texts: torch.ones(len(texts), 4)).to(device)
    assert clip.encode_image(torch.ones(3, 4, device=device)).dtype == dtype
    assert clip.encode_text(["a", "b"]).dtype == dtype


@pytest.mark.usefixtures("own_registry")
def test_names_are_unique_and_known(tmp_path: Path) -> None:
    register()
    with pytest.raises(ValueError, match="'small' is registered"):
        register()
    with pytest.raises(ValueError, match="unknown backbone 'large'"):
        missing_backbone("large", tmp_path)


@pytest.mark.parametrize(
    ("name", "there"),
    [("torch", True), ("torch.nn", True), ("torch.no_such", False), ("no_such.thing", False)],
)
def test_packages_are_found_without_importing_them(name: str, there: bool) -> None:
    assert registry._has_package(name) is there


def test_table_says_what_is_known_of_each_file() -> None:
    table = backbone_table()
    for name in available_backbones():
        assert f"| {name} |" in table
    assert "not known, not checked" in table
    assert "6726825d… (beginning)" in table
    for backbone in map(backbones.get_backbone, available_backbones()):
        for file in (file for source in backbone.sources for file in source.files):
            assert file.sha256 is None or len(file.sha256) in (8, 64)


@pytest.mark.parametrize("name", available_metrics())
def test_metrics_name_backbones_that_exist(name: str, tmp_path: Path) -> None:
    cls = metric_class(name)
    assert set(cls.backbones) <= set(available_backbones())
    reason = cls.availability(tmp_path)
    if any(f.path for b in cls.backbones for s in backbones.get_backbone(b).sources
           for f in s.files):  # fmt: skip
        assert reason is not None
        assert "\n" not in reason
        with pytest.raises(MetricUnavailableError):
            cls(weights_dir=tmp_path)


def test_aesthetic_head_loads_and_the_other_half_is_named(tmp_path: Path) -> None:
    torch.save(nn.Linear(768, 1).state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    assert load_backbone("laion_aesthetic", tmp_path)(torch.zeros(3, 768)).shape == (3, 1)
    assert "CLIP ViT-L/14" in (AestheticQuality.availability(tmp_path) or "")


def test_amt_is_built_from_a_copy_of_its_code_and_leaves_no_modules(tmp_path: Path) -> None:
    networks = tmp_path / "AMT" / "networks"
    networks.mkdir(parents=True)
    (tmp_path / "AMT" / "utils").mkdir()
    (tmp_path / "AMT" / "utils" / "halves.py").write_text("HALF = 0.5\n")
    (networks / "AMT-S.py").write_text(
        "import torch\n"
        "from utils.halves import HALF\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self, corr_radius, corr_lvls, num_flows):\n"
        "        super().__init__()\n"
        "        self.gain = torch.nn.Parameter(torch.zeros(()))\n"
        "    def forward(self, a, b, time, scale_factor, eval):\n"
        "        assert (time == HALF).all() and scale_factor == 1.0 and eval\n"
        "        return {'imgt_pred': self.gain * ((1 - time) * a + time * b)}\n"
    )
    torch.save({"state_dict": {"gain": torch.tensor(1.0)}}, tmp_path / "amt-s.pth")
    before = set(sys.modules), list(sys.path)
    network = load_backbone("amt_s", tmp_path)
    assert not {m for m in set(sys.modules) - before[0] if m.split(".")[0] in ("networks", "utils")}
    assert sys.path == before[1]
    frames = torch.zeros(2, 3, 16, 16)
    assert network(frames, frames + 1).eq(0.5).all()


class ScriptedVideoNetwork(nn.Module):
    """What the published TorchScript of I3D takes."""

    def forward(
        self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool
    ) -> torch.Tensor:
        if rescale or resize or not return_features:
            raise RuntimeError("the videos are prepared")
        return x.mean(dim=(2, 3, 4)).repeat(1, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_i3d_runs_as_torchscript(tmp_path: Path) -> None:
    torch.jit.script(ScriptedVideoNetwork()).save(tmp_path / "i3d_torchscript.pt")
    metric = FVD(weights_dir=tmp_path)
    assert metric.name == "fvd"
    for level in (0, 51):
        video = torch.full((10, 3, 16, 16), level, dtype=torch.uint8)
        metric.update(video, video + 51)
    assert metric.compute().item() == pytest.approx(6 * 0.4**2, abs=1e-5)
