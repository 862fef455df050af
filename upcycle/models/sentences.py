"""What sentence-transformers puts behind an encoder: how its hidden states become one vector.

`modules.json` lists the modules in their order. The first is the encoder itself, each other has a
folder of its own.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import read_json

MODULES = "modules.json"
SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json")
KEPT = (".json", ".safetensors", ".txt")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
PLAIN = re.compile(r"[\w-][\w.-]*")
"""What a module's folder may be called."""


def sentence_files(folder: Path) -> Iterator[Path]:
    """The files of these modules, where the model has any.

    Raises:
        UpcycleError: `modules.json` is not a list of modules, one lies outside the folder, or one
            has weights that are pickled.
    """
    path = folder / MODULES
    if not path.is_file():
        return
    yield path
    for pattern in SETTINGS:
        yield from folder.glob(pattern)
    for name in _module_folders(path):
        for file in sorted((folder / name).glob("*")):
            if file.suffix in KEPT:
                yield file
            elif file.suffix in PICKLES:
                raise UpcycleError(
                    f"{file} is pickled, which is not handed on: load the model with "
                    "sentence-transformers and save it anew, which writes safetensors"
                )


def _module_folders(path: Path) -> Iterator[str]:
    modules = read_json(path)
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise UpcycleError(f"{path} is not a list of modules, as sentence-transformers writes it")
    for name in (str(module.get("path", "")) for module in modules):
        if name and not PLAIN.fullmatch(name):
            raise UpcycleError(f"{path} names {name[:80]!r}, which is no folder beside it")
        if name:
            yield name
