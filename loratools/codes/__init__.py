"""The one table of problem codes: exit status, meaning, example, remedy."""

from __future__ import annotations

from loratools.codes.code import Code as Code
from loratools.codes.inputs import INPUTS
from loratools.codes.outside import OUTSIDE
from loratools.codes.results import RESULTS

CODES: dict[str, Code] = {**INPUTS, **RESULTS, **OUTSIDE}
