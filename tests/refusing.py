"""Calls that must fail, and fail well."""

from collections.abc import Callable
from typing import Any

import pytest

from loratools.errors import LoratoolsError


def refused(code: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message with which a call is refused: one of our errors, in one printable line."""
    with pytest.raises(LoratoolsError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code
    assert caught.value.message.isprintable()
    assert len(caught.value.message) > 20
    return caught.value.message
