"""The report page: what it says, that it stands alone, and that a browser shows it."""

import base64
import copy
import html
import json
import math
import random
import re
import shutil
import subprocess
import zlib
from dataclasses import asdict

import pytest
import records
import torch
from pydantic import TypeAdapter
from typer.testing import CliRunner

import upcycle.evaluation.page
from upcycle import UpcycleError
from upcycle.cli import app
from upcycle.evaluation.measured import Evaluation, evaluation_summary
from upcycle.evaluation.page import charts, facts, merging
from upcycle.evaluation.page.quality import overall
from upcycle.evaluation.page.routing import pairs, related, together
from upcycle.evaluation.page.words import digits, public_name
from upcycle.evaluation.routing import count_pairs, independent_pairs, layer_routing, pair_counts
from upcycle.evaluation.sample import Sample
from upcycle.models.record.file import Made, read_record
from upcycle.models.record.merging import GatePart
from upcycle.models.train_log import LogLine

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
EVIL = "<script>alert('x')</script>"
SECTIONS = {"texts", "samples", "layers", "damage", "similarity", "load", "pairs", "training"}
SECTIONS |= {"made", "next"}


# --- facts -----------------------------------------------------------------------------------


def routing(layers, experts, top_k, tokens=4096):
    """Random routing in which the later experts are the more popular, and a token's are mostly of
    even or mostly of odd number."""
    rng = torch.Generator().manual_seed(0)
    names, found = torch.arange(experts), []
    for layer in range(layers):
        parity = torch.randint(2, (tokens, 1), generator=rng)
        liked = torch.where(names % 2 == parity, 1.0, 0.1)
        chosen = torch.multinomial(liked * (experts + names), top_k, generator=rng)
        found.append(vars(layer_routing(layer, count_pairs(chosen, experts), tokens)))
    return found


def evaluation(layers=3, experts=8, top_k=2, against=True):
    numbers = {"perplexity_against": 10.0, "perplexity_ratio": 1.2, "kl": 0.2}
    numbers |= {"top1_agreement": 0.8, "worst_window_ratio": 1.4}
    absent = dict.fromkeys(numbers)
    dense = 1000 if against else None
    return {
        "model": "org/moe",
        "against": "org/dense" if against else None,
        "window": 512,
        "tokens": 4096,
        "texts": [
            {"text": "builtin", "perplexity": 12.0, "fitted": True}
            | (numbers if against else absent)
        ],
        "routing": routing(layers, experts, top_k) if experts else [],
        "similarity": [{"layer": n, "cosine": 0.4 + 0.2 * n / layers} for n in range(layers)]
        if experts
        else [],
        "params": {"total": 1000, "active": 600 if experts else 1000}
        | {"total_against": dense, "active_against": dense},
        "flops": {"active": 1200, "total": 2000, "active_against": dense and 2 * dense},
        "speed": None,
        "tasks": None,
    }


MADE = {
    "out": "moe",
    "source": {"name": "org/dense", "revision": "abc123"},
    "plan": records.plan(),
    "check": {
        "exact_error": 1e-4,
        "exact_tolerance": 1e-3,
        "kinds": [
            {"kind": "probe:web", "tokens": 1024, "ratio": 14 / 11, "worst_window": 1.5}
            | {"perplexity_dense": 11.0, "perplexity_moe": 14.0}
            | {"kl": 0.25, "top1_agreement": 0.75}
        ],
        "left_out": ["self"],
        "window": 512,
        "load": [[1.0] * 8] * 2,
    },
    "seconds": {"conversion": 83.4},
    "peak_memory": 1_800_000_000,
    "dense_layers": {"layers": [0], "damage": [0.05, 0.01, 0.02], "trials": []},
    "training": [records.training_run("/home/me/more.txt")],
    "versions": {"upcycle": "0.1.0"},
}
LOG = [
    {"step": 0, "validation": {"loss": 2.5, "perplexity": 12.2, "kl": 0.3}},
    *({"step": n, "loss": 3 / n, "imbalance": 2.0 / n, "tokens_per_second": 10.0} for n in (1, 2)),
    {"step": 2, "validation": {"loss": 2.3, "perplexity": 10.0, "kl": 0.1}},
]


def all_facts(**evaluated):
    """Of a model for which every section is shown."""
    return {
        "model": "org/moe",
        "inspection": {"kind": "moe", "architecture": "mixtral"}
        | {"experts": 8, "top_k": evaluated.get("top_k", 2), "expert_size": 24},
        "made": copy.deepcopy(MADE),
        "log": copy.deepcopy(LOG),
        "evaluation": evaluation(**evaluated),
        "samples": [{"prompt": "Two and two", "text": "are five.", "against": "are four."}],
    }


def dense_facts():
    found = all_facts(experts=0, against=False)
    inspection = {"kind": "dense", "architecture": "llama"}
    return found | {"inspection": inspection, "made": None, "log": [], "samples": []}


def render(found):
    """The page of facts that are plain values."""
    made = found["made"] and Made.model_validate(found["made"])
    shown = facts.Facts(
        found["model"],
        facts.Inspection(**found["inspection"]),
        made,
        [LogLine(**line) for line in found["log"]],
        **{key: value for key, value in found.items() if key == "loader"},
    )
    samples = [Sample(**values) for values in found["samples"]]
    return upcycle.evaluation.page.render(
        shown, facts.Measured(evaluated(found["evaluation"]), samples)
    )


def evaluated(values):
    return TypeAdapter(Evaluation).validate_python(values)


def ids(page):
    return set(re.findall(r'<(?:section|div) id="(\w+)"', page))


def words(page):
    """What one reads, without markup."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


# --- a merge ---------------------------------------------------------------------------------


def test_what_a_merge_is_made_of():
    found = all_facts()
    found["made"]["findings"] = records.findings()
    page = render(found)
    assert {"merge", "distances", "beside", "gates"} < ids(page)
    shown = words(page)
    assert "org/coder 3 % 1.2 %" in shown
    assert "Nearest to each other are org/coder and writer" in shown
    assert "Writer is far away." in shown
    assert "code.txt notes.txt mixed this merge 3.25 11.5 6.12" in shown
    assert "mean of the sources 3.50 12.0 inf" in shown
    assert "those of layer 1 cancel out" in shown


def test_an_infinite_condition_number_is_a_full_column_and_marked():
    gates = [GatePart(**gate) for gate in records.findings()["gates"]]
    chart = merging.gates(gates)["chart"]
    assert [(c.value, c.height, c.marked) for c in chart.columns] == [
        (1.5, 37.5, False),
        (math.inf, 100.0, True),
        (4.0, 100.0, False),
    ]
    assert chart.peak.name == 1
    assert merging.gates(gates[:1])["chart"].peak.value == 1.5
    assert merging.gates(gates[1:2]) is None


def test_a_merge_without_texts_or_distances_shows_its_gates_alone():
    found = all_facts()
    found["made"]["findings"] = records.findings(distances=None, perplexities=None, notes=[])
    assert ids(render(found)) & {"merge", "distances", "beside", "gates"} == {"merge", "gates"}


# --- what it says ----------------------------------------------------------------------------


def test_everything_is_shown():
    page = render(all_facts())
    assert ids(page) == SECTIONS
    text = words(page)
    assert "Perplexity is 1.200 × the dense model's, so train it further before use" in text
    assert "60 % of its 1 k parameters work on each token" in text
    assert "10.0 → 12.0" in text
    assert "builtin (the model was fitted on it)" in text
    assert "web, built in, by the conversion's check × 1.273" in text
    assert "layer 0 stayed dense" in text
    assert "a shared one of 40 neurons, 2 of 8 chosen by the router; 24 neurons each" in text
    assert (
        "2 of 8 per token, 24 neurons each, and 40 always on; 37.5 % of the dense model's" in text
    )
    assert "Split by coactivation Shared by energy" in text
    assert "org/dense at abc123" in text
    assert "vLLM: ok; MLX: every layer must have experts" in text
    assert "512 tokens of notes.txt+builtin" in text
    assert (
        "preset heal: 409,600 tokens of more.txt in 2 min 5 s, the state after step 180 of 200"
        in text
    )
    assert 'href="https://arxiv.org/abs/2110.01786"' in page
    assert "/home/me" not in page


def test_dense_model_shows_its_perplexity_only():
    page = render(dense_facts())
    assert ids(page) == set()
    assert "On 4,096 tokens of builtin (the model was fitted on it), in windows of 512." in words(
        page
    )
    assert "every parameter works on every token" in words(page)
    assert "None" not in words(page)


def test_moe_that_upcycle_did_not_make():
    page = render(all_facts() | {"made": None, "log": []})
    assert ids(page) == SECTIONS - {"damage", "made", "training", "texts"}
    assert "a shared one" not in words(page)


def test_without_a_dense_model_nothing_is_compared():
    found = all_facts(against=False) | {"made": None}
    assert "dense model's" not in words(render(found))
    assert "None" not in words(render(found))


def test_damage_that_was_not_measured_is_left_out():
    found = all_facts()
    found["made"]["dense_layers"] = None
    assert ids(render(found)) == SECTIONS - {"damage"}


def test_alarms_of_the_training_are_on_the_page():
    found = all_facts()
    assert "Alarm" not in words(render(found))
    alarm = {"step": 2, "about": "gradient norm", "says": "the norm was <9>: lower `lr`"}
    found["log"][-1]["alarms"] = [alarm]
    assert "Alarm after step 2: the norm was <9>: lower --lr." in words(render(found))


def test_pictures_that_would_say_nothing_are_left_out():
    found = all_facts(layers=1)
    found["made"]["dense_layers"]["damage"] = [0.1]
    found["made"]["check"] = None
    found["log"] = [dict(line, imbalance=1.0) for line in LOG[1:3]]
    page = render(found)
    assert ids(page) == SECTIONS - {"layers", "damage", "similarity", "texts"}
    assert "Training loss" in words(page)
    assert "Busiest expert" not in words(page)
    found["evaluation"]["routing"][0]["load"] = [1.0] * 8
    found["log"], found["samples"] = found["log"][:1], []
    assert ids(render(found)) == {"pairs", "made", "next"}
    assert "<h2></h2>" not in page


@pytest.mark.parametrize(
    ("cosines", "sentence"),
    [
        ([0.01, 0.0, 0.02], "have a mean cosine of 0.01, as of different neurons."),
        ([0.97, 1.0, 1.0], "have a mean cosine of 0.99, as of copies."),
        ([0.5, 0.5, 0.5], "have a mean cosine of 0.50."),
    ],
)
def test_likeness_that_is_the_same_everywhere_is_a_sentence(cosines, sentence):
    found = all_facts()
    found["evaluation"]["similarity"] = [
        {"layer": n, "cosine": cosine} for n, cosine in enumerate(cosines)
    ]
    page = render(found)
    assert ids(page) == SECTIONS - {"similarity"}
    assert sentence in words(page)
    assert "mean cosine of" not in words(render(all_facts()))


def test_one_expert_per_token_makes_no_pairs():
    assert "pairs" not in ids(render(all_facts(top_k=1)))


def test_dead_experts_are_marked():
    found = all_facts()
    layer = found["evaluation"]["routing"][1]
    layer["load"][3], layer["dead"] = 0.0, 1
    page = render(found)
    assert re.search(r'class="x"><title>layer 1, expert 3: 0 ×', page)
    assert "dead: never chosen" in page
    assert "dead: never chosen" not in render(all_facts())


def test_layers_kept_dense_are_marked():
    page = render(all_facts())
    assert re.search(r'class="marked"><title>layer 0: 0.0500 nats', page)
    assert page.count('class="marked"') == 1


def test_what_it_writes_stands_beside_the_dense_model():
    found = all_facts()
    assert "“Two and two” dense are four. this model are five." in words(render(found))
    found["samples"][0] |= {"against": "are five."}
    assert "“Two and two” dense and this model are five." in words(render(found))
    found["samples"][0] |= {"against": None, "text": " \n"}
    assert "“Two and two” this model (nothing)" in words(render(found))


def advised(found):
    page = render(found)
    return html.unescape(re.search(r'<pre class="command">(.*?)</pre>', page, flags=re.S)[1])


def test_a_split_that_lost_quality_is_to_be_healed():
    found = all_facts()
    command = "upcycle finetune org/moe --recipe heal --data notes.txt+builtin -o moe-healed"
    assert advised(found) == command
    found["model"] = "/home/me/my moe"
    found["made"]["plan"]["recipe"]["calibration"] = "self"
    command = "upcycle finetune 'my moe' --recipe heal --data builtin -o 'my moe-healed'"
    assert advised(found) == command
    assert "In the folder that it lies in:" in words(render(found))
    found["made"] = None
    assert advised(found) == command.replace("--data", "--teacher org/dense --data")


def test_what_upcycle_does_not_train_is_to_be_loaded():
    found = all_facts()
    found["loader"] = "AutoModelForSeq2SeqLM"
    found["made"]["plan"]["runtimes"] = {"vLLM": "it does not know the architecture"}
    assert "AutoModelForSeq2SeqLM.from_pretrained('org/moe')" in advised(found)


def test_copies_are_to_be_specialised_once():
    found = all_facts()
    found["made"]["plan"]["recipe"]["method"]["name"] = "drop"
    found["evaluation"]["texts"][0]["perplexity_against"] = 12.0
    found["made"]["training"] = []
    command = "upcycle finetune org/moe --recipe specialise --data notes.txt+builtin -o moe-trained"
    assert advised(found) == command
    found["made"]["training"] = copy.deepcopy(MADE["training"])
    assert advised(found) == "vllm serve org/moe"


def test_a_merges_routers_are_to_be_trained_on_the_experts_texts():
    found = all_facts()
    found["made"]["plan"]["recipe"]["method"]["name"] = "merge"
    experts = [{"model": "a", "text": "code.txt"}, {"model": "b", "text": "law.txt"}]
    found["made"]["plan"]["merge"] = {"experts": experts}
    found["made"]["training"] = []
    command = "upcycle finetune org/moe --recipe routers --data code.txt+law.txt -o moe-trained"
    assert advised(found) == command
    assert "Its experts are several models' FFNs" in words(render(found))
    found["made"]["plan"]["top_k"] = 1
    assert advised(found) == command.replace("routers", "btx")
    found["made"]["training"] = copy.deepcopy(MADE["training"])
    assert advised(found) == "vllm serve org/moe"


def test_a_good_model_is_to_be_used_where_it_runs():
    found = all_facts()
    found["evaluation"]["texts"][0]["perplexity_against"] = 11.9
    assert advised(found) == "vllm serve org/moe"
    assert "At 1.008 × the dense model's perplexity, it is ready for vLLM and tran" in words(
        render(found)
    )
    found["made"]["plan"]["runtimes"]["vLLM"] = "it does not know it"
    assert "AutoModelForCausalLM.from_pretrained('org/moe')" in advised(found)


def test_quality_that_is_unknown_is_to_be_measured():
    found = all_facts(against=False)
    assert advised(found) == "upcycle report org/moe --against org/dense -o report.html"
    found["made"]["training"] = []  # so that the conversion's own check is of this model
    assert advised(found).startswith("upcycle finetune org/moe --recipe heal")
    found["made"]["check"]["kinds"][0]["ratio"] = 11.1 / 11
    assert advised(found) == "vllm serve org/moe"
    found["made"] = None
    assert advised(found).startswith("from transformers import")


def test_speed_and_tasks_are_tables():
    found = all_facts()
    speeds = {"prefill": 80.0, "decode": 6.0, "prefill_against": 100.0, "decode_against": 5.0}
    setting = {"batch_size": 1, "threads": 2, "dtype": "float32"}
    found["evaluation"]["speed"] = speeds | setting | {"experts_implementation": "grouped_mm"}
    found["evaluation"]["tasks"] = {"arc": {"acc": [0.5, None]}}
    text = words(render(found))
    assert "reading the prompt 100 80.0 × 0.800" in text
    assert "arc, acc – 0.500 –" in text


def test_numbers_of_several_texts_are_those_of_all_their_tokens():
    found = evaluation()
    found["texts"].append(found["texts"][0] | {"perplexity": 27.0, "kl": 0.4})
    assert overall(evaluated(found)).perplexity == pytest.approx(math.sqrt(12 * 27))
    assert overall(evaluated(found)).kl == pytest.approx(0.3)


def on_two_texts(code, prose):
    """The facts of a model of four experts, with each text's loads per layer."""
    found = all_facts(layers=2, experts=4)
    text = found["evaluation"]["texts"][0]
    found["evaluation"]["texts"] = [
        text | {"text": "/home/someone/code.txt", "load": code},
        text | {"text": "prose", "fitted": False, "load": prose},
    ]
    return found


def test_which_expert_takes_which_text_is_the_mean_over_layers():
    code, prose = [[2.0, 1, 1, 0], [3.0, 0, 1, 0]], [[0.5, 0.5, 1, 2], [0.5, 0.5, 2, 1]]
    page = render(on_two_texts(code, prose))
    assert "shares" in ids(page)
    text = words(page)
    assert "code.txt goes to expert 0 most often (2.5 × the fair share)" in text
    assert "prose goes to expert 2 most often (1.5 × the fair share)" in text
    assert "code.txt 2.5 0.50 1.0 0" in text
    assert "prose 0.50 0.50 1.5 1.5" in text
    assert "/home/someone" not in page


def test_files_of_one_name_are_two_texts():
    found = on_two_texts([[2.0, 1, 1, 0]], [[0, 1, 1, 2.0]])
    found["evaluation"]["texts"][1]["text"] = "/home/another/code.txt"
    text = words(render(found))
    assert "code.txt goes to expert 0 most often (2.0 × the fair share); code.txt goes to" in text


@pytest.mark.parametrize("loads", [([], []), ([[1, 2, 1, 0]], [[1, 2, 1, 0]])])
def test_texts_that_are_spread_alike_get_no_picture(loads):
    assert "shares" not in ids(render(on_two_texts(*loads)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1, "1.00"), (0.99999, "1.00"), (12.345, "12.3"), (1234.5, "1,234"),
        (0.000123, "0.000123"), (0.0000123, "1.23e-05"), (2.5e7, "2.50e+07"),
        (math.inf, "inf"), (math.nan, "nan"), (-0.05, "-0.0500"),
    ],
)  # fmt: skip
def test_digits(value, text):
    assert digits(value) == text


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("org/model", "org/model"),
        ("/home/me/secret/out", "out"),
        ("./out", "out"),
        ("gpt2", "gpt2"),
    ],
)
def test_paths_are_not_published(label, name):
    assert public_name(label) == name


def test_numbers_that_are_none_are_no_error():
    found = all_facts()
    found["evaluation"]["texts"][0]["kl"] = math.nan
    found["made"]["dense_layers"]["damage"] = [math.nan, math.inf, 0.1]
    found["log"][1]["loss"] = math.nan
    assert ids(render(found)) == SECTIONS


# --- that it stands alone --------------------------------------------------------------------


def test_nothing_from_outside_is_markup():
    found = all_facts()
    found["model"] = found["made"]["source"]["name"] = EVIL
    found["samples"] = [dict.fromkeys(("prompt", "text", "against"), EVIL)]
    found["evaluation"]["texts"][0]["text"] = EVIL
    found["evaluation"]["tasks"] = {EVIL: {EVIL: [1.0, 1.0]}}
    found["made"]["plan"] |= {"warnings": [EVIL], "runtimes": {EVIL: EVIL}}
    found["made"]["plan"]["recipe"] |= {"name": EVIL, "paper": f"arXiv:{EVIL}", "calibration": EVIL}
    found["made"]["versions"] = {EVIL: EVIL}
    page = render(found)
    assert "alert" in words(page)
    assert EVIL not in page
    assert page.count("<script>") == 1  # its own


def test_it_fetches_nothing():
    page = render(all_facts())
    places = re.findall(r"""(?:\s(?:src|srcset|href|action)=|url\()["']?([^"')\s>]+)""", page)
    assert len(places) == 1 + 3 + 1  # the map, a small one per layer, the paper
    assert all(re.match(r"data:image/png|https://arxiv\.org/abs/", place) for place in places)
    assert "@import" not in page
    assert "<link" not in page


def test_big_model_makes_a_light_page():
    found = all_facts(layers=30, experts=64, top_k=8)
    rng = random.Random(0)
    for layer in found["evaluation"]["routing"]:  # noise does not compress
        layer["co_selection"] = [[rng.random() * 2 for _ in row] for row in layer["co_selection"]]
    found["made"]["dense_layers"]["damage"] = [rng.random() for _ in range(30)]
    found["log"] = [{"step": n, "loss": rng.random()} for n in range(10000)]
    assert len(render(found)) < 1_000_000


# --- charts ----------------------------------------------------------------------------------


def routed(count_EE, tokens):
    """The routing of layer 5, from how many tokens selected both of two experts."""
    return layer_routing(5, torch.tensor(count_EE, dtype=torch.float64), tokens)


def test_counts_come_back_from_the_statistics():
    count_EE = count_pairs(torch.rand(3000, 9).topk(4).indices, 9)
    assert torch.equal(pair_counts(layer_routing(0, count_EE, 3000), 4, 3000), count_EE)


@pytest.mark.parametrize(
    ("counts", "top_k", "tokens", "expected"),
    [
        # All six pairs of four experts are equally likely.
        ([60, 60, 60, 60], 2, 120, [20, 20, 20, 20, 20, 20]),
        # With weights 2, 1 and 1, pairs 01, 02 and 12 are as likely as 2, 2 and 1.
        ([40, 30, 30], 2, 50, [20, 20, 10]),
        # All but one of four: a pair is chosen unless the one left out is in it.
        ([30, 20, 30, 40], 3, 40, [10, 20, 30, 10, 20, 30]),
    ],
)
def test_independent_pairs(counts, top_k, tokens, expected):
    found_EE = independent_pairs(torch.tensor(counts).double(), top_k, tokens)
    upper = torch.triu_indices(len(counts), len(counts), 1)
    assert found_EE[*upper].tolist() == pytest.approx(expected, rel=0.05)
    assert torch.equal(found_EE, found_EE.T)


def test_pairs_are_named_by_evidence_share_and_ratio():
    """Each of the six pairs would have 400 / 6 tokens by chance; 120 are 7.2 deviations more, as
    53.3 / sqrt(66.7 x 5/6), and 40 are 3.6 less."""
    counts = [[200, 120, 40, 40], [120, 200, 40, 40], [40, 40, 200, 120], [40, 40, 120, 200]]
    found = related(routed(counts, 400), 2, 400)
    assert found.best == [(0, 1), (2, 3)]
    assert float(found.excess_EE[0, 1]) == pytest.approx(7.155, abs=0.01)
    assert float(found.excess_EE[0, 2]) == 0
    assert together(found) == (
        "Layer 5: most surely together are experts 0 and 1 in 30 % of the tokens (1.80 × chance), "
        "2 and 3 in 30 % of the tokens (1.80 × chance)."
    )


def test_the_surest_pair_is_not_the_one_of_the_highest_ratio():
    """Experts 4 and 5 are chosen by 12 tokens alone, always together: too few to say so."""
    counts = torch.zeros(6, 6, dtype=torch.float64)
    for i, j, tokens in [(0, 1, 120), (2, 3, 120), (0, 2, 40), (0, 3, 40), (1, 2, 40), (1, 3, 40)]:
        counts += tokens * count_pairs(torch.tensor([[i, j]]), 6)
    counts += 12 * count_pairs(torch.tensor([[4, 5]]), 6)
    found = related(layer_routing(0, counts, 412), 2, 412)
    assert found.best == [(0, 1), (2, 3)]
    assert float(found.ratio_EE[4, 5]) == 1


@pytest.mark.parametrize("tilt", [0.0, 2.0])
def test_independent_choices_show_nothing(tilt):
    """Whether all experts are as popular, or one is nearly always on and others rarely."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.rand(8192, 12, generator=rng).log().neg().log().neg()
    chosen = (noise + tilt * torch.linspace(-1.5, 1.5, 12)).topk(4).indices
    routing = [vars(layer_routing(0, count_pairs(chosen, 12), 8192))]
    assert pairs(evaluated(evaluation() | {"routing": routing, "tokens": 8192}), 4) is None


def test_an_expert_that_is_always_on_is_nobodys_partner():
    chosen = torch.tensor([[0, 1]] * 60 + [[0, 2]] * 40 + [[0, 3]] * 20)
    found = related(layer_routing(0, count_pairs(chosen, 4), 120), 2, 120)
    assert found.best == []
    assert together(found) == "Layer 0."


def test_partners_lie_side_by_side():
    groups = [[0, 3, 5], [1, 2, 4]]
    affinity = [
        [2.0 if any({i, j} <= set(g) for g in groups) else 0.5 for j in range(6)] for i in range(6)
    ]
    order = charts.together(affinity)
    assert sorted([sorted(order[:3]), sorted(order[3:])]) == groups


def test_image_is_a_png_of_the_tones():
    uri = charts.image([[1.0, 0.0], [-1.0, -0.5], [0.5, 0.0]])
    png = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(png):
        size = int.from_bytes(png[place : place + 4], "big")
        body, crc = png[place + 4 : place + 8 + size], png[place + 8 + size : place + 12 + size]
        assert zlib.crc32(body) == int.from_bytes(crc, "big")
        chunks[body[:4]] = body[4:]
        place += 12 + size
    assert chunks[b"IHDR"][:8] == (2).to_bytes(4, "big") + (3).to_bytes(4, "big")
    rows = zlib.decompress(chunks[b"IDAT"])
    middle = charts.SHADES
    assert list(rows) == [0, 2 * middle, middle, 0, 0, middle // 2, 0, 3 * middle // 2, middle]
    assert [chunks[b"tRNS"][i] for i in (0, middle, 2 * middle)] == [255, 0, 255]


def test_curve_leaves_out_what_is_not_a_number_and_keeps_its_ends():
    chart = charts.curve([(0, 3.0), (1, math.nan), (2, 2.0), (4, 1.0)])
    assert (chart.first, chart.last) == (3.0, 1.0)
    assert chart.path.startswith("M0 ")
    assert chart.path.count("L") == 2
    assert [tick.value for tick in chart.y_ticks] == [1, 2, 3]
    assert charts.curve([(0, 1.0), (1, math.nan)]) is None


def test_long_curve_is_thinned():
    chart = charts.curve([(n, float(n % 7)) for n in range(12345)])
    assert 100 < chart.path.count("L") < charts.POINTS
    assert [tick.value for tick in chart.x_ticks] == [0, 12344]


def test_level_curve_has_a_range():
    assert charts.curve([(0, 2.0), (1, 2.0)]).path == "M0 100L100 100"


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1.0, -2.0], [math.nan, math.nan]])
def test_columns_of_nothing_have_no_height(values):
    assert [column.height for column in charts.columns(values, [0, 1]).columns] == [0, 0]


def test_ticks_are_round_numbers_and_places_are_few():
    def shown(ticks):
        return [(tick.place, tick.value) for tick in ticks]

    assert shown(charts.ticks(range(4))) == [(12.5, 0), (37.5, 1), (62.5, 2), (87.5, 3)]
    assert [tick.value for tick in charts.ticks(range(3, 28))] == [5, 10, 15, 20, 25]
    assert [tick.value for tick in charts.ticks(range(64))] == [0, 10, 20, 30, 40, 50, 60]
    assert shown(charts.places(2)) == [(25, 0), (75, 1)]
    assert [tick.value for tick in charts.places(25)] == list(range(0, 25, 2))
    assert [tick.value for tick in charts.places(64)] == list(range(0, 64, 5))


def test_experts_are_numbered_along_the_load():
    found = all_facts(layers=2, experts=25, top_k=5)
    page = render(found)
    load = page[page.index('id="load"') : page.index('id="pairs"')]
    axis = re.search(r'<div class="axis">(.*?)</div>', load)[1]
    assert re.findall(r"left:([\d.]+)%\">(\d+)<", axis) == [
        ("2.0", "0"), ("22.0", "5"), ("42.0", "10"), ("62.0", "15"), ("82.0", "20"),
    ]  # fmt: skip
    assert words(load).count("expert, one row per layer") == 1


def test_limit_is_what_most_ratios_are_within():
    assert charts.limit([]) == 1.5
    assert charts.limit([1.1, 0.9] * 20 + [0.0, 100.0]) == 1.5
    assert charts.limit([1.1, 1.9] * 20) == 2
    assert charts.limit([0.01, 100.0]) == 4
    assert [charts.tone(r, 4) for r in (0, 0.25, 1, 2, 9)] == [-1, -1, 0, 0.5, 1]


# --- the command -----------------------------------------------------------------------------


def run(*arguments):
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def error(*arguments):
    """The one sentence of a command that refuses, with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr.splitlines()[-1].removeprefix("error: ")


@pytest.fixture
def model(dense, moe, tmp_path):
    """A folder with an MoE of 7 experts that may be written to, but no finetune log yet."""
    source = moe(dense(), experts=7)
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    return folder


def of_model():
    """An evaluation of `model`, whose numbers are made up."""
    return evaluation(experts=7) | {"model": "model"}


@pytest.fixture
def saved(tmp_path):
    """A saved evaluation of `model`."""
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(of_model()))
    return path


def test_page_of_a_model_evaluated_now(dense, model, text, tmp_path):
    out = tmp_path / "report.html"
    result = run(model, "-o", out, "--against", dense(), "--text", text, "--tokens", 512)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out}\n"
    page = out.read_text()
    assert ids(page) - {"pairs"} == {"samples", "load", "made", "next"}
    assert "text.txt" in words(page)
    assert "made from dense" in words(page)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "report.html"}


def test_windows_of_another_length(dense, text, tmp_path):
    short = dense(max_position_embeddings=64)
    arguments = (short, "-o", tmp_path / "r.html", "--text", text, "--tokens", 128)
    assert "give --seq-len 64" in error(*arguments)
    assert run(*arguments, "--seq-len", 64).exit_code == 0


def test_page_of_a_dense_model(dense, text, tmp_path):
    result = run(dense(), "-o", tmp_path / "r.html", "--text", text, "--tokens", 512)
    assert result.exit_code == 0, result.stderr
    assert ids((tmp_path / "r.html").read_text()) == {"samples"}


def test_saved_evaluation_and_log(model, saved, tmp_path):
    (model / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    assert run(model, "-o", tmp_path / "r.html", "--evaluation", saved).exit_code == 0
    page = (tmp_path / "r.html").read_text()
    assert ids(page) == SECTIONS - {"damage", "samples", "texts"}
    assert "Validation perplexity: 12.2 at first, 10.0 at last" in page


def test_saved_evaluation_is_what_eval_prints(model, text, tmp_path):
    arguments = ["eval", str(model), "--text", str(text), "--tokens", "512", "--json"]
    (tmp_path / "eval.json").write_text(CliRunner().invoke(app, arguments).stdout)
    out = tmp_path / "r.html"
    assert run(model, "-o", out, "--evaluation", tmp_path / "eval.json").exit_code == 0


def test_same_facts_same_page(model, saved, tmp_path):
    for name in ("a", "b"):
        run(model, "-o", tmp_path / name, "--evaluation", saved)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_is_replaced_unasked(model, saved, tmp_path):
    out = tmp_path / "r.html"
    out.write_text("mine")
    arguments = (model, "-o", out, "--evaluation", saved)
    assert error(*arguments) == f"-o {out} exists: choose another, or --overwrite"
    assert out.read_text() == "mine"
    assert run(*arguments, "--overwrite").exit_code == 0
    assert "<html" in out.read_text()


@pytest.mark.parametrize("stage", ["render", "replace"])
def test_failure_leaves_the_former_page(model, saved, tmp_path, monkeypatch, stage):
    out = tmp_path / "r.html"
    out.write_text("mine")

    def fail(*_):
        raise OSError("no more room")

    if stage == "render":
        monkeypatch.setattr(upcycle.evaluation.page, "render", fail)
    else:
        monkeypatch.setattr(facts.Path, "replace", fail)
    assert run(model, "-o", out, "--evaluation", saved, "--overwrite").exit_code == 1
    assert out.read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"model", "eval.json", "r.html"}


def test_places_where_no_page_can_lie(model, saved, tmp_path):
    arguments = (model, "--evaluation", saved)
    assert error(*arguments) == "name the file for the page: -o report.html"
    assert "is a folder: give a file such as" in error(*arguments, "-o", tmp_path)
    assert "does not exist" in error(*arguments, "-o", tmp_path / "no" / "r.html")


def test_saved_evaluation_takes_no_options_of_a_new_one(model, saved, tmp_path):
    arguments = (model, "-o", tmp_path / "r.html", "--evaluation", saved, "--tokens", 512)
    assert error(*arguments).startswith("--evaluation holds numbers already: drop --against")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("not json", "it is not JSON"),
        ("[]", "should be a dictionary"),
        ("{}", "is missing"),
        (json.dumps(of_model() | {"texts": []}), "texts=[]: list should have at least"),
        (json.dumps(of_model() | {"window": "x"}), "window='x': input should be a"),
        (json.dumps(of_model() | {"routing": [{"layer": 0}]}), "routing.0.load"),
        (json.dumps(evaluation(experts=5)), "of a model with 5 experts per layer, but"),
        (json.dumps(evaluation(experts=0)), "of a model with no experts per layer, but"),
        (b"\xff\xfe", "it is not UTF-8 text"),
    ],
)
def test_bad_evaluation(model, tmp_path, content, reason):
    path = tmp_path / "eval.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = error(model, "-o", tmp_path / "r.html", "--evaluation", path)
    assert reason in message
    assert str(path) in message
    assert len(message) < 400
    assert not (tmp_path / "r.html").exists()


def test_evaluation_of_another_model_of_as_many_experts(model, saved, tmp_path):
    saved.write_text(json.dumps(of_model() | {"model": "other"}))
    found = error(model, "-o", tmp_path / "r.html", "--evaluation", saved)
    assert "is of other with 1,000 parameters, but" in found


def test_encoder_has_no_page(dense, tmp_path):
    arguments = (dense("eurobert"), "-o", tmp_path / "r.html", "--evaluation", tmp_path)
    assert "is an encoder, whose tokens see the next one" in error(*arguments)


def test_lists_of_another_length(model, saved, tmp_path):
    found = of_model()
    arguments = (model, "-o", tmp_path / "r.html", "--evaluation", saved)
    saved.write_text(json.dumps(found | {"tasks": {"arc": {"acc": [0.5]}}}))
    assert "tasks.arc.acc.1 is missing" in error(*arguments)
    found["routing"][2]["co_selection"].pop()
    saved.write_text(json.dumps(found))
    assert error(*arguments).endswith(": co_selection of layer 2 is not 7 x 7, as load says")


def test_saved_evaluation_is_read_whole(model, saved):
    found = of_model() | {"tasks": {"arc": {"acc": [0.5, None]}}}
    saved.write_text(json.dumps(found))
    read = facts.read_evaluation(saved, facts.gather(str(model)))
    assert json.loads(json.dumps(evaluation_summary(read.evaluation))) == found | {"top_ks": []} | {
        "texts": [text | {"load": []} for text in found["texts"]]
    }
    assert read.samples == []


def test_saved_samples_are_shown(model, saved, tmp_path):
    sample = {"prompt": "One", "text": "two", "against": None}
    saved.write_text(json.dumps(of_model() | {"samples": [sample]}))
    assert run(model, "-o", tmp_path / "r.html", "--evaluation", saved).exit_code == 0
    assert "“One” this model two" in words((tmp_path / "r.html").read_text())
    saved.write_text(json.dumps(of_model() | {"samples": [sample | {"text": 1}]}))
    message = error(model, "-o", tmp_path / "new.html", "--evaluation", saved)
    assert "0.text=1: input should be a valid string" in message


def test_evaluation_that_is_not_there(model, tmp_path):
    arguments = (model, "-o", tmp_path / "r.html", "--evaluation", tmp_path / "no.json")
    assert error(*arguments).endswith("no.json is not a file: give one of `upcycle eval --json`")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"loss": 1}', "is missing"),
        ('{"step": 1, "loss": "high"}', "loss='high'"),
        ('{"step": 1', "it is not JSON"),
        ("3", "valid dictionary"),
    ],
)
def test_bad_line_in_the_log(model, saved, tmp_path, line, reason):
    (model / "train_log.jsonl").write_text(f'{{"step": 0, "loss": NaN}}\n\n{line}\n')
    message = error(model, "-o", tmp_path / "r.html", "--evaluation", saved)
    assert message.startswith(f"line 3 of {model / 'train_log.jsonl'} is not what `upcycle fine")
    assert reason in message


def test_bad_record(model, saved, tmp_path):
    record = json.loads((model / "upcycle.json").read_text())
    del record["versions"]
    (model / "upcycle.json").write_text(json.dumps(record))
    message = error(model, "-o", tmp_path / "r.html", "--evaluation", saved)
    assert "upcycle.json is not what upcycle writes: versions" in message


def test_check_in_the_record(tmp_path):
    path, check = tmp_path / "upcycle.json", MADE["check"]
    path.write_text(json.dumps(MADE | {"check": check | {"dead_experts": 0}}))
    assert asdict(read_record(path).check) == check
    kinds = [check["kinds"][0] | {"perplexity_dense": 0}]
    path.write_text(json.dumps(MADE | {"check": check | {"kinds": kinds}}))
    with pytest.raises(
        UpcycleError, match=r"upcycle\.json .*: check\.kinds\.0\.perplexity_dense=0: it must be"
    ):
        read_record(path)


def test_model_that_was_trained_here_but_made_elsewhere(model):
    run = records.training_run("builtin")
    (model / "upcycle.json").write_text(json.dumps({"check": None, "training": [run]}))
    assert facts.gather(str(model)).made is None


def test_model_that_is_not_there(tmp_path):
    assert "does not exist" in error("./nowhere", "-o", tmp_path / "r.html")


# --- in a browser ----------------------------------------------------------------------------

PROBE = """<script>
window.problems = [];
addEventListener("error", event => problems.push(event.message || event.target.tagName), true);
addEventListener("load", () => {
  const before = document.querySelector("output")?.value;
  document.querySelector(".thumbs button:last-child")?.click();
  parent.postMessage({
    problems,
    inner: innerWidth,
    width: document.documentElement.scrollWidth,
    shown: [...document.querySelectorAll("[id]")].filter(e => e.offsetHeight > 20).map(e => e.id),
    images: [...document.images].every(i => i.naturalWidth > 1),
    picked: before !== document.querySelector("output")?.value,
    labels: [...document.querySelectorAll("[data-place]")].map(e => Number(e.textContent)),
    crowded: [...document.querySelectorAll(":is(.axis, .side) span + span")].filter(e => {
      const box = e.getBoundingClientRect(), other = e.previousSibling.getBoundingClientRect();
      return box.left < other.right + 2 && box.top < other.bottom;
    }).map(e => e.outerHTML),
    pressed: document.querySelectorAll("[aria-pressed=true]").length,
    cut: [...document.querySelectorAll("main *, header *")].filter(e => {
      const box = e.getBoundingClientRect();
      return box.width && (box.right > innerWidth + 1 || box.left < -1);
    }).map(e => e.outerHTML.slice(0, 80)),
  }, "*");
});
</script>"""
# A window can't be narrower than 500 px, a frame can.
FRAME = """<!doctype html><iframe src="page.html" style="border:0;width:{width}px;height:800px">
</iframe><pre></pre><script>
addEventListener("message", event => {{
  document.querySelector("pre").textContent = JSON.stringify(event.data);
}});
</script>"""


def browse(page, folder, width):
    """What a page of this width tells of itself in a headless browser."""
    (folder / "page.html").write_text(page.replace("<head>", "<head>" + PROBE))
    (folder / "frame.html").write_text(FRAME.format(width=width))
    done = subprocess.run(
        [BROWSER, *QUIET, f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
         "--virtual-time-budget=5000", "--window-size=1400,900", "--dump-dom",
         (folder / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    found = re.search(r"<pre>(.+?)</pre>", done.stdout, flags=re.S)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])) | {"console": console}


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("size", [(3, 8, 2), (30, 64, 8)])
def test_in_a_browser(tmp_path, width, size):
    layers, experts, top_k = size
    found = all_facts(layers=layers, experts=experts, top_k=top_k)
    found["made"]["dense_layers"]["damage"] = [0.01 * n for n in range(layers)]
    found["model"] = "org/" + "a-long-name-" * 8
    page = render(found)
    seen = browse(page, tmp_path, width)
    assert seen["problems"] == seen["console"] == []
    assert seen["inner"] == width
    assert seen["width"] <= width
    assert seen["cut"] == seen["crowded"] == []
    assert set(seen["shown"]) >= SECTIONS
    assert seen["images"]
    assert seen["picked"]
    *_, last = re.findall(r'data-order="\[(.*?)\]"', page)
    order = [int(number) for number in last.split(", ")]
    assert seen["labels"] == 2 * order[:: {8: 1, 64: 5}[experts]]
    assert seen["pressed"] == 1


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
def test_dense_model_in_a_browser(tmp_path):
    seen = browse(render(dense_facts()), tmp_path, 360)
    assert seen["problems"] == seen["console"] == []
    assert seen["width"] <= 360
    assert seen["shown"] == []
