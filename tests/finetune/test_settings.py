"""Training requests: presets, and what contradicts itself."""

import pytest

import upcycle
from upcycle import UpcycleError
from upcycle.core.settings import shipped_presets, shipped_recipes
from upcycle.finetune.settings import DEFAULT_TOKENS, Training, load_training

HEAL = {"seq_len": 512, "batch_size": 1}
PRESETS = """
    btx domains dot-moe-alignment erc grin heal llama-moe-pretraining lora lte relufy routers
    sigma-moe skywork specialise tomoe-routers
""".split()
DISTILL = {"dot-moe-alignment", "heal", "relufy", "tomoe-routers"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_say_what_they_are(name):
    assert sorted(shipped_presets()) == PRESETS
    assert not shipped_presets().keys() & shipped_recipes().keys()  # `upcycle recipes NAME`
    preset = load_training(name, {}, "the/dense")
    assert (preset.name, preset.teacher) == (name, "the/dense" if name in DISTILL else None)
    assert preset.summary
    assert preset.paper.startswith("arXiv:") or preset.paper == "ours"
    assert Training(**preset.settings()) == preset


@pytest.mark.parametrize(
    ("tokens", "settings", "held", "validations"),
    [
        (131_072, {}, 12 * 512, 4),
        (32_768, {}, 3 * 512, 4),
        (2**20, {}, 8192, 10),
        (262_144, {}, 8192, 7),
        (4096, {}, 512, 1),
        (512, {}, 512, 1),
        (131_072, {"validate_also": "probe:code"}, 6 * 512, 4),
        (131_072, {"validation_tokens": 2048}, 2048, 10),
        (131_072, {"validation_tokens": 65_536}, 65_536, 1),
        (131_072, {"validate_every": 26}, 5 * 512, 10),
        (131_072, {"validate_every": 1}, 512, 256),
    ],
)
def test_validations_read_a_quarter_of_what_trains(tokens, settings, held, validations):
    """Unless they are asked for, or there would be none."""
    made = Training(tokens=tokens, **HEAL, **settings)
    assert made.held_tokens == held
    assert -(-made.total_steps // made.validation_steps) == validations
    if not settings and tokens > 4096:
        assert (1 + validations) * held <= tokens / 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 1, "steps": 1}, "`tokens` and `steps` both"),
        ({"distill": 1}, "`distill=1` compares .* `teacher=DENSE`"),
        ({"match_layers": 1}, "`match_layers=1` compares .* `teacher=DENSE`"),
        ({"next_token": 0}, "`next_token=0` leaves no loss"),
        ({"next_token": 0, "balance": 1, "teacher": "x"}, "`next_token=0` leaves no loss"),
        ({"teacher": "x"}, "`teacher=x` teaches nothing here.* give `distill=1` too, or leave it"),
        ({"merge": True}, "give `lora=RANK` too"),
        ({"lora_alpha": 8}, "`lora_alpha=8` is about low-rank changes: give `lora=RANK`"),
        ({"train": "experts", "router_lr": 0.1}, "`router_lr=0.1` has no effect .* leave it out"),
        ({"train": "router", "weight_decay": 0.1}, "`weight_decay=0.1` has no effect with"),
        ({"lora": 4, "balance_bias": 0.1}, "`balance_bias=.*` changes .* which `lora` leaves"),
        ({"train": "experts", "balance": 0.5}, "`balance=0.5` has no effect with `train=experts`"),
        ({"train": "experts", "z_loss": 0.5}, "`z_loss=0.5` has no effect"),
        ({"train": "experts", "router_warmup": 0.5}, "`router_warmup=0.5` has no effect"),
        ({"train": "experts", "dense_router_gradient": True}, "dense_router_gradient=True`"),
        ({"train": "moe", "starts": {"attention": 0.1}}, "`starts=…` names attention, which does"),
        ({"train": "all", "lora": 2, "starts": {"norms": 0}}, "names norms, which does not train"),
        ({"starts": {"head": 0.1}}, "starts.head"),
        ({"match_warmdown": 0.1}, "no effect without `match_layers=…`: give `match_layers=1` too"),
        (
            {"match_layers": 1, "match_warmdown": 0.1, "next_token": 0, "teacher": "x"},
            "`match_warmdown=0.1` leaves no loss when it is over",
        ),
        ({"hoyer": 0.1}, "`hoyer=0.1` .* give `activation=relu`"),
        ({"activation": "relu"}, "`activation=relu` .* give `train=all`"),
        ({"activation": "relu", "train": "all", "lora": 4}, "leave `lora` out, or begin with"),
        ({"activation": "relu", "train": "all", "balance": 0.1}, "leave `balance` out"),
        ({"leraning_rate": 1}, "unknown setting 'leraning_rate'"),
        ({"lr": 0}, "lr=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"train": "routers"}, "train='routers'"),
        ({"lora": 0}, "lora=0"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"seq_len": 4}, "seq_len=4"),
        ({"steps": 0}, "steps=0"),
        ({"precision": "int8"}, "precision='int8'"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(tmp_path, settings, message):
    (tmp_path / "mine.yaml").write_text("")
    with pytest.raises(UpcycleError, match=message) as caught:
        load_training(tmp_path / "mine.yaml", settings)
    assert "\n" not in str(caught.value)


def test_length_is_tokens_or_steps_and_one_replaces_the_other():
    assert load_training("heal", {"steps": 5}, "d").total_steps == 5
    tokens = load_training("specialise", {"tokens": 50_000, "seq_len": 100, "batch_size": 10})
    assert tokens.total_steps == 50
    assert load_training("lora", {"tokens": 1}).total_steps == 1
    assert Training().total_steps == DEFAULT_TOKENS // (8 * 512)


def test_a_preset_of_ones_own_is_named_after_its_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: router\nsteps: 3\n")
    mine = load_training(path, {"tokens": 4096})
    assert (mine.name, mine.train, mine.total_steps) == ("mine", "router", 1)
    path.write_text("leraning_rate: 3\n")
    with pytest.raises(UpcycleError, match="unknown setting 'leraning_rate'"):
        load_training(path, {})


def test_unknown_preset_gets_a_suggestion():
    with pytest.raises(UpcycleError, match=r"'hael'.*heal"):
        load_training("hael", {})


def test_teacher_is_the_origin_unless_named_or_unused():
    assert load_training("heal", {"teacher": "other"}, "origin").teacher == "other"
    assert load_training("specialise", {}, "origin").teacher is None
    assert load_training("specialise", {"match_layers": 0.1}, "origin").teacher == "origin"
    with pytest.raises(UpcycleError, match="`teacher=DENSE`"):
        load_training("heal", {})


def test_alpha_is_twice_the_rank():
    assert Training(lora=4).alpha == 8
    assert Training(lora=4, lora_alpha=3).alpha == 3


def test_presets_leave_routers_alone_where_only_experts_train():
    training = load_training("specialise", {"train": "experts"})
    assert (training.balance, training.z_loss, training.router_lr) == (0, 0, None)


def test_the_learning_rate_that_is_asked_for_is_that_of_routers_that_train_alone():
    for settings, router_lr in [({}, 1e-3), ({"lr": 0.5}, None), ({"lr": 1, "router_lr": 2}, 2)]:
        training = load_training("specialise", {"train": "router", **settings})
        assert (training.router_lr, training.weight_decay) == (router_lr, 0)
    assert load_training("specialise", {"lr": 0.5}).router_lr == 1e-3


@pytest.mark.parametrize("other", [{"train": "router"}, {"train": "moe"}, {"lora": 4}])
def test_a_preset_goes_with_another_share_of_the_weights(other):
    """That a part does not train is no contradiction where it would not anyway."""
    assert load_training("heal", {"teacher": "x", **other}).starts == {"embeddings": 1.0}


def test_no_is_a_precision_in_yaml(tmp_path):
    (tmp_path / "mine.yaml").write_text("precision: no")
    assert load_training(tmp_path / "mine.yaml", {}).precision == "no"


def test_a_module_of_the_folder_leaves_the_function_of_its_name():
    """This module has imported one."""
    assert callable(upcycle.finetune)


def test_a_presets_gating_can_be_left_out():
    assert load_training("grin", {}).gating.name == "sparse_mixer"
    assert load_training("grin", {"gating": "none"}).gating is None
