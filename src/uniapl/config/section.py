"""What every section of the configuration is: strict and frozen."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Unknown keys and values that are not finite are errors; nothing changes after it was read."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        # The command line shows pydantic's own words.
        hide_input_in_errors=True,
    )
