"""The versions of what a result depends on."""

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """What a bug report needs to name."""
    packages = ("torch", "transformers", "safetensors", "numpy", "scipy")
    return {
        "upcycle": version("upcycle"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
