"""Encoder-decoders: two stacks of layers, of which the second looks at what the first put out."""

import json
import math
import re
import shutil

import pytest
import torch
from reference import TOLERANCE, gap, load, moe_layers, read_json, weights
from safetensors.torch import save_file
from tiny import ENCODER_DECODERS, FAMILIES, edited, make_tokenizer
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration

import upcycle
from upcycle.conversion.inspection import inspect_model
from upcycle.core.errors import UpcycleError
from upcycle.core.types import DenseFFN
from upcycle.evaluation.run import evaluate
from upcycle.finetune.run import finetune
from upcycle.models import families
from upcycle.models.blocks import moe_blocks
from upcycle.models.calibration import probes
from upcycle.models.opening import open_source
from upcycle.models.stream import HiddenStream, replace_ffn
from upcycle.models.tokens import open_reader

RNG = torch.Generator().manual_seed(1)
READ = torch.randint(0, 256, (2, 90), generator=RNG)
"""Longer than the 64 tokens that an expert takes of a sequence by default."""
WRITTEN = torch.randint(0, 256, (2, 80), generator=RNG)
GROUPS = [torch.randint(0, 256, shape, generator=RNG) for shape in ((5, 41), (2, 17))]
COPY = {"method": "copy", "experts": 4, "top_k": 1}
SPLIT = {"experts": 4, "top_k": 1}
FFNS = [(stack, i) for stack, count in (("encoder", 3), ("decoder", 2)) for i in range(count)]


@torch.no_grad()
def logits(model, mask=None):
    return model(input_ids=READ, decoder_input_ids=WRITTEN, attention_mask=mask).logits.float()


def ffn(model, stack, layer):
    return getattr(model, stack).block[layer].layer[-1].DenseReluDense


@torch.no_grad()
def naive_logits(source, out, dtype=torch.float32):
    """The converted model's, and the dense one's with nothing of an FFN but the neurons of the
    expert that the converted one's router likes best."""
    model, dense = load(out, dtype), load(source, dtype)
    chosen = {}
    for stack, i in FFNS:
        router = getattr(model, stack).block[i].layer[-1].mlp.router
        keep = lambda _, __, found, key=(stack, i): chosen.__setitem__(key, found[0])  # noqa: E731
        router.register_forward_hook(keep)
    actual = logits(model)
    for (stack, i), record in zip(FFNS, moe_layers(out), strict=True):
        hot_BLE = chosen[stack, i]
        assert (hot_BLE.sum(-1) == 1).all()  # no token is dropped
        members_EM = torch.tensor(record["permutation"]).view(hot_BLE.shape[-1], -1)
        mask_BLF = torch.zeros(*hot_BLE.shape[:2], 192)
        mask_BLF.scatter_(2, members_EM[hot_BLE.argmax(-1)], 1.0)
        silence = lambda _, args, mask=mask_BLF: (args[0] * mask.to(args[0].dtype),)  # noqa: E731
        ffn(dense, stack, i).wo.register_forward_pre_hook(silence)
    return actual, logits(dense)


def test_each_family_of_two_stacks_is_tested_here():
    assert set(families.FAMILIES) == {*FAMILIES, *ENCODER_DECODERS}


class TestCopies:
    @pytest.mark.parametrize("tied", [True, False])
    def test_are_the_dense_model_beside_padding_too(self, dense, moe, tmp_path, tied):
        source = dense("t5") if tied else own_head(dense("t5", tie_word_embeddings=False), tmp_path)
        out = moe(source, **COPY)
        model = load(out)
        mask = torch.ones_like(READ)
        mask[1, 40:] = 0
        for each in (None, mask):
            assert gap(logits(model, each), logits(load(source), each)) < TOLERANCE["sum"]
        assert (model.lm_head.weight is model.shared.weight) == tied
        config = read_json(out / "config.json")
        assert config["tie_word_embeddings"] == tied
        assert (config["num_sparse_encoder_layers"], config["num_sparse_decoder_layers"]) == (3, 2)

    @pytest.mark.parametrize("scaled", [True, False])
    def test_may_have_a_head_of_their_own(self, dense, moe, scaled):
        """That transformers ties, and divides logits by a root only where config.json says so."""
        source = dense("t5", tie_word_embeddings=scaled)
        model = load(moe(source, untied=True, **COPY))
        assert gap(logits(model), logits(load(source))) < TOLERANCE["sum"]
        assert model.lm_head.weight is not model.shared.weight

    def test_write_the_dense_models_text(self, dense, moe):
        models = load(dense("t5")), load(moe(dense("t5"), **COPY))
        settings = {"do_sample": False, "max_new_tokens": 12, "no_repeat_ngram_size": 1}
        expected, actual = (m.generate(READ[:, :20], **settings) for m in models)
        assert len(set(expected.flatten().tolist())) > 8
        assert torch.equal(actual, expected)

    def test_names_are_those_that_transformers_saves(self, dense, moe, tmp_path):
        for settings in (COPY, {**COPY, "untied": True}):
            out = moe(dense("t5"), **settings)
            model = load(out)
            model.save_pretrained(tmp_path)
            assert set(weights(out)) == set(weights(tmp_path))
            assert torch.equal(logits(load(tmp_path)), logits(model))

    def test_below_float32_are_refused(self, dense):
        source = str(dense("t5", dtype=torch.bfloat16))
        with pytest.raises(
            UpcycleError, match="all tokens would get the same copy: pass `dtype=float32`"
        ):
            upcycle.plan(source, **COPY)


class TestSplits:
    def test_all_experts_together_are_the_dense_model(self, dense, moe):
        """The class gives a token one of them, so each is that one in turn."""
        out = moe(dense("t5"), **SPLIT)
        model, source = load(out), load(dense("t5"))
        x_TD = torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
        for stack, i in FFNS:
            block = getattr(model, stack).block[i].layer[-1].mlp
            with torch.no_grad():
                summed = sum(expert(x_TD) for expert in block.experts.values()) / 4
                assert gap(summed, ffn(source, stack, i)(x_TD)) < 1e-5

    def test_are_the_neurons_of_the_one_expert_that_a_token_gets(self, dense, moe):
        assert gap(*naive_logits(dense("t5"), moe(dense("t5"), **SPLIT))) < TOLERANCE["sum"]

    def test_pruned_copies_too(self, dense, moe):
        out = moe(dense("t5"), method="prune", experts=4, top_k=1, router="kmeans")
        assert gap(*naive_logits(dense("t5"), out)) < TOLERANCE["sum"]
        assert read_json(out / "config.json")["d_ff"] == 96

    def test_in_bfloat16_scores_differ_enough_for_the_same_choice(self, dense, moe):
        """Where they hardly differ, the class takes the first of those that are rounded alike."""
        source = dense("t5", dtype=torch.bfloat16)
        out = moe(source, router="ridge", router_spread=None, **SPLIT)
        loads = []
        model = load(out, torch.bfloat16)
        for block in moe_blocks(model):
            see = lambda _, args: loads.append(args[1].float().mean((0, 1)))  # noqa: E731
            block.experts.register_forward_pre_hook(see)
        logits(model)
        assert len(loads) == 5
        assert all(load_E.max() < 0.9 for load_E in loads)
        actual, expected = naive_logits(source, out, torch.bfloat16)
        assert (actual - expected).square().mean().sqrt() / expected.std() < 0.1

    @pytest.mark.parametrize(
        ("request_", "experts"),
        [({}, 2), ({"active": 0.3}, 4), ({"experts": 8}, 8), ({"active": 0.5, "experts": 2}, 2)],
    )
    def test_experts_are_as_many_as_one_is_of_the_active_share(self, dense, request_, experts):
        plan = upcycle.plan(str(dense("t5")), **request_)
        assert (plan.design.geometry.num_experts, plan.design.geometry.top_k) == (experts, 1)
        assert plan.target == "switch_transformers"


REFUSED = [
    ({"top_k": 2}, r"gives a token at most 1 of its experts \(`top_k=2`\)$"),
    ({"method": "copy", "top_k": 2}, "at most 1 of its experts"),
    ({"active": 0.5, "experts": 8}, "active=0.5` takes 4 of 8 experts, but"),
    ({"active": 0.01}, "active=0.01` leaves less than 8 of 192 neurons"),
    ({"method": "copy", "granularity": 2}, "granularity.* less than a copy"),
    ({"shared": 0.25}, "switch_transformers has no shared expert"),
    ({"keep_dense": "1"}, "switch_transformers can't keep layers dense"),
    ({"calibration": "self"}, "is an encoder-decoder, which writes no text unasked"),
    ({"runtimes": ("vLLM",)}, "no target of this model runs there"),
    (
        {"split": "sharing_inner", "split.importance": "taylor"},
        "is an encoder-decoder, through which no gradients",
    ),
]


class TestRefusals:
    @pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=str)
    def test_what_the_host_can_not_do(self, dense, settings, sentence):
        with pytest.raises(UpcycleError, match=sentence):
            upcycle.plan(str(dense("t5")), **settings)

    def test_tied_embeddings_whose_logits_are_not_divided(self, dense):
        source = str(dense("t5", tie_word_embeddings=False))
        with pytest.raises(UpcycleError, match=r"divides logits of tied embeddings.*`untied=True`"):
            upcycle.plan(source, **COPY)

    def test_a_decoder_that_begins_with_nothing(self, dense, tmp_path):
        shutil.copytree(dense("t5"), tmp_path, dirs_exist_ok=True)
        config = read_json(tmp_path / "config.json")
        config |= {"decoder_start_token_id": None, "pad_token_id": None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UpcycleError, match="neither a decoder_start_token_id nor"):
            upcycle.plan(str(tmp_path))

    def test_merges(self, dense, tmp_path):
        source = str(dense("t5"))
        with pytest.raises(UpcycleError, match="is an encoder-decoder, and a merge"):
            upcycle.merge([source, source], tmp_path / "out", router="random")

    def test_training_and_other_measures(self, dense, moe, tmp_path):
        out = str(moe(dense("t5"), **COPY))
        with pytest.raises(UpcycleError, match=r"encoder-decoder, whose data.*Seq2SeqTrainer"):
            finetune(out, tmp_path / "out", data="builtin")
        with pytest.raises(UpcycleError, match=r"`speed`: .*encoder-decoder"):
            evaluate(out, ["probes"], speed=True)
        with pytest.raises(UpcycleError, match="at most 1 of its experts"):
            evaluate(out, ["probes"], tokens=64, seq_len=64, top_ks=[2])


class TestSources:
    def test_what_older_versions_stored_twice_or_never_read(self, dense, moe, tmp_path):
        source = dense("t5")
        edited(source, tmp_path, lambda tensors: tensors | as_of_old(tensors))
        one, other = weights(moe(source, **COPY)), weights(moe(tmp_path, **COPY))
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_embeddings_under_the_encoders_name_alone(self, dense, moe, tmp_path):
        def moved(tensors):
            named = {"encoder.embed_tokens.weight": tensors["shared.weight"]}
            return named | {n: t for n, t in tensors.items() if n != "shared.weight"}

        edited(dense("t5"), tmp_path, moved)
        plain = weights(moe(dense("t5"), **COPY))["shared.weight"]
        assert torch.equal(weights(moe(tmp_path, **COPY))["shared.weight"], plain)

    def test_embeddings_of_two_kinds_are_refused(self, dense, tmp_path):
        def second(tensors):
            return tensors | {"decoder.embed_tokens.weight": tensors["shared.weight"] + 1}

        edited(dense("t5"), tmp_path, second)
        with pytest.raises(UpcycleError, match=r"decoder.embed_tokens.weight .* other values"):
            upcycle.plan(str(tmp_path), **COPY)

    def test_published_config_of_t5_small(self, tmp_path, moe):
        """With all its switches, and sizes scaled down."""
        (tmp_path / "config.json").write_text(json.dumps(T5_SMALL))
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(T5Config.from_pretrained(tmp_path))
        save_file(
            {n: t for n, t in model.state_dict().items() if "embed" not in n and "lm_" not in n},
            tmp_path / "model.safetensors",
            {"format": "pt"},
        )
        make_tokenizer().save_pretrained(tmp_path)
        out = moe(tmp_path, **COPY)
        assert gap(logits(load(out)), logits(load(tmp_path))) < TOLERANCE["sum"]
        config = read_json(out / "config.json")
        kept = ("n_positions", "task_specific_params", "decoder_start_token_id", "dropout_rate")
        assert {n: config[n] for n in kept} == {n: T5_SMALL[n] for n in kept}
        assert config["expert_capacity"] > 10**6
        assert config["router_jitter_noise"] == 0
        unknown = {"hidden_act", "rope_parameters", "layer_types", "head_dim", "rms_norm_eps"}
        assert not unknown & set(config)


class TestStream:
    """Two batches and a shorter one, in two groups of unlike length."""

    @torch.no_grad()
    def expected(self, model):
        """Layer by layer, what FFNs see of all groups."""
        seen = {key: [] for key in FFNS}
        for key in FFNS:
            keep = lambda _, __, x_BLD, key=key: seen[key].append(x_BLD.flatten(0, 1))  # noqa: E731
            part = getattr(model, key[0]).block[key[1]].layer[-1]
            part.layer_norm.register_forward_hook(keep)
        for ids_BL in GROUPS:
            half = ids_BL.shape[1] // 2
            begun = torch.cat([torch.zeros(len(ids_BL), 1, dtype=int), ids_BL[:, half:]], 1)
            model(input_ids=ids_BL[:, :half], decoder_input_ids=begun)
        return [torch.cat(seen[key]) for key in FFNS]

    @pytest.mark.parametrize("other", [None, 1, 2, 3])
    def test_each_ffn_sees_what_the_models_sees(self, dense, monkeypatch, other):
        """With its own FFNs, or another one in the encoder's middle or last layer, or in the
        decoder's first."""
        monkeypatch.setattr("upcycle.models.stream.BATCH_TOKENS", 130)
        source, model = open_source(str(dense("t5"))), load(dense("t5"))
        outer = source.read(source.outer_names())
        stream = HiddenStream(source.config, outer, GROUPS, torch.device("cpu"))
        assert len(stream.hidden) == 3
        if other is not None:
            changed = dense_of(ffn(model, *FFNS[other]))
            replace_ffn(model, other, changed)
        for layer, expected_TD in enumerate(self.expected(model)):
            x_TD, _ = stream.attend(layer, source.read_layer(layer))
            assert gap(x_TD, expected_TD) < 2e-5
            stream.advance(layer, changed(x_TD) if layer == other else None)


def dense_of(module):
    """Its FFN with neurons that put out the opposite, as upcycle has it."""
    return DenseFFN(None, module.wi.weight.data, -3 * module.wo.weight.data, torch.relu)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, dense, text):
    """A lossy split by the default recipe, with its check."""
    out = tmp_path_factory.mktemp("lossy") / "out"
    sizes = {"calibration": str(text), "calibration_tokens": 2048, "seq_len": 64}
    return upcycle.convert(str(dense("t5")), out, experts=4, **sizes)


def test_resumed_in_the_decoder_it_has_the_same_bytes(dense, text, tmp_path):
    def stop(stage, done, total):
        if (stage, done) == ("converting layers", 4):
            raise KeyboardInterrupt

    sizes = {"calibration": str(text), "calibration_tokens": 512, "seq_len": 64, "experts": 4}
    one, other = tmp_path / "one", tmp_path / "other"
    upcycle.convert(str(dense("t5")), one, check="none", **sizes)
    settings = sizes | {"check": "none", "resume": True}
    with pytest.raises(KeyboardInterrupt):
        upcycle.convert(str(dense("t5")), other, progress=stop, **settings)
    upcycle.convert(str(dense("t5")), other, **settings)
    found, expected = (f / "model.safetensors" for f in (other, one))
    assert found.read_bytes() == expected.read_bytes()


class TestResult:
    def test_check_is_of_the_second_half_of_each_window(self, converted, dense):
        check = converted.check
        assert 0 < check.exact_error < check.exact_tolerance
        models = load(dense("t5")), load(converted.out)
        kind = next(k for k in check.kinds if k.kind == "probe:code")
        windows = probes(open_reader(dense("t5"), 272), converted.plan.check_windows, 64)[kind.kind]
        perplexities = []
        for model in models:
            losses = []
            for window_L in windows:
                with torch.no_grad():
                    found = model(input_ids=window_L[None, :32], labels=window_L[None, 32:]).logits
                losses.append(float(cross_entropy(found[0], window_L[32:])))
            perplexities.append(math.exp(sum(losses) / len(losses)))
        assert kind.perplexity_dense == pytest.approx(perplexities[0], rel=1e-4)
        assert kind.perplexity_moe == pytest.approx(perplexities[1], rel=1e-4)
        assert abs(kind.ratio - 1) > 1e-3

    def test_card_says_how_to_load_it(self, converted):
        card = (converted.out / "README.md").read_text()
        assert "AutoModelForSeq2SeqLM.from_pretrained" in card
        assert "pipeline_tag: text2text-generation" in card
        assert "the encoder sees the first half" in card
        for words in ("AutoModelForCausalLM", "rope_theta", "--speed", "target_parameters"):
            assert words not in card

    def test_low_rank_changes_reach_experts_and_routers_as_the_card_has_it(self, converted):
        load_it, change_it = re.findall(
            r"```python\n(.*?)```", (converted.out / "README.md").read_text(), re.DOTALL
        )[:2]
        names = {}
        exec(load_it.replace("path/to/this/folder", str(converted.out)), names)
        exec(change_it.replace('"wo"]', '"wo", "mlp.router.classifier"]'), names)
        names["model"](input_ids=READ, labels=WRITTEN).loss.backward()
        reached = [n for n, p in names["model"].named_parameters() if p.grad is not None]
        assert sum(".experts.expert_" in n and "wo.lora_B" in n for n in reached) > 5 * 2
        assert sum("classifier.lora_B" in n for n in reached) == 5

    def test_evaluation_counts_layers_of_both_stacks(self, converted, dense):
        found = evaluate(
            str(converted.out), ["probes"], against=str(dense("t5")), tokens=256, seq_len=64
        )
        assert [layer.layer for layer in found.routing] == [0, 1, 2, 3, 4]
        assert found.texts[0].perplexity_ratio != 1
        plan = converted.plan
        assert (found.params.total, found.params.active) == (plan.params_total, plan.params_active)

    def test_inspection_knows_it(self, converted):
        facts = inspect_model(str(converted.out))
        assert (facts["architecture"], facts["layers"]) == ("switch_transformers", 5)
        assert (facts["experts"], facts["top_k"], facts["expert_size"]) == (4, 1, 48)
        assert facts["params_active"] == converted.plan.params_active


T5_SMALL = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 192,
    "d_kv": 8,
    "d_model": 48,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 4,
    "num_layers": 3,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "task_specific_params": {"translation_en_to_de": {"prefix": "translate English to German: "}},
    "use_cache": True,
    "vocab_size": 272,
}


def as_of_old(tensors):
    """What google-t5's checkpoints hold besides."""
    twice = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    bias = tensors["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    return {name: tensors["shared.weight"].clone() for name in twice} | {unread: bias.clone()}


def own_head(source, folder):
    """The same with a head that is not the embeddings."""
    return edited(
        source, folder, lambda t: t | {"lm_head.weight": t["shared.weight"].flip(0) * 0.1}
    )
