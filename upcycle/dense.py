"""The dense model as transformers builds it, and its hidden states layer by layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from upcycle.errors import UpcycleError


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of this config on the meta device: modules, names and shapes, no memory."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0]
        raise UpcycleError(
            f"transformers can't build a model from config.json: {reason}"
        ) from error
    return model.eval()


class HiddenStream:
    """Calibration tokens on their way through the dense model, one layer in memory at a time.

    transformers' own modules do the work: the model's forward is run once with its layers
    replaced by recorders, which yields the embeddings and the masks and rotary angles that each
    layer is called with.

    Args:
        config: of the dense model.
        embed_VD: the input embeddings, [vocab, hidden].
        tokens_BL: token ids, [sequences, seq_len].
        device: where the layers run. On a CPU they run in float32, elsewhere in the weights' dtype.
    """

    def __init__(
        self, config: PreTrainedConfig, embed_VD: Tensor, tokens_BL: Tensor, device: torch.device
    ) -> None:
        model = skeleton(config)
        self.layers = model.model.layers
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else embed_VD.dtype
        self.batch = max(1, 4096 // tokens_BL.shape[1])
        self.recorders = [_Recorder() for _ in self.layers]
        model.model.layers = nn.ModuleList(self.recorders)
        model.model.norm = nn.Identity()
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
        embed = model.model.embed_tokens
        embed.load_state_dict({"weight": embed_VD.to(device)}, assign=True)
        if hasattr(embed, "embed_scale"):
            embed.embed_scale = torch.tensor(embed.scalar_embed_scale, device=device)
        self.hidden: list[Tensor] = []
        with torch.no_grad():
            for ids_bL in tokens_BL.to(device).split(self.batch):
                model.model(input_ids=ids_bL, use_cache=False)
                self.hidden.append(self.recorders[0].hidden.to(self.dtype))

    @torch.no_grad()
    def step(self, layer: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Move all tokens through one layer; returns what its FFN saw, x [T, D].

        Args:
            layer: must be called for 0, 1, 2, …
            weights: the layer's tensors under their names in the source, without the prefix.
        """
        block = self.layers[layer]
        block.load_state_dict(
            {k: v.to(self.device, self.dtype) for k, v in weights.items()}, assign=True
        )
        tokens = sum(hidden_bLD[..., 0].numel() for hidden_bLD in self.hidden)
        x_TD = torch.empty(tokens, self.hidden[0].shape[-1], device=self.device, dtype=self.dtype)
        room = iter(x_TD.split(self.hidden[0][..., 0].numel()))

        def keep_input(_: nn.Module, args: tuple[Tensor]) -> None:
            next(room).copy_(args[0].flatten(0, 1))

        hook = block.mlp.register_forward_pre_hook(keep_input)
        for i, hidden_bLD in enumerate(self.hidden):
            out = block(hidden_bLD, **self._arguments(layer, len(hidden_bLD)))
            self.hidden[i] = out[0] if isinstance(out, tuple) else out
        hook.remove()
        block.to("meta")
        if not torch.isfinite(x_TD).all():
            raise UpcycleError(
                f"the dense model overflows in layer {layer} on the calibration text, in "
                f"{self.dtype}: its weights are damaged, or need float32 (--device cpu)"
            )
        return x_TD

    def _arguments(self, layer: int, batch: int) -> dict[str, Any]:
        """What transformers called the layer with; the last batch may be the shorter one."""
        arguments = dict(self.recorders[layer].arguments)
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor):
            mask = mask[:1].expand(batch, *mask.shape[1:])
            arguments["attention_mask"] = mask.to(self.dtype) if mask.is_floating_point() else mask
        arguments["position_embeddings"] = tuple(
            angles.to(self.dtype) for angles in arguments["position_embeddings"]
        )
        return arguments


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it was called with, passes the input on."""

    hidden: Tensor
    arguments: dict[str, Any]

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden, arguments
        return hidden
