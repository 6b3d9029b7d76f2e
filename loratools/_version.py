"""The version, from the installed package's own metadata."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("loratools")
except PackageNotFoundError:  # a source tree that is not installed
    VERSION = "0+unknown"
