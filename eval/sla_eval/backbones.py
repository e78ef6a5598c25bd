"""The networks that metrics run: where their weights are looked for, and how they are loaded.

Nothing is downloaded. Weights lie in one folder: the argument `weights_dir`, or else the
environment variable SLA_EVAL_WEIGHTS, or else `weights/`. Files keep the names they are published
under. Loading is strict: a parameter too few or too many, or a checksum that is not the pinned one,
is an error. `backbone_table` lists all of them.

Every metric also takes its network as an argument, so that any other can be measured or tested
with; these are called as the classes here are.

`random_backbone` builds the same architectures with random weights, to measure speed where no
weights are: what they say about a video means nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sla_eval.dino import DinoViT
from sla_eval.viclip import ViCLIP

ENVIRONMENT_VARIABLE = "SLA_EVAL_WEIGHTS"
DEFAULT_FOLDER = "weights"

_EVAL_EXTRA = "pip install 'sla-reproduction[eval]'"


class BackboneUnavailableError(RuntimeError):
    """A network that cannot be loaded here; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class WeightFile:
    """A file or a folder of weights.

    Attributes:
        path: relative to the folder of weights.
        origin: who publishes it, in words.
        sha256: of the file, in hex. Where its publisher gives only the beginning, as in the names
            of torch's hub, that; None where we know none, and then it is not checked.
    """

    path: str
    origin: str
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """One way to a network.

    Attributes:
        files: that must be there.
        packages: what must be importable, to how it is installed.
        load: takes the paths of `files`, in their order.
    """

    files: tuple[WeightFile, ...]
    packages: Mapping[str, str]
    load: Callable[..., nn.Module]


@dataclass(frozen=True)
class Backbone:
    """A network by name.

    Attributes:
        name: in this registry.
        title: what it is.
        sources: ways to it; the first that is complete is taken.
        random: builds its architecture, with random weights, of the packages of the first source.
            None where that takes files too; a source without files needs none.
        why_not_random: where `random` is None, what its architecture comes from.
    """

    name: str
    title: str
    sources: tuple[Source, ...]
    random: Callable[[], nn.Module] | None = None
    why_not_random: str = ""


_BACKBONES: dict[str, Backbone] = {}


def register_backbone(backbone: Backbone) -> Backbone:
    """Makes a backbone known under its name.

    Raises:
        ValueError: the name is taken.
    """
    if backbone.name in _BACKBONES:
        raise ValueError(f"a backbone named {backbone.name!r} is registered")
    _BACKBONES[backbone.name] = backbone
    return backbone


def available_backbones() -> list[str]:
    """Names of all registered backbones, sorted."""
    return sorted(_BACKBONES)


def get_backbone(name: str) -> Backbone:
    """The backbone registered under `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in _BACKBONES:
        raise ValueError(f"unknown backbone {name!r} (known: {', '.join(available_backbones())})")
    return _BACKBONES[name]


def weights_folder(weights_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of weights: the argument, or $SLA_EVAL_WEIGHTS, or `weights/`."""
    if weights_dir is not None:
        return Path(weights_dir)
    return Path(os.environ.get(ENVIRONMENT_VARIABLE) or DEFAULT_FOLDER)


def missing_backbone(name: str, weights_dir: str | os.PathLike[str] | None = None) -> str | None:
    """None if a backbone's packages and files are there, else one line saying how to get them.

    Files are looked for, not read; packages are looked for, not imported.

    Raises:
        ValueError: no backbone has this name.
    """
    backbone = get_backbone(name)
    folder = weights_folder(weights_dir)
    missing = [_missing(source, folder) for source in backbone.sources]
    if not all(missing):
        return None
    ways = "; or: ".join(" and ".join(parts) for parts in missing)
    return (
        f"{backbone.title} is missing: needs {ways} "
        f"(folder of weights: {folder}; set {ENVIRONMENT_VARIABLE} for another)"
    )


def load_backbone(name: str, weights_dir: str | os.PathLike[str] | None = None) -> nn.Module:
    """A backbone with its weights, on the CPU, float32, in evaluation mode, without gradients.

    Raises:
        ValueError: no backbone has this name.
        BackboneUnavailableError: a package or file is missing or unusable, or not as pinned.
    """
    backbone = get_backbone(name)
    folder = weights_folder(weights_dir)
    for source in backbone.sources:
        if _missing(source, folder):
            continue
        paths = [folder / file.path for file in source.files]
        for file, path in zip(source.files, paths, strict=True):
            _check_digest(file, path)
        try:
            network = source.load(*paths)
        except BackboneUnavailableError:
            raise
        except Exception as error:  # whatever the packages that load it raise
            reason = " ".join(str(error).split())[:300]
            raise BackboneUnavailableError(
                f"cannot load {backbone.title} ({', '.join(map(str, paths)) or 'no files'}): "
                f"{type(error).__name__}: {reason}"
            ) from error
        return network.eval().requires_grad_(False)
    raise BackboneUnavailableError(str(missing_backbone(name, weights_dir)))


def comes_with_weights(name: str) -> bool:
    """Whether a backbone's weights are in a package, so that no file is looked for.

    Raises:
        ValueError: no backbone has this name.
    """
    return any(not source.files for source in get_backbone(name).sources)


def missing_random_backbone(name: str) -> str | None:
    """None if `random_backbone` can build this one, else why not, in one line.

    Raises:
        ValueError: no backbone has this name.
    """
    backbone = get_backbone(name)
    if comes_with_weights(name):
        return missing_backbone(name)
    if backbone.random is None:
        why = backbone.why_not_random or "it cannot be built without its files"
        return f"{backbone.title} with random weights: {why}"
    packages = _missing_packages(backbone.sources[0])
    return f"{backbone.title} is missing: needs {' and '.join(packages)}" if packages else None


def random_backbone(name: str, device: str | torch.device = "cpu") -> nn.Module:
    """A backbone with random weights, to measure speed with; no score may be made of it.

    It is the network of `load_backbone` but for the numbers in it: same class, parameters, dtype.
    The weights are always the same. One whose weights are in its package has those.

    Args:
        name: of a registered backbone.
        device: where it is built and stays; a GPU draws the numbers faster.

    Raises:
        ValueError: no backbone has this name.
        BackboneUnavailableError: a package is missing, or the architecture is in the files.
    """
    missing = missing_random_backbone(name)
    if missing is not None:
        raise BackboneUnavailableError(missing)
    build = get_backbone(name).random
    if build is None:
        return load_backbone(name).to(device)
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        network = build()
        for parameter in network.parameters():
            # Where weights are always loaded, the constructor leaves zeros.
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return network.to(device).eval().requires_grad_(False)


def weight_checksums(
    name: str, weights_dir: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """{path: SHA-256} of the files that `load_backbone` reads; folders are left out.

    Raises:
        ValueError: no backbone has this name.
        BackboneUnavailableError: it is not there.
    """
    folder = weights_folder(weights_dir)
    for source in get_backbone(name).sources:
        if not _missing(source, folder):
            paths = {file.path: folder / file.path for file in source.files}
            return {key: file_sha256(path) for key, path in paths.items() if path.is_file()}
    raise BackboneUnavailableError(str(missing_backbone(name, weights_dir)))


def backbone_table() -> str:
    """All backbones as a Markdown table: files, checksums ("not known" where none is pinned)."""
    lines = ["| backbone | file | SHA-256 | packages | from |", "|---|---|---|---|---|"]
    for name in available_backbones():
        for source in _BACKBONES[name].sources:
            packages = ", ".join(source.packages) or "–"
            if not source.files:
                lines.append(f"| {name} | – | – | {packages} | the package |")
            for file in source.files:
                digest = file.sha256 or "not known, not checked"
                if file.sha256 is not None and len(file.sha256) < 64:
                    digest += "… (beginning)"
                lines.append(f"| {name} | {file.path} | {digest} | {packages} | {file.origin} |")
    return "\n".join(lines) + "\n"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; of an unchanged file it is computed once."""
    stat = path.stat()
    return _digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _digest(path: str, size: int, time: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_digest(file: WeightFile, path: Path) -> None:
    if file.sha256 is not None and not file_sha256(path).startswith(file.sha256):
        raise BackboneUnavailableError(
            f"{path} is not the published file: its SHA-256 is {file_sha256(path)}, "
            f"expected {file.sha256}; get it again ({file.origin})"
        )


def _missing_packages(source: Source) -> list[str]:
    return [
        f"package {package} ({how})"
        for package, how in source.packages.items()
        if not _has_package(package)
    ]


def _missing(source: Source, folder: Path) -> list[str]:
    return _missing_packages(source) + [
        f"{file.path} in {folder} ({file.origin})"
        for file in source.files
        if not (folder / file.path).exists()
    ]


def _has_package(name: str) -> bool:
    """Whether a module is there; for "a.b" whether package a has a module or folder b."""
    top, _, rest = name.partition(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None or not rest:
        return spec is not None
    inner = rest.replace(".", "/")
    return any(
        (Path(place) / inner).is_dir() or (Path(place) / f"{inner}.py").is_file()
        for place in spec.submodule_search_locations or ()
    )


def _state_dict(path: Path, key: str | None = None) -> dict[str, Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content if key is None else content[key]


# ---- image encoders -------------------------------------------------------------------------


def _load_dino(path: Path) -> nn.Module:
    network = DinoViT()
    network.load_state_dict(_state_dict(path))
    return network


register_backbone(
    Backbone(
        "dino_vitb16",
        "DINO ViT-B/16",
        (
            Source(
                (
                    WeightFile(
                        "dino_vitbase16_pretrain.pth",
                        "backbone-only weights of ViT-B/16, GitHub facebookresearch/dino",
                    ),
                ),
                {},
                _load_dino,
            ),
        ),
        random=DinoViT,
    )
)


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
                    {"open_clip": _EVAL_EXTRA, "torchvision": _EVAL_EXTRA},
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


def _aesthetic_head() -> nn.Module:
    return nn.Linear(768, 1)


def _load_aesthetic_head(path: Path) -> nn.Module:
    head = _aesthetic_head()
    head.load_state_dict(_state_dict(path))
    return head


register_backbone(
    Backbone(
        "laion_aesthetic",
        "LAION's linear aesthetic head for CLIP ViT-L/14",
        (
            Source(
                (WeightFile("sa_0_4_vit_l_14_linear.pth", "GitHub LAION-AI/aesthetic-predictor"),),
                {},
                _load_aesthetic_head,
            ),
        ),
        random=_aesthetic_head,
    )
)


class Musiq(nn.Module):
    """Scores, about 0 to 100, of one frame (1, 3, H, W) of levels 0 to 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frame: Tensor) -> Tensor:
        return self.model(frame)


def _musiq(**weights: Any) -> nn.Module:
    from pyiqa.archs.musiq_arch import MUSIQ

    return Musiq(MUSIQ(**weights))


def _load_musiq(path: Path) -> nn.Module:
    return _musiq(pretrained_model_path=str(path))


register_backbone(
    Backbone(
        "musiq_spaq",
        "MUSIQ trained on SPAQ",
        (
            Source(
                (
                    WeightFile(
                        "musiq_spaq_ckpt-358bb6af.pth",
                        "GitHub chaofengc/IQA-PyTorch, release v0.1-weights",
                        "358bb6af",
                    ),
                ),
                {"pyiqa": "pip install pyiqa; for non-commercial use"},
                _load_musiq,
            ),
        ),
        random=functools.partial(_musiq, pretrained=False),
    )
)


class Brisque(nn.Module):
    """The package's score of a frame, uint8 (H, W, 3)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        scale = model.scale_features

        # The package makes arrays of one number where it means a number, which numpy 2.4 refuses.
        def scale_numbers(features: Sequence[Any]) -> Any:
            return scale([np.asarray(feature, dtype=np.float64).item() for feature in features])

        model.scale_features = scale_numbers

    def forward(self, frame: np.ndarray) -> float:
        return float(self.model.score(frame))


def _load_brisque() -> nn.Module:
    from brisque import BRISQUE

    return Brisque(BRISQUE(url=False))


register_backbone(
    Backbone(
        "brisque",
        "BRISQUE",
        (
            Source(
                (),
                {
                    "brisque": "pip install brisque",
                    "cv2": "pip install opencv-python-headless",
                },
                _load_brisque,
            ),
        ),
    )
)


class Inception(nn.Module):
    """Pool features (N, 2048) of uint8 frames (N, 3, H, W), resized by the network itself."""

    num_features = 2048

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor) -> Tensor:
        return self.model(frames)


def _inception() -> Inception:
    """The network as its constructor draws it: the package's loads weights in the constructor."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    class Unloaded(NoTrainInceptionV3):
        loading = False

        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(*args, **kwargs) if self.loading else None

    empty: Any = io.BytesIO()  # typed as a path, and given to `torch.load`
    torch.save({}, empty)
    empty.seek(0)
    network = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
    network.loading = True
    return Inception(network)


def _load_inception(path: Path) -> nn.Module:
    network = _inception()
    network.model.load_state_dict(_state_dict(path))
    return network


register_backbone(
    Backbone(
        "inception_v3",
        "Inception-v3 of the TensorFlow FID",
        (
            Source(
                (
                    WeightFile(
                        "weights-inception-2015-12-05-6726825d.pth",
                        "GitHub toshas/torch-fidelity, releases",
                        "6726825d",
                    ),
                ),
                {"torch_fidelity": _EVAL_EXTRA},
                _load_inception,
            ),
        ),
        random=_inception,
    )
)


class Lpips(nn.Module):
    """Distances (N,) of frames (N, 3, H, W), levels -1 to 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor, references: Tensor) -> Tensor:
        return self.model(frames, references).flatten()


def _lpips() -> Lpips:
    # The heads come with torchmetrics; only the trunk's weights would be downloaded.
    from torchmetrics.functional.image.lpips import _LPIPS

    return Lpips(_LPIPS(pretrained=True, net="alex", pnet_rand=True))


def _load_lpips(path: Path) -> nn.Module:
    network: Any = _lpips()
    trunk = _state_dict(path)
    # torchmetrics cuts the trunk into slices and keeps each layer's number: net.slice2.3.weight
    # is the trunk's features.3.weight. The classifier is not used.
    for key, parameter in network.model.net.state_dict(keep_vars=True).items():
        source = trunk["features." + key.split(".", 1)[1]]
        if source.shape != parameter.shape:
            raise ValueError(f"{key} has shape {tuple(source.shape)}")
        with torch.no_grad():
            parameter.copy_(source)
    return network


register_backbone(
    Backbone(
        "lpips_alex",
        "LPIPS on AlexNet",
        (
            Source(
                (
                    WeightFile(
                        "alexnet-owt-7be5be79.pth", "torchvision's AlexNet weights", "7be5be79"
                    ),
                ),
                {"torchvision": _EVAL_EXTRA},
                _load_lpips,
            ),
        ),
        random=_lpips,
    )
)


# ---- motion ---------------------------------------------------------------------------------


class Raft(nn.Module):
    """Optical flow (N, 2, H, W) in pixels, x then y, from frames (N, 3, H, W), levels 0 to 255.

    H and W are multiples of 8.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        flows = self.model(before / 127.5 - 1, after / 127.5 - 1, num_flow_updates=20)
        return flows[-1]


def _raft() -> Raft:
    from torchvision.models.optical_flow import raft_large

    return Raft(raft_large(weights=None))


def _load_raft(path: Path) -> nn.Module:
    network = _raft()
    network.model.load_state_dict(_state_dict(path))
    return network


def _random_raft() -> nn.Module:
    network: Any = _raft()
    # The flow stays 0. Random flow leaves the frame, and the metric stops early at a video that
    # moves: this one has all of its pairs looked at, the most work there is.
    for parameter in network.model.update_block.flow_head.conv2.parameters():
        nn.init.zeros_(parameter).requires_grad_(False)
    return network


register_backbone(
    Backbone(
        "raft",
        "RAFT trained on FlyingChairs and FlyingThings3D",
        (
            Source(
                (
                    WeightFile(
                        "raft_large_C_T_V1-22a6c225.pth",
                        "torchvision's port of raft-things.pth",
                        "22a6c225",
                    ),
                ),
                {"torchvision": _EVAL_EXTRA},
                _load_raft,
            ),
        ),
        random=_random_raft,
    )
)


class Amt(nn.Module):
    """The frame in the middle of two, all (N, 3, H, W), levels 0 to 1; H and W multiples of 16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        time = torch.full((len(before), 1, 1, 1), 0.5, device=before.device)
        return self.model(before, after, time, scale_factor=1.0, eval=True)["imgt_pred"]


@contextlib.contextmanager
def _importing_from(folder: Path, *names: str) -> Iterator[None]:
    """Imports `names` from a folder, and forgets them after: they are common words."""

    def forget() -> dict[str, Any]:
        keys = [k for k in sys.modules if k.split(".")[0] in names]
        return {key: sys.modules.pop(key) for key in keys}

    others = forget()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        forget()
        sys.modules.update(others)


def _load_amt(folder: Path, path: Path) -> nn.Module:
    with _importing_from(folder.resolve(), "networks", "utils"):
        module = importlib.import_module("networks.AMT-S")
        model = module.Model(corr_radius=3, corr_lvls=4, num_flows=3)
    model.load_state_dict(_state_dict(path, "state_dict"))
    return Amt(model)


register_backbone(
    Backbone(
        "amt_s",
        "AMT-S",
        (
            Source(
                (
                    WeightFile("AMT", "a copy of GitHub MCG-NKU/AMT, whose code is run"),
                    WeightFile("amt-s.pth", "hub: lalala125/AMT"),
                ),
                {},
                _load_amt,
            ),
        ),
        why_not_random="its code is no package; a copy lies beside its weights",
    )
)


# ---- videos ---------------------------------------------------------------------------------


def _viclip() -> nn.Module:
    from open_clip.tokenizer import SimpleTokenizer

    return ViCLIP(SimpleTokenizer(context_length=32))


def _load_viclip(path: Path) -> nn.Module:
    network = _viclip()
    network.load_state_dict(_state_dict(path, "model"))
    return network


register_backbone(
    Backbone(
        "viclip",
        "ViCLIP-L/14 (InternVid-10M-FLT)",
        (
            Source(
                (WeightFile("ViClip-InternVid-10M-FLT.pth", "hub: OpenGVLab/VBench_Used_Models"),),
                {"open_clip": _EVAL_EXTRA, "torchvision": _EVAL_EXTRA},
                _load_viclip,
            ),
        ),
        random=_viclip,
    )
)


class I3D(nn.Module):
    """Logits (N, 400) of videos (N, 3, T, 224, 224), levels -1 to 1."""

    num_features = 400

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, videos: Tensor) -> Tensor:
        return self.model(videos, rescale=False, resize=False, return_features=True)


def _load_i3d(path: Path) -> nn.Module:
    return I3D(torch.jit.load(path, map_location="cpu"))


register_backbone(
    Backbone(
        "i3d_kinetics",
        "I3D trained on Kinetics-400",
        (
            Source(
                (
                    WeightFile(
                        "i3d_torchscript.pt",
                        "I3D as TorchScript, linked in GitHub universome/fvd-comparison",
                    ),
                ),
                {},
                _load_i3d,
            ),
        ),
        why_not_random="its architecture is in its TorchScript file alone",
    )
)


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


class Dover(nn.Module):
    """Raw technical and aesthetic scores of a uint8 video (T, 3, H, W), by the package `dover`.

    The package cuts random fragments of the frames; the random numbers are always the same here.
    """

    # The package's dover.yml.
    _VIEWS: dict[str, dict[str, int]] = {  # noqa: RUF012
        "technical": {
            "fragments_h": 7,
            "fragments_w": 7,
            "fsize_h": 32,
            "fsize_w": 32,
            "aligned": 32,
            "clip_len": 32,
            "frame_interval": 2,
            "num_clips": 3,
        },
        "aesthetic": {
            "size_h": 224,
            "size_w": 224,
            "clip_len": 32,
            "frame_interval": 2,
            "t_frag": 32,
            "num_clips": 1,
        },
    }
    _MEAN = (123.675, 116.28, 103.53)
    _STD = (58.395, 57.12, 57.375)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: Tensor) -> tuple[float, float]:
        from dover.datasets import UnifiedFrameSampler
        from dover.datasets.dover_datasets import get_single_view

        samplers = {
            "technical": UnifiedFrameSampler(32, 3, 2),
            "aesthetic": UnifiedFrameSampler(1, 32, 2, 1),
        }
        shape = (3, 1, 1, 1)
        mean = torch.tensor(self._MEAN, device=video.device).view(shape)
        std = torch.tensor(self._STD, device=video.device).view(shape)
        views = {}
        numpy_state = np.random.get_state()  # noqa: NPY002
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                np.random.seed(0)  # noqa: NPY002
                for key, options in self._VIEWS.items():
                    frames = torch.as_tensor(samplers[key](len(video), False), dtype=torch.long)
                    view = video[frames.to(video.device)].float().transpose(0, 1)
                    view = (get_single_view(view, key, **options) - mean) / std
                    views[key] = view.unflatten(1, (options["num_clips"], -1)).transpose(0, 1)
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
        technical, aesthetic = (float(scores.mean()) for scores in self.model(views))
        return technical, aesthetic


def _dover() -> Dover:
    from dover.models import DOVER

    model = DOVER(
        backbone={
            "technical": {"type": "swin_tiny_grpb", "checkpoint": True, "pretrained": None},
            "aesthetic": {"type": "conv_tiny"},
        },
        backbone_preserve_keys="technical,aesthetic",
        divide_head=True,
        vqa_head={"in_channels": 768, "hidden_channels": 64},
    )
    return Dover(model)


def _load_dover(path: Path) -> nn.Module:
    network = _dover()
    network.model.load_state_dict(_state_dict(path))
    return network


register_backbone(
    Backbone(
        "dover",
        "DOVER",
        (
            Source(
                (WeightFile("DOVER.pth", "GitHub VQAssessment/DOVER, release v0.1.0"),),
                # A package of this name in the index is something else.
                {"dover.models": "install from a copy of GitHub VQAssessment/DOVER"},
                _load_dover,
            ),
        ),
        random=_dover,
    )
)
