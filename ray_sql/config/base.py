"""The settings that every job takes: a name, folders, and tokens that are never shown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, SecretStr, field_serializer, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ray_sql.config.sections import StorageSection
from ray_sql.config.urls import absolute, mask_password, mask_secrets
from ray_sql.config.validate import build, flatten, merge, names, nested, without_removed

TOKENS = {"read_token", "write_token"}
MAY_HOLD_PASSWORD = {"data.databases", "tracking.uri", "url"}
"""Addresses that are opened with the password in them. They are shown and saved without it."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and halves of characters: bytes on a command line that are not UTF-8."""


class JobConfig(BaseSettings):
    """Settings that every job takes."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    config: tuple[str, ...] = ()
    """Read settings from these YAML or JSON files. Later files win over earlier ones, flags over
    all."""
    output_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name the run, and its folder under output_dir."""
    dry_run: bool = False
    """Show what would be done, with one example if a model is asked, and stop."""
    output_dir: str = "out"
    """Keep all runs in this folder."""
    cache_dir: str = "~/.cache/ray_sql"
    """Keep here what can be made again: tokenised rows, converted models, unpacked demo
    databases."""
    read_token: SecretStr | None = None
    """Read the model and the dataset with this Hub token. Better given as HF_TOKEN in the
    environment."""
    write_token: SecretStr | None = None
    """Publish with this Hub token. Better given as HF_TOKEN in the environment."""
    scaling: StorageSection = StorageSection()

    def __init__(self, **values: Any) -> None:
        """Take settings and nothing else. `load` merges the sources, to name that of a bad value.

        BaseSettings would read sources itself, and take words such as `_cli_parse_args` from files.
        """
        BaseModel.__init__(self, **values)

    @model_validator(mode="before")
    @classmethod
    def _drop_removed(cls, values: dict[str, Any]) -> dict[str, Any]:
        return without_removed(values)

    @field_serializer(*TOKENS)
    def _hide(self, _: SecretStr | None) -> None:
        return None

    @field_validator(*TOKENS, mode="before")
    @classmethod
    def _strip(cls, given: Any) -> Any:
        """Take a token without the line break at the end of the file that it was mounted from."""
        return (given.strip() or None) if isinstance(given, str) else given

    @field_validator(*TOKENS)
    @classmethod
    def _check_token(cls, token: SecretStr | None) -> SecretStr | None:
        text = token.get_secret_value() if token else ""
        if not text.isascii() or re.search(r"\s", text) or _CONTROL.search(text):
            raise ValueError("a token is one word of letters, digits and signs; copy it again")
        return token

    @model_validator(mode="after")
    def _check_no_keys_in_addresses(self) -> Self:
        addresses = {
            "scaling.storage_path": self.scaling.storage_path,
            "output_dir": self.output_dir,
            "prev_checkpoint": getattr(self, "prev_checkpoint", None),
        }
        for name, address in addresses.items():
            if address != mask_password(address):
                raise ValueError(
                    f"{name} {mask_password(address)}: keys do not belong into an address, "
                    "which is logged and saved; give them in the environment "
                    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), or give the nodes a role"
                )
        return self

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        """Refuse what would be logged and saved, and what no name or address holds."""
        for name, value in flatten(self.model_dump(exclude=TOKENS)).items():
            for text in (name, *_texts(value)):
                known = mask_password(text) or "" if name in MAY_HOLD_PASSWORD else text
                if mask_secrets(known) != known:
                    raise ValueError(
                        f"{mask_secrets(name)}: holds a token or a password, and is logged and "
                        "saved; give it in the environment (docs/secrets.md)"
                    )
                if _CONTROL.search(text):
                    raise ValueError(
                        f"{name}: holds a line break, or another character that cannot be printed; "
                        "leave it out"
                    )
        return self

    @property
    def run_dir(self) -> str:
        """Absolute folder or URI of this run. Absolute because Ray changes a worker's folder."""
        root = self.scaling.storage_path or self.output_dir
        if "://" in root:
            return f"{root.rstrip('/')}/{self.output_name}"
        return str(absolute(root) / self.output_name)

    @property
    def cache(self) -> Path:
        """Absolute folder for what can be made again."""
        return absolute(self.cache_dir)

    @classmethod
    def shown(cls) -> set[str]:
        """Return the dotted names of the settings that the job uses, for `--help`."""
        return {name for name, _ in names(cls)}

    def setting(self, name: str) -> Any:
        """Return the value of a dotted setting, e.g. `lora.r`."""
        value: Any = self
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def given(self) -> dict[str, Any]:
        """Return the settings that were given, sections as mappings, tokens included."""
        values = nested(self.model_dump(mode="python", exclude_unset=True, exclude=TOKENS))
        tokens = {name: getattr(self, name) for name in TOKENS}
        return values | {name: token for name, token in tokens.items() if token}

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with dotted settings changed, e.g. `{"lora.r": 16}`; tokens stay.

        Raises `ConfigError` for a value that is not allowed.
        """
        changes = nested(changes)
        return build(type(self), merge(self.given(), changes), {"changes": changes})


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of a setting: itself, or those in its lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)
