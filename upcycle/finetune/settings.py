"""What a training run does: presets and their settings."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.settings import (
    PlugIn,
    Weighed,
    WeighedPlugIns,
    find_recipe,
    override,
    shipped_presets,
    validated,
    yaml_fields,
)
from upcycle.finetune.catalogue import OF_FLAGS, check_names

Train = Literal["router", "partition", "experts", "moe", "all"]
Part = Literal["norms", "embeddings", "ffn", "attention"]
PARTS: dict[Train, tuple[Part, ...]] = {
    "router": (),
    "partition": (),
    "experts": ("ffn",),
    "moe": ("ffn",),
    "all": ("norms", "embeddings", "ffn", "attention"),
}
"""What trains besides routers."""
OF_MATRICES: tuple[Part, ...] = ("ffn", "attention")
"""What low-rank changes are of."""
OF_ROUTERS = (
    *("balance", "z_loss", "router_losses", "dense_router_gradient"),
    *("router_lr", "router_warmup"),
)
"""Settings that have an effect only where routers train."""
OF_EXPERTS = (*OF_ROUTERS, "gating", "balance_bias", "lora")
"""Settings that do not go with another activation of a dense model."""
OF_OTHERS = ("weight_decay", "router_warmup")
"""Settings that have an effect only where not routers alone train."""
OF_ORDINARY_PASSES = ("lora", "gating", "dense_router_gradient")
"""Settings that do not go with learning a partition."""
SHORTEST = 8
"""Tokens of a sequence."""
Share = Annotated[float, Field(ge=0, le=1)]


def _no(value: Any) -> Any:
    """YAML reads the word no as false."""
    return "no" if value is False else value


def _unless_none(value: Any) -> Any:
    """Of a plug-in that may be left out."""
    return None if value == "none" else value


class Training(BaseModel):
    """A training request."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = "custom"
    summary: str = ""
    paper: str = ""
    departures: tuple[str, ...] = ()
    """Where a preset can't or does not follow its paper."""
    measured: str | None = None
    """What it has brought a real model."""

    train: Train = "moe"
    """Which weights change: `router` | `experts` | `moe` (both) | `all`; or `partition`: none but
    the router's, and which expert of a split each neuron belongs to."""
    lora: Annotated[PositiveInt, Field(le=2**20)] | None = None
    """Train low-rank changes of this rank, in place of the weights themselves."""
    lora_alpha: PositiveInt | None = None
    """Low-rank changes count alpha / rank. By default 2 x rank."""
    merge: bool = False
    """Add low-rank changes to the weights at the end and write a plain checkpoint."""

    activation: Literal["relu"] | None = None
    """Of a dense model, before a split: put `relu` in place of the activation of its FFNs, which
    makes some neurons exactly zero, before the first step."""
    hoyer: NonNegativeFloat = 0.0
    """Weight of the square-Hoyer loss of what that activation puts out, (Σ|a|)² / Σa² per token,
    which makes more neurons zero. It rises linearly over all steps."""

    data: str = "builtin"
    """Text to train on: a file or folder of text or chats, `builtin` or
    `hf:DATASET[@config][:split[:column]]`; several, joined by +, in equal parts,
    or of `a.txt*2+b.txt` the first twice as much."""
    assistant_only_loss: bool = False
    """Learn the assistant's turns of chats alone, by the tokenizer's chat template."""
    tokens: PositiveInt | None = None
    """To train on, from all over a file; its end validates. By default 262144."""
    steps: PositiveInt | None = None
    """To train for, instead of tokens."""
    seq_len: PositiveInt = Field(default=512, ge=SHORTEST)
    """Tokens per sequence."""
    batch_size: PositiveInt = Field(default=8, le=2**20)
    """Sequences per step, over all processes."""
    micro_batch: PositiveInt = 1
    """Sequences that a process holds activations of at a time."""
    validation_tokens: PositiveInt | None = None
    """Held back from the end of the text, to validate on; of a text that holds too little for that
    and for training, at most a tenth. By default a twentieth of the tokens to train on, at most
    8192."""
    validate_also: str | None = None
    """Texts, joined by +, that are validated on, too, and never decide which state is kept, such
    as `probe:code+probe:news`: whether training costs what it is not about."""
    validate_every: PositiveInt | None = None
    """Steps between validations. By default there are up to ten in a run, as long as all of them
    together read no more than a quarter of what training does, which takes about a tenth of the
    time. The state is saved after each of them, and after every tenth of the steps."""
    keep_best: bool = True
    """The result is the state that did best in validation, not the last one: by its loss, of which
    with `distill` both parts count, each times its weight."""

    lr: PositiveFloat | None = None
    """Highest learning rate. By default `relative_lr` by the model's weights."""
    relative_lr: PositiveFloat = 0.025
    """Where no `lr` is given, the rate over the root mean square of the experts' gate_proj and
    up_proj (of the FFNs, where there are no experts yet) / √hidden_size: the rates that fit the two
    models that were measured differ by ten, and are the same in this unit (muP,
    arXiv:2203.03466)."""
    router_lr: PositiveFloat | None = None
    """Of the routers. By default lr; either is multiplied by a tempered router's temperature."""
    weight_decay: NonNegativeFloat = 0.0
    """Of matrices other than routers."""
    warmup: Share = 0.05
    """Share of the steps in which the learning rate rises."""
    final_lr: Share = 0.1
    """Share of the learning rate that a cosine falls to."""
    router_warmup: Share = 0.0
    """Share of the steps, at the start, in which only the routers move."""
    starts: dict[Part, Share] = {}
    """Share of the steps before a part moves, where that is not router_warmup's: `{norms: 0, ffn:
    0.1, attention: 0.3}`, of `norms`, `embeddings`, `ffn` and `attention`. One that starts at 1
    does not train."""
    clip: PositiveFloat = 1.0
    """Largest norm of a step's gradient."""

    teacher: str | None = None
    """The dense model to learn from. By default what the model was made from."""
    next_token: NonNegativeFloat = 1.0
    """Weight of the next-token loss."""
    distill: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the teacher."""
    distill_temperature: PositiveFloat = 1.0
    """What both models' logits are divided by for that; the divergence counts its square."""
    teacher_top_k: NonNegativeInt = 0
    """Run the teacher once over all text before the first step and keep, on the disk, its so many
    likeliest words per token; the others count as one. 0 runs it in every step."""
    match_layers: NonNegativeFloat = 0.0
    """Weight of the distance from the teacher's hidden states."""
    match_warmdown: Annotated[Share, Field(gt=0)] | None = None
    """Share of the steps, at the start, over which that weight falls to 0. By default it stays."""
    balance: NonNegativeFloat = 0.0
    """Weight of the load-balancing loss, over all sequences of a step."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the router z-loss."""
    balance_bias: NonNegativeFloat = 0.0
    """What a step moves the selection bias by, where the target has one (glm4_moe, deepseek_v3,
    laguna, ernie4_5_moe, lfm2_moe, nemotron_h): balance without a loss. DeepSeek-V3 has 0.001
    (arXiv:2412.19437). Scaled down for a tempered router."""
    router_losses: WeighedPlugIns | None = None
    """Weights of further losses of routers, by name: `--set router_losses.cv2=0.01`, and of their
    parameters: `--set router_losses.erc.alpha=0.9`."""
    gating: Annotated[PlugIn | None, BeforeValidator(_unless_none)] = None
    """Which experts tokens get while the model trains, such as `noisy_top_k`. By default, or by
    `none`, what they get afterwards."""
    dense_router_gradient: bool = False
    """Let routers learn from experts not selected, too."""

    precision: Annotated[Literal["no", "bf16", "fp16"] | None, BeforeValidator(_no)] = None
    """Mixed precision: `no` | `bf16` | `fp16`. By default what `accelerate launch` says, else
    no."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights while they train: `auto` (float32, the checkpoint's own under LoRA) |
    `float32` | `bfloat16` | `float16`."""
    gradient_checkpointing: bool = False
    """Less memory, more work."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Same seed, same bytes on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it trains: `auto` | `cpu` | `cuda`."""
    tracker: str | None = None
    """Where accelerate logs metrics beside train_log.jsonl: tensorboard, wandb and others."""

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        check_names(self.gating, self.router_losses)
        if self.tokens is not None and self.steps is not None:
            raise UpcycleError("`tokens` and `steps` both say how long to train: give one of them")
        if not (self.next_token or self.distill or self.match_layers):
            raise UpcycleError(
                f"{setting('next_token', 0)} leaves no loss: give `distill=1` or "
                f"{setting('match_layers', 1)}"
            )
        self._check_teacher()
        self._check_schedules()
        self._check_low_rank()
        self._check_trained()
        self._check_activation()
        return self

    def _check_teacher(self) -> None:
        for name in ("distill", "match_layers"):
            if getattr(self, name) and self.teacher is None:
                raise UpcycleError(
                    f"{setting(name, getattr(self, name))} compares with a dense model, and what "
                    "the model was made from is not known, or is not there: name it by "
                    f"`teacher=DENSE`, or give {setting(name, 0)}"
                )
        if self.teacher_top_k and self.match_layers:
            raise UpcycleError(
                f"{setting('teacher_top_k', self.teacher_top_k)} keeps the teacher's predictions "
                f"alone, but {setting('match_layers', self.match_layers)} compares hidden states: "
                "set one of them to 0"
            )
        for name, default in (("teacher_top_k", 0), ("distill_temperature", 1.0)):
            if getattr(self, name) != default and not self.distill:
                raise UpcycleError(
                    f"{setting(name, getattr(self, name))} is about the divergence from the "
                    f"teacher, which does not count: give `distill=1`, or set it to {default:g}"
                )
        if self.teacher is not None and not (self.distill or self.match_layers):
            raise UpcycleError(
                f"`teacher={self.teacher}` teaches nothing here, where no loss compares with it: "
                "give `distill=1` too, or leave it out"
            )

    def _check_low_rank(self) -> None:
        if self.lora is None and (self.merge or self.lora_alpha is not None):
            what = "`merge`" if self.merge else setting("lora_alpha", self.lora_alpha)
            raise UpcycleError(f"{what} is about low-rank changes: give `lora=RANK` too")
        if self.lora and self.balance_bias:
            raise UpcycleError(
                f"{setting('balance_bias', self.balance_bias)} changes the checkpoint itself, "
                "which `lora` leaves as it is: give `balance`, or drop `lora`"
            )

    def _check_trained(self) -> None:
        """What has no effect on what trains."""
        kept = {"experts": "the routers", "router": "all but the routers"}
        void = {"partition": OF_ORDINARY_PASSES, "experts": OF_ROUTERS, "router": OF_OTHERS}
        for name in filter(lambda name: getattr(self, name), void.get(self.train, ())):
            what = setting(name, getattr(self, name))
            if self.train == "partition":
                raise UpcycleError(
                    f"{what} does not go with `train=partition`, which runs the experts in a way "
                    "of its own: leave it out"
                )
            raise UpcycleError(
                f"{what} has no effect with `train={self.train}`, which leaves {kept[self.train]} "
                "alone: leave it out, or give `train=moe`"
            )

    def _check_activation(self) -> None:
        if self.activation is None:
            if self.hoyer:
                raise UpcycleError(
                    f"{setting('hoyer', self.hoyer)} makes more of relu's outputs zero: give "
                    f"{setting('activation', 'relu')} too"
                )
            return
        given = setting("activation", self.activation)
        if self.train != "all":
            raise UpcycleError(
                f"{given} changes what every layer computes, which all weights have to make good: "
                "give `train=all`"
            )
        for name in filter(lambda name: getattr(self, name), OF_EXPERTS):
            raise UpcycleError(
                f"{given} trains all weights of a dense model, which has no experts yet: leave "
                f"{setting(name)} out, or begin with the preset relufy, if yours has it"
            )

    def _check_schedules(self) -> None:
        parts = [part for part in PARTS[self.train] if not self.lora or part in OF_MATRICES]
        moving = {part for part, start in self.starts.items() if start < 1}
        for part in sorted(moving - set(parts)):
            raise UpcycleError(
                f"{setting('starts')} names {part}, which does not train here: leave it out, or "
                "give `train=all` without `lora`"
            )
        if self.match_warmdown is None:
            return
        warmdown = setting("match_warmdown", self.match_warmdown)
        if not self.match_layers:
            raise UpcycleError(
                f"{warmdown} has no effect without {setting('match_layers')}: give "
                f"{setting('match_layers', 1)} too"
            )
        if not (self.next_token or self.distill):
            raise UpcycleError(
                f"{warmdown} leaves no loss when it is over: give `distill=1` too, or leave it out"
            )

    def start(self, part: str) -> float:
        """Share of the steps before a part moves."""
        if part == "router":
            return 0.0
        starts: Mapping[Any, float] = self.starts
        return starts.get(part, self.router_warmup)

    def loss_weights(self, step: int) -> dict[str, float]:
        """Of the losses that are not the routers', in the step after so many."""
        over = 1.0 if self.match_warmdown is None else self.match_warmdown * self.total_steps
        left = 1.0 if self.match_warmdown is None else max(0.0, 1 - step / over)
        return {
            "next_token": self.next_token,
            "distill": self.distill,
            "match_layers": left * self.match_layers,
            "hoyer": (step + 1) / self.total_steps * self.hoyer,
        }

    def with_rate(self, unit: float) -> "Training":
        """The request with a learning rate: its own, or `relative_lr` in this unit."""
        if self.lr is not None:
            return self
        return self.model_copy(update={"lr": float(f"{self.relative_lr * unit:.3g}")})

    @property
    def rate(self) -> float:
        """The highest learning rate, of a request that has one."""
        if self.lr is None:
            raise ValueError("a request without `lr` has a rate when the weights are known")
        return self.lr

    def objective(self, validation: Mapping[str, float]) -> float:
        """What the state that is kept has least of, by what a validation has measured."""
        if not self.distill:
            return validation["loss"]
        return self.next_token * validation["loss"] + self.distill * validation["kl"]

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def total_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        return max(1, (self.tokens or DEFAULT_TOKENS) // self.step_tokens)

    @property
    def weighed_router_losses(self) -> dict[str, Weighed]:
        """All losses of routers that count."""
        own = {name: Weighed(weight=getattr(self, name)) for name in OF_FLAGS}
        return {
            n: each for n, each in (own | dict(self.router_losses or {})).items() if each.weight
        }

    def field_of(self, router_loss: str) -> str:
        """The setting of a router loss's weight."""
        return router_loss if router_loss in OF_FLAGS else f"router_losses.{router_loss}"

    @property
    def held_tokens(self) -> int:
        """To validate on; of the texts of `validate_also` as many again."""
        if self.validation_tokens is not None:
            return self.validation_tokens
        times = FEWEST_VALIDATIONS
        if self.validate_every is not None:
            times = 1 + -(-self.total_steps // self.validate_every)
        tokens = min(MOST_HELD, self._read_by_validations // times)
        return max(1, tokens // self.seq_len) * self.seq_len

    @property
    def validation_steps(self) -> int:
        """Steps from one validation to the next."""
        if self.validate_every is not None:
            return self.validate_every
        times = self._read_by_validations // self.held_tokens - 1  # one comes before all steps
        return -(-self.total_steps // max(1, min(MOST_VALIDATIONS, times)))

    @property
    def saving_steps(self) -> int:
        """Steps from one saved state to the next, unless a validation comes between."""
        return max(1, self.total_steps // SAVES)

    @property
    def _read_by_validations(self) -> int:
        """Tokens of each text that is held back, by all of them together."""
        kinds = 1 if self.validate_also is None else 2
        return self.total_steps * self.step_tokens // (TRAINED_PER_VALIDATED * kinds)

    @property
    def alpha(self) -> int:
        return self.lora_alpha or 2 * (self.lora or 1)

    def settings(self) -> dict[str, Any]:
        """All fields as plain values that make the same request again."""
        return self.model_dump(mode="json")


DEFAULT_TOKENS = 262_144
MOST_HELD = 8192
"""Tokens to validate on, unless more are asked for."""
TRAINED_PER_VALIDATED = 4
"""Tokens that steps read for each that validations do, which takes about three times as long."""
FEWEST_VALIDATIONS = 5
"""Of a run, with the one before all steps: a short one has fewer held-out tokens instead, as long
as they make one sequence."""
MOST_VALIDATIONS = 10
"""After steps."""
SAVES = 10


def load_training(
    preset: str | Path, overrides: Mapping[str, Any], origin: str | None = None
) -> Training:
    """A shipped preset or a YAML file, with some of its fields replaced.

    Args:
        origin: the dense model that the MoE was made from, if it is known: the teacher unless
            another is named.

    Raises:
        UpcycleError: no such preset, or a field that is unknown, out of range or contradicts
            another.
    """
    fields = yaml_fields(find_recipe(preset, shipped_presets()))
    for one, other in (("tokens", "steps"), ("steps", "tokens")):
        if overrides.get(one) is not None:
            fields.pop(other, None)
    for name in _void(fields, overrides):
        fields.pop(name, None)
    override(fields, overrides, {"gating": None}, {"router_losses"})
    if fields.get("teacher") is None and (fields.get("distill") or fields.get("match_layers")):
        fields["teacher"] = origin
    return validated(Training, fields, "the request")


def _void(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> Iterator[str]:
    """A preset's settings that have no effect on what is to train in its place, and its learning
    rate of routers where another one is asked for and they train alone."""
    for train, names in (("experts", OF_ROUTERS), ("router", OF_OTHERS)):
        if overrides.get("train") == train:
            yield from names
    alone = overrides.get("train", fields.get("train")) == "router"
    if alone and overrides.get("lr") is not None:
        yield "router_lr"
