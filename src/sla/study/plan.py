"""What a study runs: one YAML file with its arms.

    study: video                 # name; rows carry it
    base: finetune.yaml          # experiment that every arm starts from, relative to this file
    seeds: [0, 1, 2]
    curve: [0, 100, 250, 500]    # steps at which is measured; the last step is, always
    measures: {...}              # fields of `Measures`
    evaluator: {...}             # fields of `EvaluatorConfig`
    groups:
      main:                      # arms that answer one question; run in this order
        question: ...
        arms:
          sla: {attention.name: sla, attention.critical: 0.05}

An arm is a mapping of config overrides (`section.field: value`). Beside them an arm or its group
may have `seeds`, `curve`, `router: true` (stage 1 of SLA2 first), `zero_shot: true` (no training)
and `videos: false`; a group has `overrides` for all its arms. An arm's own win.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sla.attention import attention_config_class
from sla.config import ConfigError, load_experiment, to_dict
from sla.files import sha256
from sla.models.families import family
from sla.training.config import Experiment

T = TypeVar("T")
# Of what an (arm, seed)'s rows mean; a new number makes all of them new.
VERSION = 1
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
_OPTIONS = ("seeds", "curve", "router", "zero_shot", "videos")
# What changes no number that is measured, apart from times.
_SAME = (
    *("run.name", "run.dir", "run.resume", "run.init_weights", "run.router_weights", "run.seed"),
    *("data.seed", "data.num_workers", "data.cache_mib", "data.shard_cache", "data.timeout"),
    *("data.shard_cache_gib", "data.url_retries", "data.max_failure_share", "data.probe_videos"),
    *("sampling.prompts", "sampling.num_prompts", "sampling.every", "sampling.fps"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.compile"),
    "trainer.cuda_graphs",
    *("trainer.checkpoint_every", "trainer.log_every", "trainer.progress_bar"),
    *("trainer.val_every", "trainer.activation_checkpointing", "eval", "latents"),
)


class StudyError(ConfigError):
    """A study that cannot be run as its file says; the message says what would do."""


@dataclass(frozen=True)
class Measures:
    """What is measured of every (arm, seed).

    Attributes:
        attention_clips: validation clips at which attention is compared with exact attention.
        prompt_shards: tar files of held-out clips: their captions are the prompts, their attributes
            what the evaluator must find in the samples.
        prompts: how many of them, evenly spaced, at least 2; 0 for no videos.
        video_metrics: metrics of `sla_eval` that need no weights; those that need a reference get
            the video of the pretrained full-attention model of the same prompt and seed.
        frames: of so many of the prompts, evenly spaced, a few frames are kept as a picture (see
            `sla.study.frames`), of each arm's first seed; 0 for none. Changes no number.
    """

    attention_clips: int = 4
    prompt_shards: list[str] = field(default_factory=list)
    prompts: int = 0
    video_metrics: list[str] = field(default_factory=lambda: ["psnr", "ssim"])
    frames: int = 4

    def __post_init__(self) -> None:
        for name, least in (("attention_clips", 1), ("prompts", 0), ("frames", 0)):
            _require(getattr(self, name) >= least, f"measures.{name}", getattr(self, name), least)
        if self.prompts == 1:
            raise StudyError("measures.prompts is 1; a distance of sets needs at least 2, or 0")
        if self.prompts and not self.prompt_shards:
            raise StudyError("measures.prompt_shards is empty; it must name the shards of prompts")


@dataclass(frozen=True)
class EvaluatorConfig:
    """The network that finds attributes in clips, and how it is trained.

    Attributes:
        weights: its safetensors file; written by `study-evaluator`, empty for a study without it.
        attributes: fields of the clips' JSON that it learns to tell.
        stills: those of them that are told from single grey frames, see `sla.study.stills`.
        width: channels of its first stage.
        features: width of its penultimate layer, whose distances are measured.
        steps, batch_size, learning_rate, weight_decay, seed: of its training (AdamW, one cycle).
    """

    weights: str = ""
    attributes: list[str] = field(default_factory=list)
    stills: list[str] = field(default_factory=list)
    width: int = 48
    features: int = 128
    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "features", "steps", "batch_size"):
            _require(getattr(self, name) >= 1, f"evaluator.{name}", getattr(self, name), 1)
        if self.weights and not self.attributes:
            raise StudyError("evaluator.attributes is empty; it must name what clips' JSON holds")
        unknown = sorted(set(self.stills) - set(self.attributes))
        if unknown:
            raise StudyError(f"evaluator.stills has {unknown}, which evaluator.attributes has not")


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name, group: where it stands in the file.
        overrides: its config overrides, `section.field=value`.
        seeds: seeds to run.
        curve: steps at which is measured, ascending; the last is that of the run's end.
        router: train SLA2's routers first.
        zero_shot: measured without any training.
        videos: sample videos at the end.
    """

    name: str
    group: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    curve: tuple[int, ...]
    router: bool
    zero_shot: bool
    videos: bool


@dataclass(frozen=True)
class Job:
    """One (arm, seed) with its resolved experiment.

    Attributes:
        arm, seed: which.
        experiment: with this seed's data order, noise and initial method parameters.
        numbers: all of it that decides results and is not a default, as plain values.
    """

    arm: Arm
    seed: int
    experiment: Experiment
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A study file, checked.

    Attributes:
        name: of the study.
        path: the file.
        base: the experiment's file.
        overrides: of every arm, from the command line.
        measures, evaluator: see there.
        arms: in the order of the file.
        questions: what each group of arms answers.
    """

    name: str
    path: Path
    base: Path
    overrides: tuple[str, ...]
    measures: Measures
    evaluator: EvaluatorConfig
    arms: tuple[Arm, ...]
    questions: dict[str, str]

    def base_experiment(self) -> Experiment:
        """The experiment of all arms before their own overrides."""
        return load_experiment(self.base, self.overrides)

    def jobs(
        self,
        arms: Sequence[str] = (),
        groups: Sequence[str] = (),
        seeds: Sequence[int] = (),
    ) -> list[Job]:
        """What there is to run: group by group, in a group seed by seed, arm by arm.

        So the arms of a question can be compared as early as possible.

        Args:
            arms, groups: names of those wanted; none for all.
            seeds: seeds wanted; none for each arm's.

        Raises:
            StudyError: an unknown arm or group, or an arm whose config is wrong.
        """
        for kind, wanted, known in (
            ("arms", arms, [arm.name for arm in self.arms]),
            ("groups", groups, list(self.questions)),
        ):
            unknown = sorted(set(wanted) - set(known))
            if unknown:
                raise StudyError(f"{self.path} has no {kind} {unknown}; it has {', '.join(known)}")
        found: list[Job] = []
        resolved: dict[str, Job] = {}
        for group in self.questions:
            chosen = [
                arm
                for arm in self.arms
                if arm.group == group
                and (not arms or arm.name in arms)
                and (not groups or group in groups)
            ]
            order = dict.fromkeys(seed for arm in chosen for seed in arm.seeds)
            for seed in order:
                if seeds and seed not in seeds:
                    continue
                for arm in chosen:
                    if seed in arm.seeds:
                        if arm.name not in resolved:
                            resolved[arm.name] = self._resolve(arm)
                        found.append(_with_seed(resolved[arm.name], seed))
        return found

    def _resolve(self, arm: Arm) -> Job:
        """The arm with its experiment, of no seed in particular. Raises StudyError."""
        try:
            experiment = load_experiment(self.base, [*self.overrides, *arm.overrides])
        except ConfigError as error:
            raise StudyError(f"{self.path}: arm {arm.name}: {error}") from error
        if not experiment.run.init_weights:
            raise StudyError(f"{self.base}: run.init_weights is empty; arms start from weights")
        if experiment.optim.ema_decay:
            raise StudyError(
                f"{self.path}: arm {arm.name}: optim.ema_decay is {experiment.optim.ema_decay}; a "
                "curve is of the weights themselves: set it to 0"
            )
        last = 0 if arm.zero_shot else experiment.trainer.max_steps
        curve = tuple(sorted({step for step in arm.curve if step < last} | {0, last}))
        arm = dataclasses.replace(arm, curve=curve)
        numbers = _not_default(experiment)
        if not arm.router:
            numbers.pop("router", None)
        numbers["arm"] = {
            "curve": list(curve),
            "router": arm.router,
            "zero_shot": arm.zero_shot,
            "videos": arm.videos,
        }
        return Job(arm, experiment.run.seed, experiment, numbers)

    def digest(self, job: Job, weights: str, evaluator: str) -> str:
        """What tells this arm's numbers from others: 16 hexadecimal digits, the same for all seeds.

        Args:
            weights: checksum of the weights that all arms start from.
            evaluator: checksum of the evaluator's file, or empty.
        """
        measures = dataclasses.asdict(self.measures)
        del measures["frames"]  # pictures, on which no number depends
        content = {
            "version": VERSION,
            "study": self.name,
            "numbers": job.numbers,
            "measures": measures,
            "weights": weights,
            "evaluator": evaluator,
        }
        return sha256(json.dumps(content, sort_keys=True).encode())[:16]


def _with_seed(job: Job, seed: int) -> Job:
    experiment = dataclasses.replace(
        job.experiment,
        run=dataclasses.replace(job.experiment.run, seed=seed),
        data=dataclasses.replace(job.experiment.data, seed=seed),
    )
    return dataclasses.replace(job, seed=seed, experiment=experiment)


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a study.

    Args:
        path: YAML file.
        overrides: `section.field=value`, of the experiment of every arm.

    Raises:
        StudyError: it cannot be read, or something in it is wrong; names it and what would do.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"no study file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not readable YAML: {error}") from error
    known = ("study", "base", "seeds", "curve", "measures", "evaluator", "groups")
    content = _mapping(content, str(path))
    _check_keys(content, known, str(path))
    for name in ("study", "base", "groups"):
        if name not in content:
            raise StudyError(f"{path} has no {name!r}")
    arms: list[Arm] = []
    questions: dict[str, str] = {}
    defaults = {
        "seeds": content.get("seeds", [0]),
        "curve": content.get("curve", []),
        "router": False,
        "zero_shot": False,
        "videos": True,
    }
    for group, given in _mapping(content["groups"], f"{path}: groups").items():
        where = f"{path}: groups.{group}"
        given = _mapping(given, where)
        _check_keys(given, ("question", "overrides", "arms", *_OPTIONS), where)
        questions[str(group)] = str(given.get("question", ""))
        shared = _mapping(given.get("overrides", {}), f"{where}.overrides")
        options = {**defaults, **{name: given[name] for name in _OPTIONS if name in given}}
        for name, values in _mapping(given.get("arms", {}), f"{where}.arms").items():
            values = _mapping(values, f"{where}.arms.{name}")
            arms.append(_arm(str(name), str(group), {**shared, **values}, options, where))
    twice = sorted({arm.name for arm in arms if sum(a.name == arm.name for a in arms) > 1})
    if twice:
        raise StudyError(f"{path}: arms {twice} are there twice")
    return Plan(
        name=str(content["study"]),
        path=path,
        base=path.parent / str(content["base"]),
        overrides=tuple(overrides),
        measures=_build(Measures, content.get("measures", {}), f"{path}: measures"),
        evaluator=_build(EvaluatorConfig, content.get("evaluator", {}), f"{path}: evaluator"),
        arms=tuple(arms),
        questions=questions,
    )


def _arm(
    name: str, group: str, values: Mapping[str, Any], options: Mapping[str, Any], where: str
) -> Arm:
    given = {**options, **{key: values[key] for key in _OPTIONS if key in values}}
    overrides = {key: value for key, value in values.items() if key not in _OPTIONS}
    for key in overrides:
        if "." not in str(key):
            allowed = ", ".join(_OPTIONS)
            raise StudyError(
                f"{where}: {name}.{key} is neither an override (section.field) nor one of {allowed}"
            )
    for key in ("seeds", "curve"):
        numbers = given[key]
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise StudyError(f"{where}: {name}.{key} is {numbers!r}; it must be a list of numbers")
    for key in ("router", "zero_shot", "videos"):
        if type(given[key]) is not bool:
            raise StudyError(f"{where}: {name}.{key} is {given[key]!r}; it must be true or false")
    return Arm(
        name=name,
        group=group,
        overrides=tuple(f"{key}={json.dumps(value)}" for key, value in overrides.items()),
        seeds=tuple(given["seeds"]),
        curve=tuple(given["curve"]),
        router=given["router"],
        zero_shot=given["zero_shot"],
        videos=given["videos"],
    )


def _not_default(experiment: Experiment) -> dict[str, Any]:
    """What decides results and differs from the schema's defaults.

    Not all of it: a field that is added to the schema later leaves finished arms finished.
    """
    defaults = Experiment(
        attention=attention_config_class(experiment.attention.name)(),
        model=family(experiment.model.name).config_class(),
    )
    given, usual = to_dict(experiment), to_dict(defaults)
    found: dict[str, Any] = {
        "attention": {"name": experiment.attention.name},
        "model": {"name": experiment.model.name},
    }
    for section, fields in given.items():
        for name, value in fields.items():
            if value != usual[section].get(name) and not {section, f"{section}.{name}"} & {*_SAME}:
                found.setdefault(section, {})[name] = value
    return found


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise StudyError(f"{where} must be a mapping, got {value!r}")
    return value


def _check_keys(given: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    unknown = sorted(str(key) for key in given if key not in known)
    if unknown:
        raise StudyError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(known)}")


def _build(kind: type[T], values: Any, where: str) -> T:
    values = _mapping(values, where)
    _check_keys(values, [f.name for f in _fields(kind)], where)
    for f in _fields(kind):
        if f.name in values:
            kinds: dict[str, tuple[type, ...]] = {
                "int": (int,),
                "float": (int, float),
                "str": (str,),
            }
            wanted = kinds.get(str(f.type), (list,))
            if not isinstance(values[f.name], wanted) or isinstance(values[f.name], bool):
                raise StudyError(f"{where}.{f.name} is {values[f.name]!r}; it must be {f.type}")
    return kind(**values)


def _fields(kind: Any) -> Iterator[dataclasses.Field[Any]]:
    yield from dataclasses.fields(kind)


def _require(good: bool, name: str, value: object, least: int) -> None:
    if not good:
        raise StudyError(f"{name} is {value!r}; it must be at least {least}")
