"""The dense model as transformers builds it, and its hidden states layer by layer."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import blaming
from upcycle.core.types import DenseFFN
from upcycle.models.families import FAMILIES, auto_class
from upcycle.models.families.base import Blocks, Stack
from upcycle.models.halves import halves
from upcycle.models.names import HEAD
from upcycle.models.stand_ins import Constant, Given, Recorder, Replay, SilentFFN, SilentMixer

BATCH_TOKENS = 4096  # that go through a layer at a time
PREDICTED_TOKENS = 512  # whose predictions are in memory at a time
UNTOLD = -100
"""In place of the token after a sequence's last one."""


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of this config on the meta device: modules, names and shapes, no memory."""
    with warnings.catch_warnings():
        # A target that always has a shared expert holds one of no neurons.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        with blaming("transformers can't build a model from config.json"), torch.device("meta"):
            auto = auto_class(config)
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
    return model.eval()


class HiddenStream:
    """Calibration tokens on their way through the layers, one layer in memory at a time.

    transformers' own modules do the work: the model's forward is run once with its layers
    replaced by recorders, which yields the embeddings and the masks and rotary angles that each
    layer is called with. A layer is passed in two halves, so that another FFN can take the place
    of the dense one: `attend` up to what the FFN sees, `advance` from what it puts out.

    Of an encoder-decoder, the first half of every sequence goes through the encoder; then the
    other half goes through the decoder, whose layers are told what came of the first.

    Tokens that went `through` all layers can turn round: `to_loss` begins the way back, which
    `back` goes on, one layer in memory at a time again. (Not those of an encoder-decoder.)

    Args:
        config: of the dense model.
        outer: the tensors that belong to no layer, under their names in the source; of these, the
            embeddings' are looked at, [vocab, hidden].
        tokens_BL: token ids, [sequences, seq_len]; or several such, each of its own seq_len, whose
            tokens T then follow each other.
        device: where the layers run. On a CPU they run in float32, elsewhere in the weights' dtype.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        outer: Mapping[str, Tensor],
        tokens_BL: Tensor | Sequence[Tensor],
        device: torch.device,
    ) -> None:
        family = FAMILIES[config.model_type]
        self.config, self.blocks = config, family.blocks
        self.model = model = skeleton(config).requires_grad_(False)
        self.groups = [tokens_BL] if isinstance(tokens_BL, Tensor) else list(tokens_BL)
        self.device = device
        self.stacks = [_Stacked(model, stack, self.blocks) for stack in family.stacks]
        # Nobody else holds a layer, so that it is gone once it is finished.
        self.layers = [layer for stack in self.stacks for layer in stack.give_layers()]
        self.recorders = [recorder for stack in self.stacks for recorder in stack.recorders]
        self.ffns = [stack.ffn for stack in self.stacks for _ in stack.recorders]
        self.decoder = decoder = self.stacks[-1].module
        if getattr(decoder, "rotary_emb", None) is not None:
            decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(device)
        for i, rotary in enumerate(getattr(decoder, "rotary_embs", ())):  # one for each base
            decoder.rotary_embs[i] = type(rotary)(config=rotary.config).to(device)
        self.dtype = self._load_embeddings(outer)
        self.hidden: list[Tensor] = []
        self.branches: list[Tensor] = []
        # By the place in `hidden`: what its layers leave for later ones, and whose batch it is of.
        self.left: list[dict[str, Any]] = []
        # By the same place, embeddings of what the stacks after the first are given.
        self.waiting: list[list[Tensor]] = []
        embed = getattr(decoder, self.blocks.embeddings[0])
        with torch.no_grad():
            for ids_bL in self._batches():
                first_bL, *others = halves(config, ids_bL)
                self._enter(self.stacks[0], input_ids=first_bL)
                self.waiting.append([embed(ids) for ids in others])
        self.batches = list(range(len(self.hidden)))
        # They are not needed again before the end: a large vocabulary's may be gigabytes.
        for stack in self.stacks:
            for name in self._embeddings:
                _unload(getattr(stack.module, name))

    def _enter(self, stack: "_Stacked", **given: Any) -> None:
        """Let a batch come before a stack's first layer."""
        stack.module(use_cache=False, **given)
        first = stack.recorders[0]
        self.hidden.append(first.hidden)
        self.left.append(first.left(first.hidden.shape[1]))

    @torch.no_grad()
    def _cross(self, before: "_Stacked", after: "_Stacked") -> None:
        """Go on with what the decoder is given, once the encoder is passed."""
        encoded = [before.norm(hidden_bLD) for hidden_bLD in self.hidden]
        _unload(before.norm)
        self.hidden, self.left = [], []
        for encoded_bLD, waiting in zip(encoded, self.waiting, strict=True):
            seen = {"encoder_hidden_states": encoded_bLD}
            self._enter(after, inputs_embeds=waiting.pop(0), **seen)
            self.left[-1] |= seen

    def _batches(self) -> Iterator[Tensor]:
        """Token ids [b, L] as they go through a layer together."""
        for ids_BL in self.groups:
            yield from ids_BL.to(self.device).split(max(1, BATCH_TOKENS // ids_BL.shape[1]))

    @property
    def _embeddings(self) -> list[str]:
        """Modules before the layers; some models of a family have fewer."""
        return [name for name in self.blocks.embeddings if hasattr(self.decoder, name)]

    def _load_embeddings(self, outer: Mapping[str, Tensor]) -> torch.dtype:
        """Give the modules before the layers their weights; the dtype in which layers run."""
        for name in self._embeddings:
            place = f"model.{name}."
            own = {n.removeprefix(place): t for n, t in outer.items() if n.startswith(place)}
            on_cpu = self.device.type == "cpu"
            dtype = torch.float32 if on_cpu else next(iter(own.values())).dtype
            weights = {n: t.to(self.device, dtype) for n, t in own.items()}
            for module in (getattr(stack.module, name) for stack in self.stacks):
                module.load_state_dict(weights, assign=True)
                if hasattr(module, "embed_scale"):
                    module.embed_scale = torch.tensor(module.scalar_embed_scale, device=self.device)
        for stack in self.stacks[:-1]:
            place = f"{stack.name}.{self.blocks.norm}."
            own = {n.removeprefix(place): t for n, t in outer.items() if n.startswith(place)}
            weights = {n: t.to(self.device, dtype) for n, t in own.items()}
            stack.norm.load_state_dict(weights, assign=True)
        return dtype

    @torch.no_grad()
    def attend(self, layer: int, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Move all tokens through a layer's attention.

        Args:
            layer: must be called for 0, 1, 2, …, each time followed by `advance`.
            weights: the layer's tensors under their names in the source, without the prefix.

        Returns:
            What its FFN sees, x [T, D], and the norm [T] of what the FFN's output is added to.
        """
        block, blocks = self._load(layer, weights), self.blocks
        self.ffn, silent = block.get_submodule(self.ffns[layer]), SilentFFN()
        self.after = {name: getattr(block, name) for name in blocks.after}
        self._set(layer, {self.ffns[layer]: silent} | dict(blocks.after))
        mixers = {name: module for name, module in block.named_modules() if name in blocks.mixers}
        stand_ins = {name: SilentMixer(module) for name, module in mixers.items()}
        self._set(layer, stand_ins)
        x_TD, room = self._room(self.dtype)
        for i, hidden_bLD in enumerate(self.hidden):
            self.hidden[i] = self._run(layer, hidden_bLD, i)
            next(room).copy_(silent.x_bLD.flatten(0, 1))
        for stand_in in stand_ins.values():
            stand_in.mixer = None
        if not torch.isfinite(x_TD).all():
            raise UpcycleError(
                f"the dense model overflows in layer {layer} on the calibration text, in "
                f"{self.dtype}: its weights are damaged, or need float32 (`device=cpu`)"
            )
        return x_TD, torch.cat([h_bLD.norm(dim=-1).flatten() for h_bLD in self.hidden])

    def entering(self) -> Tensor:
        """Before `attend`: the residual stream that enters the layer, [T, D]."""
        return torch.cat([hidden_bLD.flatten(0, 1) for hidden_bLD in self.hidden])

    def lag(self, other: "HiddenStream") -> Tensor:
        """What these hidden states lack of another stream's of the same tokens, [T, D] in float32.
        Between `attend` and `advance` they are what the FFN's output is added to."""
        lag_TD, room = self._room(torch.float32)
        for ours_bLD, theirs_bLD in zip(self.hidden, other.hidden, strict=True):
            next(room).copy_(theirs_bLD.flatten(0, 1)).sub_(ours_bLD.flatten(0, 1))
        return lag_TD

    def _room(self, dtype: torch.dtype) -> tuple[Tensor, Iterator[Tensor]]:
        """An empty tensor [T, D] for all tokens, and its rows of each batch in turn."""
        sizes = [hidden_bLD[..., 0].numel() for hidden_bLD in self.hidden]
        room_TD = torch.empty(sum(sizes), self.hidden[0].shape[-1], device=self.device, dtype=dtype)
        return room_TD, iter(room_TD.split(sizes))

    @torch.no_grad()
    def branch(self, layer: int, y_TD: Tensor) -> None:
        """Between `attend` and `advance`: let the first batch also go on in another way, with
        this output of its FFN, and through the dense layers after it."""
        self._set(layer, {self.ffns[layer]: Replay(y_TD)} | self.after)
        self.branches.append(self._run(layer, self.hidden[0], 0))

    @torch.no_grad()
    def advance(self, layer: int, y_TD: Tensor | None = None) -> None:
        """Move all tokens through the rest of the layer: its own FFN, or one in its place that
        puts out y for the x of `attend`."""
        ffn = self.ffn if y_TD is None else Replay(y_TD)
        self._set(layer, {self.ffns[layer]: ffn} | self.after)
        for i, hidden_bLD in enumerate(self.hidden):
            self.hidden[i] = self._run(layer, hidden_bLD, i)
        self.hidden += self.branches
        self.batches += [0 for _ in self.branches]
        self.left += [{n: copy(kept) for n, kept in self.left[0].items()} for _ in self.branches]
        self.branches = []
        self.ffn = self._finish(layer)

    @torch.no_grad()
    def through(
        self, layer: int, weights: Mapping[str, Tensor], *, to_return: bool = False
    ) -> None:
        """Move all tokens through a whole layer, in place of `attend` and `advance`; if they are to
        return, `back` through it."""
        block = self._load(layer, weights)
        for i, hidden_bLD in enumerate(self.hidden):
            self.hidden[i] = self._run(layer, hidden_bLD, i)
        if to_return:
            _unload(block)
        else:
            self._finish(layer)

    def to_loss(self, outer: Mapping[str, Tensor]) -> None:
        """After `through` of the last layer: turn round, at the loss of every token but a
        sequence's first, in nats, summed over them.

        Args:
            outer: as `log_probs` takes it.
        """
        self._load_head(outer)
        batches = zip(self.hidden, self._batches(), strict=True)
        self.gradients = [self._loss_gradient(hidden_bLD, ids) for hidden_bLD, ids in batches]
        self.hidden = []
        _unload(self.model)

    def _loss_gradient(self, hidden_bLD: Tensor, ids_bL: Tensor) -> Tensor:
        """∂loss/∂hidden [b, L, D] after the last layer, PREDICTED_TOKENS at a time."""
        next_bL = ids_bL.roll(-1, 1)
        next_bL[:, -1] = UNTOLD
        pieces = zip(
            hidden_bLD.flatten(0, 1).split(PREDICTED_TOKENS),
            next_bL.flatten().split(PREDICTED_TOKENS),
            strict=True,
        )
        gradients = []
        for hidden_tD, next_t in pieces:
            with torch.enable_grad():
                hidden_1tD = hidden_tD[None].requires_grad_()
                logits_tV = self._logits(hidden_1tD)[0]
                loss = cross_entropy(logits_tV, next_t, ignore_index=UNTOLD, reduction="sum")
            gradients += torch.autograd.grad(loss, hidden_1tD)
        return torch.cat(gradients, 1).view_as(hidden_bLD)

    def back(
        self, layer: int, weights: Mapping[str, Tensor], entering_TD: Tensor, *, bare: bool = False
    ) -> Tensor | None:
        """Move all tokens' gradients back through a whole layer.

        Args:
            layer: must be called for the last one, the one before it, …, after `to_loss`.
            weights: as `attend` takes them.
            entering_TD: what `entering` was before the layer.
            bare: whether the layer has no FFN.

        Returns:
            ∂loss/∂y [T, D] of what its FFN puts out, y; None of a layer without an FFN.
        """
        block, heard = self._load(layer, weights), list[Tensor]()
        if not bare:
            ffn = block.get_submodule(self.ffns[layer])
            ffn.register_forward_hook(lambda module, given, y_bLD: heard.append(y_bLD))
        sizes = [leaving_bLD[..., 0].numel() for leaving_bLD in self.gradients]
        of_output: list[Tensor] = []
        for i, entering_tD in enumerate(entering_TD.to(self.device).split(sizes)):
            with torch.enable_grad():
                entering_bLD = entering_tD.view_as(self.gradients[i]).requires_grad_()
                leaving_bLD = self._run(layer, entering_bLD, i)
            self.gradients[i], *of_y = torch.autograd.grad(
                leaving_bLD, [entering_bLD, *heard], self.gradients[i]
            )
            of_output += [each.flatten(0, 1) for each in of_y]
            heard.clear()
        self._finish(layer)
        return torch.cat(of_output) if of_output else None

    def _finish(self, layer: int) -> nn.Module:
        """Free what only this layer needed."""
        self.layers[layer] = nothing = nn.Identity()
        self.recorders[layer].beside.clear()
        return nothing

    def _load(self, layer: int, weights: Mapping[str, Tensor]) -> nn.Module:
        for before, after in pairwise(self.stacks):
            if self.recorders[layer] is after.recorders[0]:
                self._cross(before, after)
        block: nn.Module = self.layers[layer]
        block.load_state_dict(
            {k: v.to(self.device, self.dtype) for k, v in weights.items()}, assign=True
        )
        return block

    def _set(self, layer: int, attributes: Mapping[str, Any]) -> None:
        for name, value in attributes.items():
            place, _, own = name.rpartition(".")
            setattr(self.layers[layer].get_submodule(place), own, value)

    def last_log_probs(self, outer: Mapping[str, Tensor], tokens: int) -> Iterator[Tensor]:
        """After the last layer: log-probabilities [t, V] of the last tokens, in order,
        PREDICTED_TOKENS at a time."""
        last_TD = self.entering()[-tokens:]
        self.hidden = list(last_TD[None].split(PREDICTED_TOKENS, 1))
        return (log_probs_1tV[0] for log_probs_1tV in self.log_probs(outer))

    @torch.no_grad()
    def log_probs(self, outer: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """After the last layer: log-probabilities [sequences, seq_len, V] of each batch.

        Args:
            outer: the tensors that belong to no layer, under their names in the source.
        """
        self._load_head(outer)
        for hidden_bLD in self.hidden:
            yield self._logits(hidden_bLD).log_softmax(-1)

    def _load_head(self, outer: Mapping[str, Tensor]) -> None:
        setattr(self.decoder, self.blocks.norm, self.stacks[-1].norm)
        weights = {k: v.to(self.device, self.dtype) for k, v in outer.items()}
        weights.setdefault(HEAD, weights[f"model.{self.blocks.embeddings[0]}.weight"])
        self.model.load_state_dict(weights, assign=True, strict=False)

    def _logits(self, hidden_bLD: Tensor) -> Tensor:
        """Of hidden states after the last layer, in float32."""
        self.decoder.layers = nn.ModuleList([Constant(self.recorders[0], hidden_bLD)])
        # Which tokens they were no longer matters.
        ids_bL = torch.zeros(hidden_bLD.shape[:2], dtype=torch.int64, device=self.device)
        logits_bLV: Tensor = self.model(input_ids=ids_bL, use_cache=False).logits.float()
        return logits_bLV

    def _run(self, layer: int, hidden_bLD: Tensor, place: int) -> Tensor:
        beside = self.recorders[layer].beside[self.batches[place]]
        arguments = self._arguments(layer, *hidden_bLD.shape[:2]) | self.left[place]
        out = self.layers[layer](hidden_bLD, *beside, **arguments)
        hidden, *others = out if isinstance(out, tuple) else (out,)
        # A layer whose mixers are silent puts out nothing else.
        handed_on = zip(self.blocks.handed_on, others, strict=False)
        self.left[place] |= {name: x for name, x in handed_on if x is not None}
        left: Tensor = hidden
        return left

    def _arguments(self, layer: int, batch: int, length: int) -> dict[str, Any]:
        """What transformers called the layer with for sequences of this length; the last batch of
        them may be the shorter one."""
        arguments = dict(self.recorders[layer].arguments[length])
        for name in ("attention_mask", "encoder_attention_mask"):
            mask = arguments.get(name)
            if isinstance(mask, Tensor):
                mask = mask[:1].expand(batch, *mask.shape[1:])
                arguments[name] = mask.to(self.dtype) if mask.is_floating_point() else mask
        if arguments.get("position_embeddings") is not None:
            angles = arguments["position_embeddings"]
            arguments["position_embeddings"] = tuple(each[:1].to(self.dtype) for each in angles)
        if isinstance(arguments.get("position_ids"), Tensor):
            arguments["position_ids"] = arguments["position_ids"][:1]
        return arguments


def _unload(module: nn.Module) -> None:
    """Let go of a module's weights."""
    gone = {name: weight.to("meta") for name, weight in module.state_dict().items()}
    module.load_state_dict(gone, assign=True)


class _Stacked:
    """A stack of a model, with recorders in place of its layers and without its norm."""

    def __init__(self, model: nn.Module, stack: Stack, blocks: Blocks) -> None:
        self.name, self.ffn = stack.module, stack.ffn + blocks.ffn
        self.module: Any = model.get_submodule(stack.module)
        self._layers: list[nn.Module] = list(getattr(self.module, stack.layers))
        self.recorders = [Recorder(layer, len(blocks.handed_on)) for layer in self._layers]
        self.norm: nn.Module = getattr(self.module, blocks.norm)
        setattr(self.module, stack.layers, nn.ModuleList(self.recorders))
        setattr(self.module, blocks.norm, nn.Identity())

    def give_layers(self) -> list[nn.Module]:
        """The layers, once."""
        given, self._layers = self._layers, []
        return given


def replace_ffn(model: PreTrainedModel, layer: int, ffn: DenseFFN) -> None:
    """Let a whole dense model use another FFN in a layer."""
    family, weight = FAMILIES[model.config.get_text_config().model_type], next(model.parameters())
    given = Given(ffn.to(weight.device, weight.dtype))
    if len(family.stacks) == 1:  # a model of several parts has it elsewhere
        setattr(model.get_decoder().layers[layer], family.blocks.ffn, given)
        return
    for stack in family.stacks:
        place = f"{stack.module}.{stack.layers}"
        count = len(model.get_submodule(place))
        if layer < count:
            model.set_submodule(f"{place}.{layer}.{stack.ffn}{family.blocks.ffn}", given)
            return
        layer -= count
