"""Reads configs: YAML files and `key=value` overrides into the dataclasses of an experiment.

The only module that knows OmegaConf. A file may name others in `include:` (paths relative to it);
they are merged first, in order, and the file's own values win.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sla.attention import AttentionConfig, attention_config_class
from sla.models.families import family
from sla.models.video_model import ModelConfig
from sla.training.config import Experiment

INCLUDE = "include"


class ConfigError(ValueError):
    """A config file or override that cannot be used; the message says what would do."""


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment.

    Args:
        path: YAML file.
        overrides: dot-list items such as `attention.critical=0.1`.

    Raises:
        ConfigError: missing file, bad YAML, unknown key (names the nearest valid one), or a value
            of the wrong type or out of its range.
    """
    values = _read_yaml(Path(path), ())
    override_values = _read_overrides(overrides)
    _drop_others_numbers("attention", _attention_class, values, override_values)
    _drop_others_numbers("model", _model_class, values, override_values)
    try:
        merged = OmegaConf.merge(values, override_values)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    assert isinstance(merged, DictConfig)
    return _to_experiment(merged, str(path))


def dump(experiment: Experiment) -> str:
    """The experiment as YAML, every value resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(experiment))


def to_dict(experiment: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON-able values."""
    container = OmegaConf.to_container(OmegaConf.structured(experiment), resolve=True)
    # As a file would give them back: lists, no tuples.
    return typing.cast(dict[str, Any], json.loads(json.dumps(container)))


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    if path.resolve() in seen:
        raise ConfigError(f"{path} includes itself through {seen[-1]}")
    if not path.is_file():
        near = sorted(str(p) for p in Path("configs").glob("*/*.yaml"))
        close = difflib.get_close_matches(str(path), near, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"no config file {path}{hint}")
    try:
        values = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path} must hold `key: value` sections")
    includes = values.pop(INCLUDE, [])
    merged = OmegaConf.create()
    for name in includes:
        merged.merge_with(_read_yaml(path.parent / name, (*seen, path.resolve())))
    merged.merge_with(values)
    return merged


def _read_overrides(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"override {item!r} must look like section.field=value")
    # Nothing is the empty text, as a shell means it; `null` is none.
    items = [f"{item}''" if item.endswith("=") else item for item in overrides]
    try:
        return OmegaConf.from_dotlist(items)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read overrides {list(overrides)}: {error}") from error


def _drop_others_numbers(
    section_name: str,
    class_of: Callable[[Any], type],
    values: DictConfig,
    overrides: DictConfig,
) -> None:
    """Let `attention.name=full` work on a file written for another method.

    Numbers that the file gives its own method and the new one does not have are left out; numbers
    that the overrides give are never dropped.
    """
    name = OmegaConf.select(overrides, f"{section_name}.name")
    section = OmegaConf.select(values, section_name)
    if name is None or section is None or section.get("name") == name:
        return
    fields = {field.name for field in dataclasses.fields(class_of(name))}
    for key in list(section):
        if key not in fields:
            del section[key]


def _attention_class(name: Any) -> type[AttentionConfig]:
    try:
        return attention_config_class(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _model_class(name: Any) -> type[ModelConfig]:
    try:
        return family(name).config_class
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _to_experiment(values: DictConfig, source: str) -> Experiment:
    attention_class = _attention_class(
        OmegaConf.select(values, "attention.name", default=AttentionConfig.name)
    )
    model_class = _model_class(OmegaConf.select(values, "model.name", default=ModelConfig.name))
    _check_keys(values, Experiment, "", {"attention": attention_class, "model": model_class})
    try:
        schema = OmegaConf.structured(Experiment)
        schema.attention = OmegaConf.structured(attention_class)
        schema.model = OmegaConf.structured(model_class)
        experiment = OmegaConf.to_object(OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or _misfit(schema, values)
        raise ConfigError(f"{source}: {key}: {_first_line(error)}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{source}: {error}") from error
    assert isinstance(experiment, Experiment)
    return experiment


def _misfit(schema: DictConfig, values: DictConfig) -> str:
    """The field whose value does not fit; about tuples OmegaConf's error does not say."""
    for section, fields in values.items():
        for field, value in fields.items():
            try:
                OmegaConf.merge(schema, {section: {field: value}})
            except OmegaConfBaseException:
                return f"{section!s}.{field!s} is {value}"
    return ", ".join(map(str, values))


def _check_keys(
    values: DictConfig, schema: type, prefix: str, replacements: dict[str, type]
) -> None:
    """Every key must be a field of the schema; says which valid one is nearest."""
    hints = get_type_hints(schema)
    fields = [field.name for field in dataclasses.fields(schema)]
    for key in values:
        name = f"{prefix}{key!s}"
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            known = ", ".join(fields)
            raise ConfigError(f"unknown config key {name}{hint} (known here: {known})")
        kind = replacements.get(name, hints[str(key)])
        if dataclasses.is_dataclass(kind):
            section = values[key]
            if not isinstance(section, DictConfig):
                raise ConfigError(f"{name} is {section!r}; it must be a section of `key: value`")
            _check_keys(section, typing.cast(type, kind), f"{name}.", replacements)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
