"""What config.json may say, as far as it holds for every architecture.

transformers checks the kinds of most fields, but takes sizes with which a model, or only its list
of layers, never comes to be.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, StrictInt, StrictStr, ValidationError

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import first_problem

Layers = Annotated[StrictInt, Field(ge=1, le=10_000)]
Size = Annotated[StrictInt, Field(ge=1, le=2**31)]
Number = Annotated[StrictInt, Field(ge=0, le=2**40)]
Sizes = Size | list[Size]
"""Some architectures have one for each layer."""
Token = Annotated[StrictInt, Field(ge=-1, le=2**31)]
Tokens = Token | list[Token]


class ConfigFields(BaseModel, extra="allow"):
    """Fields that many architectures have; each may be missing or null."""

    model_type: StrictStr
    num_hidden_layers: Layers | None = None
    vocab_size: Size | None = None
    hidden_size: Size | None = None
    intermediate_size: Sizes | None = None
    num_attention_heads: Sizes | None = None
    num_key_value_heads: Sizes | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size | None = None
    sliding_window: Number | None = None
    num_experts: Number | None = None
    num_local_experts: Number | None = None
    n_routed_experts: Number | None = None
    num_experts_per_tok: Number | None = None
    moe_intermediate_size: Number | None = None
    shared_expert_intermediate_size: Number | None = None
    bos_token_id: Tokens | None = None
    eos_token_id: Tokens | None = None
    pad_token_id: Token | None = None
    dtype: StrictStr | None = None
    torch_dtype: StrictStr | None = None


def check_fields(fields: Mapping[str, Any], path: Path) -> None:
    """Refuse what no model has, before it is built.

    Args:
        fields: of the config.json at `path`.

    Raises:
        UpcycleError: a field is of the wrong kind, or a size is absurd.
    """
    try:
        ConfigFields.model_validate(dict(fields))
    except ValidationError as error:
        raise UpcycleError(f"{path} is not a model's config: {first_problem(error)}") from error


def check_layers(layers: int, tensors: int, folder: Path) -> None:
    """Refuse more layers than there are tensors: to build them may take hours.

    Raises:
        UpcycleError: there are.
    """
    if layers > tensors:
        raise UpcycleError(
            f"{folder / 'config.json'} says num_hidden_layers={layers}, but the weights beside it "
            f"are {tensors} tensors: one of them belongs to another model"
        )
