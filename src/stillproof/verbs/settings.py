"""What the verbs' settings share: where the data is, how often, and how much work a profile allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from cyclopts import Parameter
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Profile = Literal["smoke", "standard", "thorough"]

BY_PROFILE = "[by profile]"


def _parted(given: object) -> object:
    """`--thief a,b --thief c`, a list and a string mean the same; nothing is none."""
    texts = () if given is None else (given,) if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return given  # pydantic says what is wrong with it
    return tuple(part for text in texts for part in text.split(",") if part)


Words = Annotated[tuple[str, ...], Parameter(negative="", consume_multiple=False), BeforeValidator(_parted)]
"""Names, several joined by commas or given one by one."""


class VerbSettings(BaseModel):
    """What a run is about. Where and how it runs is not part of it (see runs.options.RunOptions)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by_profile: ClassVar[Mapping[Profile, Mapping[str, Any]]] = {}
    """What each profile sets, where neither a flag, the environment nor the config file has."""

    profile: Profile = Field("standard", description="How much work: smoke is a first look, thorough takes hours.")
    limit: int | None = Field(None, ge=40, description=f"Use at most so many training and test images. {BY_PROFILE}")
    seed: int = Field(0, ge=0, description="The first seed.")

    def resolved(self) -> Self:
        """These settings with the profile's values in all places that nobody has set."""
        chosen = self.by_profile[self.profile]
        missing = {name: value for name, value in chosen.items() if name not in self.model_fields_set}
        return self.model_copy(update=missing)


class DataSettings(VerbSettings):
    """The same, about one source of images that is carved into training, validation and test."""

    data: str = Field(..., description="Data SPEC: digits, a directory with parquet, file.npz, module:factory.")


TRAINING: Mapping[Profile, Mapping[str, Any]] = {
    "smoke": {"epochs": 2, "limit": 5000},
    "standard": {"epochs": 12},
    "thorough": {"epochs": 40},
}
"""How long a profile trains classifiers."""


def merged(
    *tables: Mapping[Profile, Mapping[str, Any]],
) -> Mapping[Profile, Mapping[str, Any]]:
    """Several such tables in one."""
    profiles: tuple[Profile, ...] = ("smoke", "standard", "thorough")
    return {profile: {k: v for table in tables for k, v in table[profile].items()} for profile in profiles}


def settings_as_json(settings: VerbSettings) -> dict[str, Any]:
    """The settings as result.json and settings.yaml hold them."""
    plain: dict[str, Any] = settings.model_dump(mode="json")
    return plain
