"""Files of mergekit-moe: what runs, with which rows; what is refused, in which words."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import dense_logits, gap, load, logits, read_json, weights
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoTokenizer

import upcycle
from upcycle import UpcycleError
from upcycle.conversion.merging.mergekit_file import read_file
from upcycle.conversion.merging.planning import plan_merge
from upcycle.conversion.merging.preflight import merge_request

LAYERS = 3
HEAD = "base_model: base\n"
TWO = """experts:
  - source_model: m1
    positive_prompts: ["rain", "a cold wind"]
  - source_model: m2
    positive_prompts: ["bread"]
"""
BARE = "experts:\n  - source_model: m1\n  - source_model: m2\n"


@pytest.fixture
def written(shelf, tmp_path, monkeypatch):
    """Writes a file; models are named as they lie in the shelf."""
    monkeypatch.chdir(shelf)

    def write(content: str) -> Path:
        path = tmp_path / "moe.yml"
        path.write_text(content)
        return path

    return write


def made(path, **settings):
    """The plan of a file."""
    request = merge_request([path], settings)
    return plan_merge(request, settings)


def merged(path, out, **settings):
    upcycle.merge(path, out, **{"check": "none"} | settings)
    return weights(out)


def router(tensors, layer):
    names = (f"model.layers.{layer}.block_sparse_moe.gate", f"model.layers.{layer}.mlp.gate")
    (found,) = (tensors[f"{n}.weight"] for n in names if f"{n}.weight" in tensors)
    return found


def refusal(path, **settings) -> str:
    with pytest.raises(UpcycleError) as caught:
        made(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- rows ------------------------------------------------------------------------------------


@functools.cache
def reader(model):
    return AutoTokenizer.from_pretrained(model), load(model)


@torch.no_grad()
def states(model, prompt):
    """What enters every layer [LAYERS, L, D], and the embeddings [L, D], by plain transformers."""
    tokenizer, reads = reader(model)
    ids = tokenizer("<s>" + prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    found = reads(ids, output_hidden_states=True).hidden_states
    return torch.stack(found[:LAYERS])[:, 0], found[0][0]


def hidden_rows(model, prompts, negatives=(), pick=lambda entering_lLD: entering_lLD[:, -1]):
    """Unit rows of one expert, [LAYERS, D]."""

    def mean(texts):
        return torch.stack([pick(states(model, text)[0]) for text in texts]).mean(0)

    return normalize(mean(prompts) - (mean(negatives) if negatives else 0), dim=1)


def same_rows(tensors, expert, rows_lD):
    found = torch.stack([router(tensors, layer)[expert] for layer in range(LAYERS)]).float()
    assert cosine_similarity(found, rows_lD, dim=1).min() > 0.999
    assert found.norm(dim=1).sub(1).abs().max() < 1e-2


PROMPTS = """
experts:
  - source_model: m1
    positive_prompts: &rain
      - "rain"
      - 'a "cold" wind, isn''t it'
      - "größer 天"
    negative_prompts: &bread ["bread", "flour\\nand water"]
  - source_model: ./m2/
    positive_prompts: *bread
    negative_prompts: *rain
  - source_model: m3
    positive_prompts: |
      def area(r):
          return 3 * r
dtype: float32 # of the output
"""
RAIN = ["rain", 'a "cold" wind, isn\'t it', "größer 天"]
BREAD = ["bread", "flour\nand water"]
AREA = ["def area(r):\n    return 3 * r\n"]


@pytest.mark.parametrize("mode", ["", "gate_mode: hidden\n", "gate_mode: hidden_last\n"])
def test_hidden_rows_are_the_last_tokens_states(written, shelf, tmp_path, mode):
    out = merged(written(HEAD + mode + PROMPTS), tmp_path / "out")
    base = shelf / "base"
    same_rows(out, 0, hidden_rows(base, RAIN, BREAD))
    same_rows(out, 1, -hidden_rows(base, RAIN, BREAD))
    same_rows(out, 2, hidden_rows(base, AREA))


def test_hidden_avg_rows_are_means_over_a_prompts_own_tokens(written, shelf, tmp_path):
    path = written(HEAD + "gate_mode: hidden_avg\n" + PROMPTS)
    mean = hidden_rows(shelf / "base", RAIN, BREAD, lambda entering_lLD: entering_lLD.mean(1))
    same_rows(merged(path, tmp_path / "out"), 0, mean)
    assert any("mergekit averages padding" in note for note in made(path).warnings)


def test_cheap_embed_rows_are_summed_embeddings_in_every_layer(written, shelf, tmp_path):
    out = merged(written(HEAD + "gate_mode: cheap_embed\n" + PROMPTS), tmp_path / "out")

    def direction(prompts):
        return normalize(sum(states(shelf / "base", text)[1].sum(0) for text in prompts), dim=0)

    same_rows(out, 0, normalize(direction(RAIN) - direction(BREAD), dim=0).expand(LAYERS, -1))
    same_rows(out, 2, direction(AREA).expand(LAYERS, -1))


def test_a_base_that_is_an_expert_too_gives_the_states(written, shelf, tmp_path):
    out = merged(written("base_model: m1\ndtype: bfloat16\n" + TWO), tmp_path / "out")
    same_rows(out, 0, hidden_rows(shelf / "m1", ["rain", "a cold wind"]))
    assert all(tensor.dtype == torch.bfloat16 for tensor in out.values())


SHARED = """base_model: base
architecture: qwen
dtype: float32
shared_experts:
  - source_model: base
    positive_prompts: ["the"]
    residual_scale: 0.1
"""


def test_a_shared_expert_with_prompts_has_their_row_for_its_gate(written, shelf, tmp_path):
    out = merged(written(SHARED + TWO), tmp_path / "out")
    gate = torch.cat([out[f"model.layers.{i}.mlp.shared_expert_gate.weight"] for i in range(3)])
    assert cosine_similarity(gate, hidden_rows(shelf / "base", ["the"]), dim=1).min() > 0.999
    down = out["model.layers.1.mlp.shared_expert.down_proj.weight"]
    source = weights(shelf / "base")["model.layers.1.mlp.down_proj.weight"]
    assert torch.allclose(down, source * 0.1, atol=1e-7)
    assert router(out, 0).shape == (2, 48)
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["model_type"], config["norm_topk_prob"]) == ("qwen2_moe", True)


def test_a_shared_expert_without_prompts_counts_its_scale(written, shelf, tmp_path):
    shared = "shared_experts:\n- source_model: m3\n  residual_scale: 0.25\n"
    path = written(HEAD + "gate_mode: random\ndtype: float32\n" + BARE + shared)
    out = merged(path, tmp_path / "out")
    assert out["model.layers.0.mlp.shared_expert_gate.weight"].abs().max() < 1e-6
    source = weights(shelf / "m3")["model.layers.0.mlp.down_proj.weight"]
    assert torch.allclose(out["model.layers.0.mlp.shared_expert.down_proj.weight"], source * 0.5)


# --- the experts -----------------------------------------------------------------------------


def test_one_model_eight_times_at_random_computes_it(written, shelf, tmp_path):
    lines = "  - source_model: base\n" * 8
    path = written(f"{HEAD}gate_mode: random\nexperts:\n{lines}# training follows\n")
    assert merged(path, tmp_path / "out")
    assert gap(logits(load(tmp_path / "out")), dense_logits(shelf / "base")) < 2e-5
    assert any("all 8 experts are equal" in note for note in made(path).warnings)


def test_scales_and_numbers_in_quotes(written, shelf, tmp_path):
    path = written(
        'base_model: "base"\narchitecture: "Mixtral"\nexperts_per_token: "2"\n'
        "dtype: torch.float32\n"
        "gate_mode: uniform_random\nexperts:\n"
        '- {source_model: m1, residual_scale: "0.5", noise_scale: 0.0, negative_prompts: []}\n'
        "- {source_model: m2, noise_scale: 0.01, positive_prompts: null}\n"
        "- {source_model: m3, residual_scale: 1.0}"
    )
    out = merged(path, tmp_path / "out")
    sources = [weights(shelf / f"m{i}") for i in (1, 2, 3)]
    for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        found = [
            out[f"model.layers.2.block_sparse_moe.experts.{e}.{ours}.weight"] for e in range(3)
        ]
        source = [tensors[f"model.layers.2.mlp.{theirs}.weight"] for tensors in sources]
        assert torch.equal(found[0], source[0] * (0.5 if ours == "w2" else 1))
        assert (found[1] - source[1]).std() == pytest.approx(0.01, rel=0.05)
        assert torch.equal(found[2], source[2])


def test_adapters_revisions_and_mappings_name_models(written, shelf, tmp_path):
    path = written(
        """base_model:
  model: {path: base, revision: null}
dtype: null
experts:
  - source_model: base+lora1
    positive_prompts: ["violin"]
  - source_model: {model: {path: m1, revision: v2}}
    positive_prompts: ["football"]
  - source_model:
      model: base
      lora: {path: lora1}
    positive_prompts: piano
"""
    )
    plan = made(path)
    assert [str(expert.model) for expert in plan.design.merge.experts] == [
        "base+lora1", "m1@v2", "base+lora1"
    ]  # fmt: skip
    for said in ("q_proj is unused", "experts 0 and 2 are one model", "revision v2 has no effect"):
        assert any(said in note for note in plan.warnings), said
    out = merged(path, tmp_path / "out")
    name = "model.layers.1.block_sparse_moe.experts.{}.w3.weight"
    up = weights(shelf / "base")["model.layers.1.mlp.up_proj.weight"]
    lora = weights(shelf / "lora1")
    prefix = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    change = 2 * lora[prefix.format("B")] @ lora[prefix.format("A")]
    assert torch.allclose(out[name.format(0)], up + change, atol=1e-6)
    assert torch.equal(out[name.format(0)], out[name.format(2)])


@pytest.mark.parametrize(
    ("top_k", "experts", "expected"),
    [("", TWO, 2), ("experts_per_token: 1\n", TWO, 1), ("", "experts: [{source_model: m1}]\n", 1)],
)
def test_experts_per_token(written, top_k, experts, expected):
    plan = made(written(HEAD + "gate_mode: random\n" + top_k + experts))
    assert plan.design.geometry.top_k == expected
    assert plan.target == "mixtral"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bf16", "bfloat16"), ("half", "float16"), ("torch.float16", "float16"), ("null", "float32")],
)
def test_dtypes_have_several_names(written, dtype, expected):
    assert str(made(written(f"{HEAD}dtype: {dtype}\n{TWO}")).design.dtype) == f"torch.{expected}"


@pytest.mark.parametrize(
    ("name", "target"),
    [("mixtral", "mixtral"), ("Qwen", "qwen2_moe"), ("qwen2", "qwen2_moe"), ("mix", "mixtral")],
)
def test_architectures_may_be_begun(written, name, target):
    assert made(written(f"{HEAD}architecture: {name}\n{TWO}")).target == target


def test_settings_that_are_given_replace_the_files(written):
    plan = made(written(HEAD + BARE), router="random", top_k=1, dtype="float16")
    assert (plan.design.geometry.top_k, str(plan.design.dtype)) == (1, "torch.float16")
    assert plan.recipe.router.name == "random"


def test_texts_may_stand_for_a_files_prompts(written, text):
    texts = {"m1": str(text), "m2": str(text)}
    request = merge_request([written(HEAD + BARE)], {}, texts=texts)
    plan = plan_merge(request, {})
    assert plan.design.methods.gate.name == "text"
    assert [expert.text for expert in plan.design.merge.experts] == [str(text)] * 2


def test_fields_of_dense_merges_have_no_effect(written):
    path = written(
        HEAD
        + "merge_method: moe\ntokenizer_source: union\nparameters: {density: 0.3}\n"
        + TWO.replace("- source_model: m1", "- name: first\n    source_model: m1")
    )
    (note,) = (note for note in made(path).warnings if "no effect" in note)
    assert note.startswith("merge_method, name, parameters, tokenizer_source have no effect")


def test_a_document_in_a_script_may_be_indented(written):
    indented = "".join(f"    {line}\n" for line in (HEAD + TWO).splitlines())
    assert made(written("\n" + indented + "    ")).design.geometry.num_experts == 2


# --- what is refused -------------------------------------------------------------------------

SAME = TWO.replace('["rain", "a cold wind"]', '[""]').replace('["bread"]', '[""]')
REFUSED = [
    ("gateway_mode: random\n" + TWO, "unknown field gateway_mode, did you mean gate_mode?"),
    ("num_experts_per_tok: 1\n" + TWO, "did you mean experts_per_token?"),
    (TWO.replace("source_model: m2", "model: m2"), "expert 1 has an unknown field model"),
    ("gate_mode: Hidden\n" + TWO, "'Hidden' is unknown, did you mean hidden?"),
    ("gate_mode: hiden_avg\n" + TWO, "did you mean hidden_avg?"),
    ("dtype: int8\n" + TWO, "dtype 'int8' is unknown; known: auto, float32"),
    ("dtype: bf16\ndtype: bf16\n" + TWO, "gives dtype twice, in lines 2 and 3"),
    (TWO + "    noise_scale: .1\n    noise_scale: .2\n", "gives noise_scale twice, in lines 7 and"),
    ("experts_per_token: 3\n" + TWO, "experts_per_token is 3, but there are 2 experts"),
    ("experts_per_token: true\n" + TWO, "experts_per_token=True: give a number"),
    (SAME, "all 2 experts have the same prompts"),
    (
        BARE,
        "expert 0 (m1) has no prompts, nor has expert 1 (m2), and router hidden needs them: add",
    ),
    (BARE, "positive_prompts in a mergekit-moe file, or `router=random`"),
    (TWO.replace('["bread"]', "[]"), "expert 1 (m2) has no prompts, and router hidden"),
    (TWO.replace('"bread"', "yes"), "item 0 is a truth value to YAML, True, and no text: put it"),
    (TWO.replace('"bread"', "salt, 42"), "item 1 is a number to YAML, 42"),
    (TWO.replace('"bread"', "a: b"), "item 0 is a mapping to YAML, {'a': 'b'}"),
    (TWO + "    residual_scale: .nan\n", "residual_scale"),
    ("experts: []\n", "has no experts"),
    ("experts: m1\n", "experts is no list"),
    ("experts: [m1]\n", "expert 0 is 'm1', no mapping"),
    ("experts:\n- positive_prompts: [a]\n", "experts.0.source_model is missing"),
    ("models: [{model: m1}]\nmerge_method: dare_ties\n", "into a dense one (dare_ties)"),
    ("architecture: deepseek\n" + TWO, "(reachable: glm4_moe, granitemoeshared, mixtral"),
    ("architecture: qwen3\n" + TWO, "qwen3_moe always has a norm per head"),
    (SHARED.split("\n", 1)[1].replace("qwen", "mixtral") + TWO, "mixtral has no shared expert"),
    (SHARED.split("\n", 1)[1].replace("qwen", "granitemoeshared") + TWO, "no gate for its shared"),
    ("shared_experts:\n- source_model: m1\n- source_model: m2\n" + TWO, "has 2 shared_experts"),
    (TWO.replace("m2", "base@main+"), "names no model"),
    (TWO.replace("m2", "./none"), "./none does not exist"),
    (TWO.replace("source_model: m2", "source_model: {model: m2, lorra: x}"), "has no 'lorra'"),
]


@pytest.mark.parametrize(("content", "said"), REFUSED)
def test_what_would_be_silently_wrong_or_crash_is_refused(written, content, said):
    assert said in refusal(written(HEAD + content))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (HEAD + "experts:\n\t- source_model: m1\n", "line 3 starts with a tab; YAML takes spaces"),
        ("```yaml\n" + HEAD + TWO + "```\n", "line 1 is a fence of Markdown"),
        (HEAD + TWO.replace('"bread"', "@home"), "line 6, column 24"),
        (HEAD + TWO.replace('["bread"]', "*loaf"), "undefined alias"),
        (HEAD + TWO + "---\n" + HEAD, "begins a second document"),
        ("", "is empty"),
        ("- a\n", "is no mapping"),
        (TWO, "base_model is missing"),
        (HEAD + "experts: &a [*a]\n", "nested more than 64 deep"),
    ],
)
def test_what_is_no_such_file_is_refused_with_its_place(written, content, said):
    assert said in refusal(written(content))


def test_a_few_aliases_do_not_make_a_huge_file(written):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "holds more than 100,000 values" in refusal(written("\n".join(lines) + "\n" + HEAD))


def test_other_spellings_of_merge_commands_are_refused(written):
    path = written(HEAD + TWO)
    with pytest.raises(UpcycleError, match="name it alone"):
        merge_request([path, "m1"], {})
    with pytest.raises(UpcycleError, match="names the base and the shared experts"):
        merge_request([path], {}, base="m1")


def test_a_file_is_read_without_torch(written):
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from upcycle.conversion.merging.preflight import merge_request\n"
        "merge_request([sys.argv[1]], {})\n"
        "sys.exit(str({'torch', 'transformers', 'numpy'} & sys.modules.keys() or ''))"
    )
    command = [sys.executable, "-c", program, str(written(HEAD + TWO))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.strip() == ""
    assert not re.search("torch", done.stderr)


def test_two_equal_prompts_among_three_are_noted(written):
    third = '  - source_model: m3\n    positive_prompts: ["bread"]\n'
    assert any(
        "experts 1 and 2 have the same prompts" in note
        for note in made(written(HEAD + TWO + third)).warnings
    )
    assert read_file(written(HEAD + TWO)).notes == ()
