"""The file of mergekit-moe: its fields and spellings, as a request.

What it reads wrongly in silence is refused here: a misspelt field, one given twice, a prompt that
YAML takes for no text. Without torch.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

from upcycle.conversion.merging.request import Expert, Merge, Request
from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import DEEPEST, LONGEST, first_problem, read_text
from upcycle.core.paths import local_path
from upcycle.models.model_name import ModelName, Place, parse_model, parse_place

EXPECTED = "a mergekit-moe file"
DEFAULT_GATE = "hidden"
MEANT = {
    "num_experts_per_tok": "experts_per_token",
    "num_experts_per_token": "experts_per_token",
    "top_k": "experts_per_token",
    "model": "source_model",
    "base": "base_model",
    "target": "architecture",
}
"""Fields of other programs that say what a field here says."""
WITHOUT_EFFECT = frozenset(
    "merge_method parameters tokenizer tokenizer_source chat_template name models slices modules "
    "out_dtype weight density normalize int8_mask description".split()
)
"""Fields of merges into a dense model, and names, which mean nothing here."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
OUTPUTS = (
    ("mixtral", "mixtral"),
    ("qwen moe", "qwen2_moe"),
    ("qwen2_moe", "qwen2_moe"),
    ("qwen3 moe", "qwen3_moe"),
)
"""What a file may call a target, of which the beginning will do."""
MOST_NODES = 100_000
"""Values in a file, aliases written out."""


def _as_model(value: Any) -> Any:
    """A name, or mergekit's mapping of a model and an adapter."""
    if isinstance(value, str):
        return parse_model(value)
    if not isinstance(value, Mapping):
        raise ValueError("give a model's name, or a mapping with model: and lora:")
    if "path" in value:
        return ModelName(_as_place(value))
    if unknown := value.keys() - {"model", "lora", "override_architecture"}:
        raise ValueError(f"a model has no {min(map(str, unknown))!r}: give model: and lora:")
    if value.get("override_architecture"):
        raise ValueError("override_architecture has no meaning here: a model's config says it")
    lora = value.get("lora")
    return ModelName(_as_place(value.get("model")), None if lora is None else _as_place(lora))


def _as_place(value: Any) -> Place:
    if isinstance(value, str):
        return parse_place(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("path"), str):
        raise ValueError("give a path, or a mapping with path: and revision:")
    if unknown := value.keys() - {"path", "revision"}:
        raise ValueError(f"a path has no {min(map(str, unknown))!r}: give path: and revision:")
    revision = value.get("revision")
    if not isinstance(revision, str | None):
        raise ValueError(f"revision {revision!r} is no text: put it in quotes")
    return Place(value["path"], revision)


def _as_dtype(value: Any) -> Any:
    return DTYPES.get(name := str(value).removeprefix("torch."), name) if value else "auto"


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("give a number")
    return value


Model = Annotated[ModelName, BeforeValidator(_as_model)]
Scale = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Count = Annotated[PositiveInt, BeforeValidator(_no_bool)]


class Item(BaseModel):
    """An entry of `experts` or `shared_experts`."""

    model_config = ConfigDict(extra="forbid")

    source_model: Model
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    noise_scale: Annotated[Scale, Field(ge=0)] | None = None
    residual_scale: Scale | None = None

    def expert(self) -> Expert:
        return Expert(
            self.source_model,
            self.positive_prompts,
            self.negative_prompts,
            self.noise_scale or 0.0,
            1.0 if self.residual_scale is None else self.residual_scale,
        )


class File(BaseModel):
    """All of a file that means something."""

    model_config = ConfigDict(extra="forbid")

    base_model: Model
    experts: Annotated[tuple[Item, ...], Field(min_length=1)]
    shared_experts: tuple[Item, ...] = ()
    gate_mode: Literal[
        "hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"
    ] = "hidden"
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"], BeforeValidator(_as_dtype)
    ] = "auto"
    experts_per_token: Count | None = None
    architecture: str | None = None


def read_file(path: Path) -> Request:
    """The request that a mergekit-moe file makes, but whether its prompts will do.

    Raises:
        UpcycleError: it is none, or asks for what can't be; the sentence names the line or field.
    """
    place = local_path(path)
    if not place.is_file():
        raise UpcycleError(f"{path} does not exist: give {EXPECTED}, or the models' names")
    fields = _fields(read_text(place, EXPECTED), path)
    ignored: set[str] = set()
    fields = _known(fields, File, f"{path}", ignored)
    for kind in ("experts", "shared_experts"):
        fields[kind] = _items(fields.get(kind), kind, path, ignored)
    if not fields["experts"]:
        raise UpcycleError(f"{path} has no experts: list them below experts:")
    fields = {name: value for name, value in fields.items() if value is not None}
    try:
        file = File.model_validate(fields)
    except ValidationError as error:
        raise UpcycleError(f"{path}: {_problem(error)}") from error
    return _request(file, path, ignored)


def _request(file: File, path: Path, ignored: set[str]) -> Request:
    if len(file.shared_experts) > 1:
        raise UpcycleError(
            f"{path} has {len(file.shared_experts)} shared_experts, but no architecture has more "
            "than one shared expert: keep one"
        )
    experts = tuple(item.expert() for item in file.experts)
    shared = file.shared_experts[0].expert() if file.shared_experts else None
    merge = Merge(file.base_model, experts, shared)
    settings: dict[str, Any] = {"name": path.stem, "router": file.gate_mode, "dtype": file.dtype}
    if file.experts_per_token is not None:
        if file.experts_per_token > len(experts):
            raise UpcycleError(
                f"{path}: experts_per_token is {file.experts_per_token}, but there are "
                f"{len(experts)} experts"
            )
        settings["top_k"] = file.experts_per_token
    if file.architecture is not None:
        settings["target"] = _target(file.architecture)
    return Request(merge, settings, _notes(ignored))


def _notes(ignored: set[str]) -> tuple[str, ...]:
    if not ignored:
        return ()
    have = "have" if len(ignored) > 1 else "has"
    return (f"{', '.join(sorted(ignored))} {have} no effect on a Mixture-of-Experts",)


def _target(architecture: str) -> str:
    """A target by the beginning of one of its names; what is none is left to the plan, which knows
    what the model reaches."""
    asked = architecture.strip().lower()
    found = (target for name, target in OUTPUTS if asked and name.startswith(asked))
    return next(found, asked)


def _problem(error: ValidationError) -> str:
    """The first complaint, with what was meant where a word is known."""
    problem = error.errors()[0]
    field = ".".join(map(str, problem["loc"]))
    if problem["type"] == "literal_error":
        value, known = problem["input"], problem["ctx"]["expected"].replace("'", "")
        near = difflib.get_close_matches(str(value).lower(), known.replace(" or", ",").split(", "))
        hint = f", did you mean {near[0]}?" if near else ";"
        return f"{field} {value!r} is unknown{hint} known: {known}"
    if problem["type"] == "missing":
        return f"{field} is missing"
    return first_problem(error)


def _known(
    fields: Mapping[Any, Any], kind: type[BaseModel], where: str, ignored: set[str]
) -> dict[str, Any]:
    """The fields that mean something; those that mean nothing are noted in `ignored`.

    Raises:
        UpcycleError: one is nearly one that does.
    """
    known = list(kind.model_fields)
    kept = {}
    for key, value in fields.items():
        name = str(key)
        if name in known:
            kept[name] = value
            continue
        near = [MEANT[name]] if MEANT.get(name) in known else []
        if name not in WITHOUT_EFFECT:
            near = near or difflib.get_close_matches(name, known, n=1)
        if near:
            raise UpcycleError(f"{where} has an unknown field {name}, did you mean {near[0]}?")
        ignored.add(name)
    return kept


def _items(value: Any, kind: str, path: Path, ignored: set[str]) -> list[dict[str, Any]]:
    """The entries of a list of experts, their prompts as lists of text."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise UpcycleError(f"{path}: {kind} is no list: begin each expert with a dash")
    items = []
    for number, entry in enumerate(value):
        where = f"{kind.removesuffix('s').replace('_', ' ')} {number}"
        if not isinstance(entry, Mapping):
            raise UpcycleError(
                f"{path}: {where} is {str(entry)[:60]!r}, no mapping: give it source_model and "
                "prompts"
            )
        item = _known(entry, Item, f"{path}: {where}", ignored)
        if isinstance(item.get("source_model"), str):
            where += f" ({item['source_model']})"
        for field in ("positive_prompts", "negative_prompts"):
            item[field] = _prompts(item.get(field), f"{path}: {where}, {field}")
        items.append(item)
    return items


def _prompts(value: Any, where: str) -> list[str]:
    """A list of text; one text is a list of one."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise UpcycleError(f"{where} is {_read(value)}: give a list of texts, in quotes")
    for number, prompt in enumerate(value):
        if not isinstance(prompt, str):
            raise UpcycleError(f"{where}, item {number} is {_read(prompt)}: put it in quotes")
    return list(value)


def _read(value: Any) -> str:
    """What YAML made of what should be text."""
    kinds = {bool: "a truth value", int: "a number", float: "a number", dict: "a mapping"}
    kinds |= {type(None): "nothing", list: "a list"}
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]} …"
    return f"{kinds.get(type(value), type(value).__name__)} to YAML, {shown}, and no text"


def _fields(text: str, path: Path) -> dict[Any, Any]:
    """The fields of a file.

    Raises:
        UpcycleError: it is not YAML, has a key twice, or says what no MoE is made from.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            raise UpcycleError(f"{path} is empty: give {EXPECTED}")
        _count(node, path, {}, 0)
        _check_keys(node, path, set())
        fields = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        raise UpcycleError(f"{path}: {_where(error, text)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UpcycleError(f"{path} is not YAML: {' '.join(said.split())[:LONGEST]}") from error
    if not isinstance(fields, dict):
        raise UpcycleError(f"{path} is no mapping of fields to values: give {EXPECTED}")
    if "experts" not in fields and (dense := fields.keys() & {"models", "slices"}):
        method = f" ({fields['merge_method']})" if "merge_method" in fields else ""
        raise UpcycleError(
            f"{path} has {min(dense)}: and no experts:, so it merges models into a dense one"
            f"{method}; this command makes a Mixture-of-Experts from experts:"
        )
    return fields


def _count(node: yaml.Node, path: Path, sizes: dict[int, int], depth: int) -> int:
    """Values below a node with every alias written out, of which a few make any number.

    Raises:
        UpcycleError: they are too many, or too deep.
    """
    if depth > DEEPEST:
        raise UpcycleError(f"{path} is nested more than {DEEPEST} deep")
    if id(node) not in sizes:
        children = _children(node)
        sizes[id(node)] = 1 + sum(_count(child, path, sizes, depth + 1) for child in children)
    if sizes[id(node)] > MOST_NODES:
        raise UpcycleError(f"{path} holds more than {MOST_NODES:,} values")
    return sizes[id(node)]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _check_keys(node: yaml.Node, path: Path, seen: set[int]) -> None:
    """Raise if a mapping has a key twice, of which YAML would keep the last.

    Raises:
        UpcycleError: the sentence names the key and both lines.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
            continue
        line = key.start_mark.line + 1
        if key.value in lines:
            raise UpcycleError(
                f"{path} gives {key.value} twice, in lines {lines[key.value]} and {line}: keep one"
            )
        lines[key.value] = line
    for child in _children(node):
        _check_keys(child, path, seen)


def _where(error: yaml.MarkedYAMLError, text: str) -> str:
    """The line and column that YAML stumbled at, and what to change there."""
    mark = error.problem_mark or error.context_mark
    lines = text.splitlines()
    for number, line in enumerate(lines[: mark.line + 1 if mark else None], 1):
        if "\t" in line[: len(line) - len(line.lstrip())]:
            return f"line {number} starts with a tab; YAML takes spaces"
        if line.lstrip().startswith("```"):
            return f"line {number} is a fence of Markdown: delete it"
    problem = " ".join((error.problem or str(error)).split())[:LONGEST]
    if mark is None:
        return f"it is not YAML: {problem}"
    place = f"line {mark.line + 1}, column {mark.column + 1}"
    if "document" in problem:
        return f"{place} begins a second document: keep one"
    return f"{place}: {problem}; put text with special characters in quotes"
