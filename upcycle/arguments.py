"""What arguments of the command line say: settings by any flag, texts by whose they are.

Without torch or transformers, unless a flag has to be looked up among the settings.
"""

from collections.abc import Mapping
from typing import Any

import typer

from upcycle.console.ending import ending
from upcycle.core.errors import UpcycleError
from upcycle.core.paths import local_path


class Settings(typer.core.TyperCommand):
    """A command that takes any setting as a flag: one that help does not show is `--set`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for param in self.get_params(ctx) for name in param.opts}
        end = args.index("--") if "--" in args else len(args)
        words, left = [], args[:end]
        while left:
            flag, count = left[0].partition("=")[0].replace("_", "-"), 1
            given = None
            if flag.startswith("--") and flag not in known:
                with ending():
                    given = self.given(left[0], left[1] if len(left) > 1 else None)
            if given is not None:
                setting, count = given
                words += ["--set", setting]
            else:
                words.append(left[0])
            left = left[count:]
        return super().parse_args(ctx, words + args[end:])

    def given(self, word: str, after: str | None) -> tuple[str, int] | None:
        """An unknown flag as `--set` takes it; see `as_set`. The settings are imported when there
        is one."""
        raise NotImplementedError


class OfRecipe(Settings):
    def given(self, word: str, after: str | None) -> tuple[str, int] | None:
        from upcycle.conversion.recipe import SHARED_EXPERTS, Recipe

        if field_named(word) == "shared_experts":
            raise UpcycleError(SHARED_EXPERTS)
        return as_set(word, after, Recipe.model_fields)


class OfTraining(Settings):
    def given(self, word: str, after: str | None) -> tuple[str, int] | None:
        from upcycle.finetune.settings import Training

        return as_set(word, after, Training.model_fields)


def field_named(word: str) -> str:
    """The setting that a word of the command line names: `top_k` of `--top-k=2`."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def as_set(word: str, after: str | None, fields: Mapping[str, Any]) -> tuple[str, int] | None:
    """What `--set` takes for a setting that is given as a flag it does not have, and how many words
    that is; None if there is no such setting.

    Args:
        after: the word that follows it.
        fields: of the recipe or the training request, as pydantic describes them.

    Raises:
        UpcycleError: it wants a value and has none.
    """
    (flag, equals, value), field = word.partition("="), field_named(word)
    off = field not in fields and field.startswith("no_")
    field = field.removeprefix("no_") if off else field
    if field not in fields:
        return None
    if equals:
        return f"{field}={value}", 1
    if fields[field].annotation in (bool, bool | None):
        return f"{field}={'false' if off else 'true'}", 1
    if after is None or after.startswith("--"):
        raise UpcycleError(f"{flag} wants a value: --set {field}=…")
    return f"{field}={after}", 2


def texts_by_owner(words: list[str], *, added: bool) -> dict[str, str]:
    """Texts by whose they are; that of an expert that is added may be given alone.

    Raises:
        UpcycleError: a word is no such pair, or one is given twice.
    """
    found: dict[str, str] = {}
    for word in words:
        alone = added and ("=" not in word or local_path(word).exists())
        name, text = ("", word) if alone else _text(word)
        if name in found:
            raise UpcycleError(
                f"--text gives {name or 'the new expert'} two texts: give one file, or a folder of "
                "both"
            )
        found[name] = text
    return found


def _text(word: str) -> tuple[str, str]:
    name, equals, text = word.partition("=")
    if not equals or not name or not text:
        raise UpcycleError(f"--text {word!r} is not MODEL=TEXT")
    return name, text


def assignment(text: str) -> tuple[str, Any]:
    """The setting and the value that a `--set` gives.

    Raises:
        UpcycleError: it is no such pair, or the value is no YAML.
    """
    from upcycle.core.foreign import parse_yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise UpcycleError(f"--set {text!r} is not KEY=VALUE")
    return key.strip(), parse_yaml(value, f"the value of --set {key.strip()}")
