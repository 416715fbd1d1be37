"""The base class of every section of the configuration."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat

from uniapl.files import expand_home
from uniapl.untyped import is_dict


class Section(BaseModel):
    """A frozen section whose docstrings describe its keys; unknown keys and non-finite values are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split())  # --help wraps lines itself


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError("must be two numbers with low <= high")
    return bounds


PathText = Annotated[str, AfterValidator(expand_home)]
"""A path, whose `~` is the home directory, or another text, such as a Hub id."""
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInterval = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ordered)]
FractionInterval = Annotated[tuple[Fraction, Fraction], AfterValidator(_ordered)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""A list of names; a single name is a list of one."""
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple)]
"""A list of non-empty texts; a single text is a list of one."""
Paths = Annotated[tuple[PathText, ...], BeforeValidator(_as_tuple)]
"""A list of paths; a single path is a list of one."""


def flatten(values: BaseModel | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, for every key that is not a section."""
    values = values.model_dump() if isinstance(values, BaseModel) else values
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if is_dict(value) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
