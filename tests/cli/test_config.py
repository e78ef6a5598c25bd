"""Config files, overrides, and what is said about mistakes in them."""

from pathlib import Path

import pytest

from sla.attention import FullConfig, SLAConfig, available_attention
from sla.cli.main import main, parse
from sla.config import ConfigError, dump, load_experiment, to_dict

ROOT = Path(__file__).resolve().parents[2]
# Lists of a study's arms, which are no experiments: tests/study reads them.
STUDIES = ("arms.yaml", "images.yaml")
CONFIGS = sorted(path for path in ROOT.glob("configs/*/*.yaml") if path.name not in STUDIES)
DEMO = ROOT / "configs/finetune/demo.yaml"


def test_there_are_configs() -> None:
    assert DEMO in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_file_parses_through_the_command_line(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "--config", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "max_steps:" in printed
    assert "attention:" in printed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_field_of_a_file_is_commented(path: Path) -> None:
    for line in path.read_text().splitlines():
        is_field = line.startswith("  ") and ":" in line
        named = line.strip().split(":")[0] in ("name",) and "run" not in line
        assert not is_field or "#" in line or named, line


def test_what_is_printed_loads_again(tmp_path: Path) -> None:
    experiment = load_experiment(DEMO, ["run.seed=7"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(dump(experiment))
    assert load_experiment(printed) == experiment


def test_overrides_win_over_the_file() -> None:
    experiment = load_experiment(DEMO, ["attention.critical=0.1", "trainer.max_steps=50"])
    assert isinstance(experiment.attention, SLAConfig)
    assert experiment.attention.critical == 0.1
    assert experiment.trainer.max_steps == 50
    assert experiment.data.num_frames == 16  # from an included file


@pytest.mark.parametrize("name", available_attention())
def test_every_method_is_one_word_away(name: str) -> None:
    attention = load_experiment(DEMO, [f"attention.name={name}"]).attention
    assert attention.name == name


def test_switching_methods_drops_only_the_files_numbers() -> None:
    assert load_experiment(DEMO, ["attention.name=full"]).attention == FullConfig()
    with pytest.raises(ConfigError, match=r"unknown config key attention\.critical"):
        load_experiment(DEMO, ["attention.name=full", "attention.critical=0.1"])


def test_nothing_after_the_equals_sign_is_the_empty_text(tmp_path: Path) -> None:
    path = ROOT / "configs" / "finetune" / "wan2.1-1.3b.yaml"
    overrides = [f"autoencoder.source={tmp_path}", "autoencoder.revision="]
    assert load_experiment(path).autoencoder.revision
    assert load_experiment(path, overrides).autoencoder.revision == ""


def test_overrides_may_stand_before_and_after_options() -> None:
    call = ["generate", "optim.beta2=0.9", "--config", "c", "run.seed=1", "--prompt", "p", "a.b=2"]
    assert parse(call).overrides == ["optim.beta2=0.9", "run.seed=1", "a.b=2"]
    with pytest.raises(SystemExit):
        parse([*call, "--stepz=3"])
    with pytest.raises(SystemExit):
        parse(["tables", "run.seed=1"])


def test_overrides_may_follow_an_option_of_several_values() -> None:
    options = parse(
        [
            "study",
            "a.b=1",
            "--config",
            "c",
            "--groups",
            "x",
            "y",
            "c.d=2",
            "--seeds",
            "0",
            "1",
            "e.f=3",
        ]
    )
    assert (options.groups, options.seeds) == (["x", "y"], [0, 1])
    assert options.overrides == ["a.b=1", "c.d=2", "e.f=3"]
    for values in (["--seeds", "zero"], ["--groups"], ["--arms", "a.b=1"]):
        with pytest.raises(SystemExit):
            parse(["study", "--config", "c", *values])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_step=5", "did you mean trainer.max_steps"),
        ("traner.max_steps=5", "did you mean trainer"),
        ("attention.critcal=0.1", "did you mean attention.critical"),
        ("attention.name=slaa", "did you mean 'sla'"),
        ("trainer.max_steps=many", "max_steps"),
        ("trainer.max_steps=0", "trainer.max_steps is 0"),
        ("trainer.cuda_graphs=true", "it must be false without trainer.compile"),
        ("optim.schedule=linear", "optim.schedule is 'linear'"),
        ("data.caption_dropout=2", "data.caption_dropout"),
        ("trainer=5", "must be a section"),
        ("max_steps", "must look like section.field=value"),
    ],
)
def test_mistakes_are_named(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(DEMO, [override])
    assert main(["config", "--config", str(DEMO), override]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_missing_file_is_named_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"no config file .*; did you mean configs/finetune/demo"):
        load_experiment("configs/finetune/dem.yaml")


def test_files_that_include_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: [b.yaml]\n")
    (tmp_path / "b.yaml").write_text("include: [a.yaml]\n")
    with pytest.raises(ConfigError, match="includes itself"):
        load_experiment(tmp_path / "a.yaml")


def test_broken_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("run: [\n")
    with pytest.raises(ConfigError, match="not readable YAML"):
        load_experiment(tmp_path / "a.yaml")


def test_plain_values_hold_everything() -> None:
    values = to_dict(load_experiment(DEMO))
    assert values["attention"]["negligible"] == 0.1
    assert values["model"]["patch_size"] == [1, 4, 4]
