"""A model on the hub: its small files first, its weights when they are needed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.core.errors import UpcycleError
from upcycle.models.quantised import Part

LEGAL = tuple(
    "".join(
        f"[{letter.lower()}{letter.upper()}]" if letter.isalpha() else letter for letter in name
    )
    for name in ("*license*", "*licence*", "*notice*", "*use_policy*", "copying*")
)
"""Names of what a model's terms are in, in any case."""
SMALL = [
    *("*.json", "*.model", "*.txt", "*.jinja", "README.md"),
    *LEGAL,
    "[0-9]*_*/*.safetensors",  # of what sentence-transformers puts behind an encoder
]
"""What is downloaded of a model beside its weights."""


@dataclass(frozen=True)
class Remote:
    """Weights that are still on the hub."""

    model: str
    commit: str
    parts: Mapping[str, Part]
    """Every tensor, by the headers of the files."""

    def fetch(self, files: Iterable[str] | None = None) -> None:
        """Download the files of these names, by default all that hold weights, to the model's
        folder in the hub's cache.

        Raises:
            UpcycleError: the hub does not give them.
        """
        from huggingface_hub import snapshot_download

        wanted = sorted(files or {part.file for part in self.parts.values()})
        with asking_hub(self.model, self.commit):
            snapshot_download(self.model, revision=self.commit, allow_patterns=wanted)

    def holds(self, file: str) -> bool:
        """Whether a file of this name is there; asks the hub.

        Raises:
            UpcycleError: the hub does not answer.
        """
        from huggingface_hub import HfApi

        with asking_hub(self.model, self.commit):
            return HfApi().file_exists(self.model, file, revision=self.commit)


def download(model: str, revision: str | None, accept: Callable[[Path], Any]) -> Path:
    """A model's folder in the hub's cache, with all but its weights; config.json first.

    Args:
        accept: may raise on a folder that holds config.json alone.

    Raises:
        UpcycleError: there is no such model, or the hub does not give it.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    with asking_hub(model, revision):
        config = Path(hf_hub_download(model, "config.json", revision=revision))
    accept(config.parent)
    with asking_hub(model, revision):
        # The commit's, even if the branch has moved since.
        commit = config.parent.name
        return Path(snapshot_download(model, revision=commit, allow_patterns=SMALL))


def remote_weights(model: str, commit: str) -> Remote | None:
    """The headers of a model's weights, which take a request for each file; None of a model without
    safetensors, and without the network.

    Raises:
        UpcycleError: the hub does not give them, or one is damaged.
    """
    from huggingface_hub import HfApi, errors, is_offline_mode

    if is_offline_mode():
        return None
    try:
        with asking_hub(model, commit):
            found = HfApi().get_safetensors_metadata(model, revision=commit)
    except errors.NotASafetensorsRepoError:
        return None
    except errors.SafetensorsParsingError as error:
        raise UpcycleError(f"{model} holds a damaged safetensors file: {error}") from error
    parts = {
        name: Part(name, file, tuple(info.shape), info.dtype)
        for file, header in found.files_metadata.items()
        for name, info in header.tensors.items()
    }
    return Remote(model, commit, parts)


@contextmanager
def asking_hub(model: str, revision: str | None) -> Iterator[None]:
    """What the hub or its cache answers, as a sentence."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UpcycleError(
            f"{model} is gated: accept its terms on the hub, then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UpcycleError(f"{model} has no revision {revision!r}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UpcycleError(f"{model} is neither a folder here nor a model on the hub") from error
    except errors.RemoteEntryNotFoundError as error:
        raise UpcycleError(f"{model} on the hub holds no config.json") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise UpcycleError(
            f"{model} is not in the local cache and the hub can't be reached (offline): "
            "give a local folder, or connect"
        ) from error
