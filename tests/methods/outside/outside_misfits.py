"""What other packages get wrong. test_outside.py installs this file as a package."""

from dataclasses import dataclass

from peptrain.methods.base import Method

NO_METHOD = "a string"


@dataclass(frozen=True, kw_only=True)
class Misnamed(Method):
    """Its entry point has another name."""

    name = "inner-name"
    equation = "W"


@dataclass(frozen=True, kw_only=True)
class Demanding(Method):
    """It has a setting without a default."""

    name = "demanding"
    equation = "W"
    rank: int


class Bare(Method):
    """It is no dataclass and has no equation."""

    name = "bare"


@dataclass(frozen=True, kw_only=True)
class Impostor(Method):
    """It calls itself what a method of peptrain's is called."""

    name = "bpt"
    equation = "W"


@dataclass(frozen=True, kw_only=True)
class Listed(Method):
    """A setting that no flag and no configuration file has."""

    name = "listed"
    equation = "W"
    sizes: tuple[int | None, ...] = (1, None)
