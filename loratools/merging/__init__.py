"""Merge methods: pure functions of deltas; `METHODS` is the table of them."""

from __future__ import annotations

from collections.abc import Callable

from loratools.merging.linear import Merged, linear

METHODS: dict[str, Callable[..., Merged]] = {"linear": linear}
