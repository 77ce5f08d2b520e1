"""Fields of a model's config, wherever in its nested parts they are."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["HIDDEN", "ConfigField", "ModelConfig"]

HIDDEN = ("hidden_size", "n_embd", "d_model")
"""Names of the field that gives the size of a hidden state."""


@dataclass(frozen=True)
class ConfigField:
    """A field of a config.

    Attributes:
        path: The keys that lead to the part that has it; empty for the config itself.
        names: Under which names config.json has it, or will have it if it has only the default.
        value: What it is.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    value: Any

    @property
    def name(self) -> str:
        """What a message calls it, such as 'text_config.num_experts'."""
        return ".".join((*self.path, self.names[0]))


class ModelConfig:
    """The config of a model: its file, and what transformers makes of it.

    Args:
        raw: The content of ``config.json``.
        made: The config that transformers made from it, with all defaults and aliases.
    """

    def __init__(self, raw: Mapping[str, Any], made: "PretrainedConfig") -> None:
        self.raw = raw
        self._parts = sorted(_parts(made), key=lambda part: part[1] is not _text(made))

    def field(self, names: Iterable[str]) -> ConfigField | None:
        """The first field with one of these names that is not None, the language model's first."""
        return next((one for one in self._fields(names) if one.value is not None), None)

    def blank(self, names: Iterable[str]) -> ConfigField | None:
        """The first field with one of these names, which is None: models have a default for it."""
        return next((one for one in self._fields(names) if one.value is None), None)

    def beside(self, field: ConfigField) -> Iterator[ConfigField]:
        """All fields of the part that has a field, this one included; None is no value."""
        for path, part in self._parts:
            for name, value in vars(part).items():
                if path == field.path and not name.startswith("_") and value is not None:
                    yield ConfigField(path, self._written(path, part, (name,), name), value)

    def changed(self, changes: Iterable[tuple[ConfigField, Any]]) -> dict[str, Any]:
        """The content of config.json with new values of some fields."""
        raw = dict(self.raw)
        for field, value in changes:
            part = raw
            for key in field.path:
                part[key] = dict(part.get(key) or {})
                part = part[key]
            part.update(dict.fromkeys(field.names, value))
        return raw

    def _fields(self, names: Iterable[str]) -> Iterator[ConfigField]:
        names = tuple(names)
        for path, part in self._parts:
            for name in names:
                if hasattr(part, name):
                    written = self._written(path, part, names, name)
                    yield ConfigField(path, written, getattr(part, name))

    def _written(
        self, path: tuple[str, ...], part: "PretrainedConfig", names: tuple[str, ...], found: str
    ) -> tuple[str, ...]:
        """The names under which config.json has a field: all aliases of it that are there."""
        raw: Any = self.raw
        for key in path:
            raw = raw.get(key) or {}
        canonical = part.attribute_map.get(found, found)
        aliases = {found, canonical}
        aliases |= {name for name in names if part.attribute_map.get(name, name) == canonical}
        present = tuple(name for name in names if name in aliases and name in raw)
        return present or (canonical,)


def _text(made: "PretrainedConfig") -> "PretrainedConfig":
    """The part that describes the language model; the config itself if that is all there is."""
    return made.get_text_config(decoder=True)


def _parts(
    made: "PretrainedConfig", path: tuple[str, ...] = ()
) -> "Iterator[tuple[tuple[str, ...], PretrainedConfig]]":
    """A config and the configs nested in it, each with the keys that lead to it."""
    from transformers import PretrainedConfig

    yield path, made
    for key in made.sub_configs:
        part = getattr(made, key, None)
        if isinstance(part, PretrainedConfig):
            yield from _parts(part, (*path, key))
