"""Capturing to files: what they hold, bounds, resuming, damaged folders, other models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sla.analysis.capture import check_choice, choose_rows, record
from sla.analysis.capture_files import Capture, CapturePlan, Moment
from sla.analysis.capture_qkv import CaptureError
from sla.attention import AttentionConfig, AttentionMethod, FullConfig, SLAConfig
from sla.attention.token_order import tile_order
from sla.models.dit import VideoDiT
from sla.models.testing import open_branches, tiny_dit_config
from sla.models.video_model import VideoModel

GRID = (2, 4, 4)
TILE = (1, 2, 2)
TIMESTEPS = (900.0, 100.5)
SLA = SLAConfig(critical=0.3, block_q=4, block_kv=4)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(attention: AttentionConfig | None = None) -> VideoDiT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = VideoDiT(tiny_dit_config(), attention or FullConfig())
    open_branches(network)
    return network.eval()


def plan_of(
    network: VideoModel, probe: AttentionConfig | None = SLA, **changes: Any
) -> CapturePlan:
    method = next(iter(network.attention_modules()))
    numbers: dict[str, Any] = {
        "samples": ({"kind": "clip", "caption": "a"}, {"kind": "clip", "caption": "b"}),
        "timesteps": TIMESTEPS,
        "layers": (0, 1),
        "heads": (0, 1),
        "grid": GRID,
        "num_heads": method.num_heads,
        "head_dim": method.head_dim,
        "query_blocks": None,
        "block": 4,
        "orders": (None, TILE),
        "dtype": "float32",
        "values": True,
        "attention": asdict(network.attention_config),
        "probe": asdict(probe or network.attention_config),
        "probe_is_model": probe is None,
        "weights": "w",
        "weights_sha256": "0" * 64,
        "seed": 0,
        "config": {},
    }
    return CapturePlan(**{**numbers, **changes})


def forward(network: VideoModel, sample: int, timestep: float, batch: int = 1) -> None:
    generator = torch.Generator().manual_seed(sample)
    latents = torch.randn(1, 3, 2, 8, 8, generator=generator)
    text = torch.randn(1, 4, 16, generator=generator)
    mask = torch.ones(batch, 4, dtype=torch.bool)
    # Guidance puts another caption in the second place.
    texts = torch.cat([text, *[torch.zeros_like(text)] * (batch - 1)])
    with torch.no_grad():
        network(
            latents.expand(batch, -1, -1, -1, -1), torch.tensor([timestep] * batch), texts, mask
        )


def run(
    network: VideoModel,
    folder: Path,
    plan: CapturePlan,
    probe: AttentionConfig | None = SLA,
    *,
    samples: Sequence[int] = (0, 1),
    max_gib: float = 1.0,
) -> int:
    """Capture; returns the files written."""
    with record(
        network, folder, plan, provenance={"command": "c"}, probe=probe, max_gib=max_gib
    ) as recorder:
        for recorder.sample in samples:
            for timestep in recorder.wants(recorder.sample):
                forward(network, recorder.sample, timestep)
    return recorder.written


def given(
    network: VideoModel, sample: int, timestep: float
) -> list[tuple[tuple[Any, ...], Tensor]]:
    """What attention of each layer is given and returns."""
    seen: list[tuple[tuple[Any, ...], Tensor]] = []
    hooks = [
        method.register_forward_hook(lambda _, args, output: seen.append((args, output)))
        for method in network.attention_modules()
    ]
    forward(network, sample, timestep)
    for hook in hooks:
        hook.remove()
    return seen


def test_rows_are_whole_blocks_of_every_order() -> None:
    assert choose_rows(GRID, 4, [None], None).tolist() == list(range(32))
    assert choose_rows(GRID, 4, [None], 2).tolist() == [8, 9, 10, 11, 24, 25, 26, 27]
    both = choose_rows(GRID, 4, [None, TILE], 2)
    order = tile_order(GRID, TILE)
    assert set(order[8:12].tolist()) <= set(both.tolist())
    assert both.tolist() == sorted(set(both.tolist()))
    assert len(choose_rows(GRID, 4, [None], 100)) == 32
    for arguments, message in (
        ((0, [None], 1), "block is 0"),
        ((4, [None], 0), "query_blocks is 0"),
    ):
        with pytest.raises(CaptureError, match=message):
            choose_rows(GRID, *arguments)


def test_files_are_what_attention_was_given(tmp_path: Path) -> None:
    network = model()
    plan = plan_of(network, heads=(1,), layers=(1,))
    assert run(network, tmp_path / "c", plan) == 4
    capture = Capture(tmp_path / "c")
    assert capture.provenance == {"command": "c"}
    assert [(m.sample, m.timestep, m.layer) for m in capture.moments] == [
        (s, t, 1) for s in (0, 1) for t in TIMESTEPS
    ]
    for moment in capture.moments:
        (query, key, value, _), _ = given(network, moment.sample, moment.timestep)[1]
        found = capture.read(moment)
        assert found.whole
        assert torch.equal(found.query, query[0, 1:])
        assert torch.equal(found.key, key[0, 1:])
        assert found.value is not None
        assert torch.equal(found.value, value[0, 1:])


def test_labels_and_errors_are_the_probes(tmp_path: Path) -> None:
    network = model()
    run(network, tmp_path / "c", plan_of(network))
    capture = Capture(tmp_path / "c")
    found = capture.read(capture.moments[1])
    (query, key, value, context), _ = given(network, 0, TIMESTEPS[0])[1]
    swapped = model(SLA)
    method: AttentionMethod = list(swapped.attention_modules())[1]
    torch.nn.init.zeros_(method.proj_l.weight)  # type: ignore[union-attr, arg-type]
    torch.nn.init.zeros_(method.proj_l.bias)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        output = method(query, key, value, context)
    block_map = method.block_map(query, key, context)
    assert block_map is not None
    assert found.labels is not None
    assert torch.equal(found.labels, block_map.labels[0])
    exact = scaled_dot_product_attention(query, key, value)
    for head in range(2):
        difference = (output - exact)[0, head]
        l1 = (difference.abs().sum() / exact[0, head].abs().sum()).item()
        assert found.error_l1[head].item() == pytest.approx(l1, rel=1e-4)
        l2 = (difference.norm() / exact[0, head].norm()).item()
        assert found.error_l2[head].item() == pytest.approx(l2, rel=1e-4)
    assert found.exact_fraction == pytest.approx(block_map.exact_fraction())


def test_a_models_own_method_is_measured_where_it_runs(tmp_path: Path) -> None:
    network = model(SLA)
    run(network, tmp_path / "own", plan_of(network, None), None)
    capture = Capture(tmp_path / "own")
    found = capture.read(capture.moments[0])
    (query, key, value, _), output = given(network, 0, TIMESTEPS[0])[0]
    exact = scaled_dot_product_attention(query, key, value)
    expected = ((output - exact)[0].abs().sum((1, 2)) / exact[0].abs().sum((1, 2))).tolist()
    assert found.error_l1.tolist() == pytest.approx(expected, rel=1e-4)
    full = model()
    run(full, tmp_path / "full", plan_of(full, None), None)
    exact_one = Capture(tmp_path / "full").read(capture.moments[0])
    assert exact_one.labels is None
    assert exact_one.error_l1.max() < 1e-6
    assert exact_one.exact_fraction == 1.0


def test_tokens_come_in_raster_order_whatever_the_model_has(tmp_path: Path) -> None:
    networks = {"raster": model(), "tiles": model(FullConfig(tile=TILE))}
    found = {}
    for name, network in networks.items():
        plan = plan_of(network, query_blocks=2)
        run(network, tmp_path / name, plan)
        capture = Capture(tmp_path / name)
        found[name] = capture.read(capture.moments[0])
        assert not found[name].whole
        assert len(found[name].rows) == len(choose_rows(GRID, 4, [None, TILE], 2))
    for part in ("query", "key", "value"):
        torch.testing.assert_close(
            getattr(found["raster"], part), getattr(found["tiles"], part), atol=1e-4, rtol=1e-3
        )


def test_of_a_guided_batch_the_text_is_kept(tmp_path: Path) -> None:
    network = model()
    plan = plan_of(network, samples=({"kind": "prompt"},), timesteps=(900.0,))
    with record(network, tmp_path / "c", plan, provenance={}, probe=SLA) as recorder:
        forward(network, 0, 900.0, batch=2)
        forward(network, 1, 900.0)  # as the second of two forwards a step
        forward(network, 0, 880.0)
    assert recorder.written == 2
    (query, *_), _ = given(network, 0, 900.0)[1]
    capture = Capture(tmp_path / "c")
    torch.testing.assert_close(capture.read(Moment(0, 900.0, 1)).query, query[0])


def test_chosen_dtype_and_parts(tmp_path: Path) -> None:
    network = model()
    run(network, tmp_path / "c", plan_of(network, dtype="bfloat16", values=False))
    capture = Capture(tmp_path / "c")
    found = capture.read(capture.moments[0], heads=[1])
    assert found.value is None
    assert found.query.dtype == torch.bfloat16
    assert found.query.shape == (1, 32, 16)
    with pytest.raises(ValueError, match=r"heads holds \[5\]; captured were \[0, 1\]"):
        capture.read(capture.moments[0], heads=[5])


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    network = model()
    run(network, tmp_path / "c", plan_of(network))
    assert not any(module._forward_hooks for module in network.modules())


def test_size_is_bounded_before_anything_is_written(tmp_path: Path) -> None:
    network = model()
    plan = plan_of(network)
    with pytest.raises(CaptureError, match=r"more than --max-gib 1e-05: 2 samples x 2 timesteps"):
        run(network, tmp_path / "c", plan, max_gib=1e-5)
    assert not (tmp_path / "c").exists()
    assert run(network, tmp_path / "c", plan) == 8
    sizes = [path.stat().st_size for path in (tmp_path / "c").glob("*.safetensors")]
    assert max(sizes) <= plan.file_bytes(32)
    assert plan.file_bytes(32) < 1.5 * max(sizes)
    smaller = [
        plan_of(network, **change).file_bytes(rows)
        for change, rows in (({}, 8), ({"heads": (1,)}, 32), ({"dtype": "bfloat16"}, 32))
    ]
    assert all(size < plan.file_bytes(32) for size in smaller)


def test_an_interrupted_capture_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, folder = model(), tmp_path / "c"
    plan = plan_of(network)
    assert run(network, folder, plan, samples=[0]) == 4
    with pytest.raises(CaptureError, match=r"lacks 4 of 8 files .*go on with `c`"):
        Capture(folder)

    def fails(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sla.analysis.capture_files.save_file", fails)
        with pytest.raises(OSError, match="No space left"):
            run(network, folder, plan)
    assert len(list(folder.iterdir())) == 5, "half a file was left"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(network, folder, plan) == 4
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert before.items() <= after.items()
    assert len(Capture(folder).moments) == 8
    assert run(network, folder, plan) == 0


def test_another_capture_is_not_mixed_in(tmp_path: Path) -> None:
    network, folder = model(), tmp_path / "c"
    run(network, folder, plan_of(network))
    with pytest.raises(CaptureError, match=r"another capture \(it differs in weights, seed\)"):
        run(network, folder, plan_of(network, seed=1, weights="v"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(CaptureError, match="not an empty folder"):
        run(network, tmp_path / "other", plan_of(network))
    with pytest.raises(ValueError, match=r"plan\.probe is"):
        run(network, tmp_path / "new", plan_of(network), replace(SLA, critical=0.5))


def test_bad_choices_are_named() -> None:
    network = model()
    assert check_choice(network, "layers", None) == (0, 1)
    assert check_choice(network, "heads", [1, 0, 1]) == (0, 1)
    for name, chosen in (("layers", [2]), ("heads", [0, 7]), ("heads", [])):
        with pytest.raises(CaptureError, match=rf"{name} is .*the model has {name} 0 to 1"):
            check_choice(network, name, chosen)


def test_other_attention_than_planned_is_refused(tmp_path: Path) -> None:
    network = model()
    with pytest.raises(CaptureError, match=r"here of grid \(1, 4, 4\)"):
        run(network, tmp_path / "c", plan_of(network, grid=(1, 4, 4)))


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    network, folder = model(), tmp_path / "c"
    run(network, folder, plan_of(network))
    capture = Capture(folder)
    moment = capture.moments[0]
    path, plan_path = folder / moment.file, folder / "capture.json"
    whole, plan_text = path.read_bytes(), plan_path.read_text()
    with safe_open(path, framework="pt") as file:
        head = file.metadata()
    tensors = load_file(path)

    path.write_bytes(whole[:-50])
    with pytest.raises(CaptureError, match=r"not readable .*Remove it"):
        capture.read(moment)
    save_file({**tensors, "query": tensors["query"][..., :3].contiguous()}, path, metadata=head)
    with pytest.raises(CaptureError, match=r"query is \(2, 32, 3\), not \(2, 32, 16\)"):
        capture.read(moment)
    save_file({k: v for k, v in tensors.items() if k != "value"}, path, metadata=head)
    with pytest.raises(CaptureError, match="value is absent"):
        capture.read(moment)
    path.write_bytes((folder / capture.moments[1].file).read_bytes())
    with pytest.raises(CaptureError, match="another sample, timestep or layer"):
        capture.read(moment)
    save_file(tensors, path, metadata={"sla": json.dumps({"digest": "x"})})
    with pytest.raises(CaptureError, match="of another capture"):
        capture.read(moment)
    path.write_bytes(whole)
    capture.read(moment)

    for old, new, message in (
        ('"version": 1', '"version": 2', "version 2; this code reads"),
        ('"seed": 0', '"seed": 5', "was changed after the capture"),
        ("{", "", "cannot be read"),
        ('"grid"', '"grad"', "cannot be read"),
    ):
        plan_path.write_text(plan_text.replace(old, new, 1))
        with pytest.raises(CaptureError, match=message):
            Capture(folder)
    plan_path.unlink()
    with pytest.raises(FileNotFoundError, match="make capture"):
        Capture(folder)


def test_wan_is_captured_too(tmp_path: Path) -> None:
    from sla.models.diffusers_model import DiffusersVideoModel
    from sla.models.wan import build_wan

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiffusersVideoModel(build_wan("tiny"), text_tokens=8).eval()
    latents = torch.randn(1, 4, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    plan = plan_of(
        network,
        samples=({"kind": "clip"},),
        timesteps=(500.0,),
        grid=network.grid(latents.shape),
        query_blocks=3,
    )
    text = torch.zeros(1, 7, 16)
    with (
        torch.no_grad(),
        record(network, tmp_path / "c", plan, provenance={}, probe=SLA) as recorder,
    ):
        network(latents, torch.tensor([500.0]), text, torch.ones(1, 7, dtype=torch.bool))
    assert recorder.written == 2
    found = Capture(tmp_path / "c").read(Moment(0, 500.0, 1))
    assert found.key.shape == (2, 72, plan.head_dim)
    assert found.labels is not None
    assert found.labels.shape == (2, 18, 18)
    assert (found.error_l1 > 1e-3).all()
