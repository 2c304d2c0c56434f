"""Options of requests under their names of version 0.1, which the server reads until 0.3.

Does not depend on: HTTP, models.
"""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ModelWrapValidatorHandler, PrivateAttr, model_validator

from unigen.options import RENAMED


class OldNamesMixin(BaseModel):
    """A schema whose options may have their old names."""

    _uses_old_names: bool = PrivateAttr(False)

    @model_validator(mode="wrap")
    @classmethod
    def _read_old_names(cls, data: object, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Give options their new names, and note whether there were old ones."""
        if not isinstance(data, dict):
            return validate(data)
        old_names = [old for old, new in RENAMED.items() if data.get(old) is not None and new in cls.model_fields]
        for old in old_names:
            new = RENAMED[old]
            if data.get(new) is not None:
                raise ValueError(f"{old} is called {new} now: give one")
            data = {name: value for name, value in data.items() if name != old} | {new: data[old]}
        body = validate(data)
        body._uses_old_names = bool(old_names)
        return body

    @property
    def uses_old_names(self) -> bool:
        """Whether the request has an option under its old name."""
        return self._uses_old_names
