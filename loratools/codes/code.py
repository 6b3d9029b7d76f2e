"""What is said of one problem code: its exit status, meaning, example, remedy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Code:
    """What a problem code means: the exit status it leads to, an example, the remedy."""

    exit: int
    meaning: str
    example: str
    remedy: str
    fixed: bool = False  # nothing can be let through: there is no sum of unlike shapes

    @property
    def waivable(self) -> bool:
        """Whether `--allow` may turn it into a warning: exit classes 4 and 5, shapes excepted."""
        return self.exit in (4, 5) and not self.fixed
