"""The command line: what goes in, what comes out on which stream, and with which exit code."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
import typer
import yaml
from hosting import DECODER_TARGETS as TARGETS
from huggingface_hub.utils import logging as hub_logging
from reference import load
from tiny import PLAIN_SPLIT
from typer.testing import CliRunner

import upcycle
from upcycle import CheckFailed
from upcycle.arguments import as_set
from upcycle.cli import app
from upcycle.conversion import geometry as budget
from upcycle.conversion import run as conversion
from upcycle.conversion.compensate import COMPENSATIONS
from upcycle.conversion.designing import SPREAD, UNFITTED_SPREAD
from upcycle.conversion.fit import FITS
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.conversion.recipe import SHARED_EXPERTS, Recipe, load_recipe
from upcycle.conversion.rest import RESTS
from upcycle.core import flags as settings
from upcycle.core.flags import ABOUT, as_flags
from upcycle.core.settings import shipped_recipes
from upcycle.finetune.gating import GATINGS
from upcycle.finetune.router_losses import ROUTER_LOSSES
from upcycle.finetune.settings import Training
from upcycle.models.companions import copy_companions
from upcycle.models.text import PROBES, kind_name
from upcycle.router_init import ROUTERS
from upcycle.router_init.gates import GATES
from upcycle.split import SPLITS
from upcycle.split.copies import PERTURBS
from upcycle.split.shared import SHARED

COMMANDS = ["convert", "plan", "merge", "finetune", "eval", "inspect", "report", "recipes", "env"]
QUICK = """
    --calibration builtin --calibration-tokens 64 --seq-len 64 --check none --set split=contiguous
""".split()
TARGET_OF = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen3",
    "glm4_moe": "llama",
    "granitemoeshared": "granite",
    "granitemoe_swa": "smollm3",
    "flex_olmo": "olmo2",
    "ernie4_5_moe": "ernie4_5",
    "laguna": "qwen3",
    "deepseek_v3": "youtu",
    "qwen3_5_moe": "qwen3_5_text",
    "gemma4": "gemma4_text",
    "lfm2_moe": "lfm2",
    "granitemoehybrid": "granitemoehybrid",
    "nemotron_h": "nemotron_h",
}


def run(*arguments, env=None):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env=env or {})
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def report(*arguments, env=None) -> dict:
    """What a command that succeeds prints with --json: one JSON object, on one line."""
    result = run(*arguments, "--json", env=env)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("}\n")
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def error(*arguments, code=2, env=None) -> str:
    """The one sentence that a command which fails prints, on stderr alone."""
    result = run(*arguments, env=env)
    assert result.exit_code == code
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("error: ")
    assert sum("error: " in line for line in lines) == 1
    return lines[-1].removeprefix("error: ")


def options(command: str) -> dict[str, typer.core.TyperOption]:
    click_command = typer.main.get_command(app).commands[command]
    return {p.opts[0]: p for p in click_command.params if p.param_type_name == "option"}


# --- help ------------------------------------------------------------------------------------


def test_help_of_every_command_imports_no_torch():
    program = f"""
import sys
from upcycle.cli import app
for arguments in [[], *([name] for name in {COMMANDS})]:
    app([*arguments, "--help"], standalone_mode=False)
heavy = {{"torch", "transformers", "numpy", "yaml"}} & sys.modules.keys()
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == 1 + len(COMMANDS)


def imported(program: str, *arguments) -> set[str]:
    """The modules that a process of its own holds after running the program."""
    program = f"import json, sys\n{program}\nprint(json.dumps(list(sys.modules)), file=sys.stderr)"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


GOOD = ["--version", "recipes", "recipes --json", "recipes cmoe --json"]
BAD = """
    recipes cmeo
    convert ./none -o OUT
    convert none.gguf -o OUT
    convert NOTES -o OUT
    convert MODEL
    convert MODEL -o OUT --revision main
    convert MODEL -o OUT --recipe cmeo
    convert MODEL -o OUT --recipe none.yaml
    convert MODEL -o OUT --experts many
    convert MODEL -o OUT --active 2
    convert MODEL -o OUT --method cut
    convert MODEL -o OUT --set split=rendom
    convert MODEL -o OUT --target mixtrel
    convert MODEL -o OUT --set split.row=gate
    convert MODEL -o OUT --set split
    convert MODEL -o OUT --calibration none.txt
    convert MODEL -o OUT --exprts 4
    plan MODEL --set split=rendom
    merge
    merge MODEL
    merge ./none -o OUT
    merge NOTES -o OUT
    merge none.yml -o OUT
    merge BROKEN -o OUT
    merge BROKEN MODEL -o OUT
    merge MODEL MODEL -o OUT --top-k 3
    merge MODEL -o OUT --rest tise
    merge MODEL -o OUT --router rigde
    merge MODEL -o OUT --target mixtrel
    merge MODEL -o OUT --set rest.densty=1
    merge MODEL -o OUT --text MODEL=none.txt
    merge MODEL -o OUT --text other=NOTES
    merge MODEL -o OUT --add MODEL
    merge MODEL MODEL -o OUT --add MODEL
    merge MODEL -o OUT --prompt rain
    merge MODEL -o OUT --add MODEL --text NOTES --text NOTES
    finetune ./none -o OUT
    finetune MODEL
    finetune MODEL -o OUT --recipe hael
    finetune MODEL -o OUT --lr=-1
    finetune MODEL -o OUT --data none.txt
    eval ./none
    eval MODEL --against ./none
    eval MODEL --text none.txt
    eval MODEL --output none/eval.json
    inspect ./none
    report MODEL
    report ./none -o OUT
    convrt
"""
"""Requests that are wrong in a way that shows without a model."""


def test_what_needs_no_model_imports_no_torch(dense, text, tmp_path):
    broken = tmp_path / "moe.yml"
    broken.write_text("base_model: MODEL\nexperts:\n\t- source_model: MODEL\n")
    places = {"MODEL": dense(), "NOTES": text, "OUT": tmp_path / "out", "BROKEN": broken}
    cases = [(line.split(), 0) for line in GOOD]
    cases += [(line.split(), 2) for line in BAD.split("\n") if line]
    cases = [([str(places.get(word, word)) for word in words], code) for words, code in cases]
    program = """
from upcycle.cli import main
for words, code in json.loads(sys.stdin.read()):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        assert (end.code or 0) == code, (words, end.code)
    heavy = {"torch", "transformers", "numpy", "safetensors"} & sys.modules.keys()
    assert not heavy, (words, heavy)
"""
    command = [sys.executable, "-c", f"import json, sys\n{program}"]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    assert done.stderr.lower().count("error") >= len(cases) - len(GOOD)


def test_types_are_shipped():
    assert (resources.files("upcycle") / "py.typed").is_file()


def test_version():
    assert run("--version").stdout == f"{upcycle.__version__}\n"


def test_copies_import_no_other_method_s_libraries(dense, tmp_path):
    """scipy stays out of this: transformers' models import it themselves."""
    program = "from upcycle.cli import app; app(sys.argv[1:], standalone_mode=False)"
    out = ["-o", tmp_path / "out", "--method", "copy", "--check", "none", "--json"]
    modules = imported(program, "convert", dense(), *out)
    assert "torch" in modules
    unneeded = {
        "sklearn",
        "datasets",
        "pymetis",
        "pyarrow",
        "upcycle.finetune.run",
        "upcycle.evaluation.page.charts",
    }
    unneeded |= {"transformers.models.auto.tokenization_auto", "transformers.trainer"}
    assert not unneeded & modules


def test_methods_import_their_libraries_when_they_run():
    modules = imported("import upcycle.split, upcycle.router_init, upcycle.conversion.compensate")
    assert not {"scipy", "sklearn", "pymetis", "transformers"} & modules


def test_finetune_is_a_function_whatever_was_imported_before():
    """Though there is a folder of that name."""
    for before in ("", "import upcycle.finetune.run", "from upcycle.finetune import losses"):
        program = f"{before}\nimport upcycle\nfrom upcycle.finetune import settings"
        done = subprocess.run(
            [sys.executable, "-c", f"{program}\nassert callable(upcycle.finetune)"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_every_command_is_known_here():
    assert sorted(typer.main.get_command(app).commands) == sorted(COMMANDS)


def test_no_arguments_show_the_help():
    assert "Usage: " in run().output


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_methods_in_the_help_are_the_registered_ones(command):
    listed = re.search(r"\w+(?: \| \w+)+", options(command)["--method"].help).group()
    assert set(listed.split(" | ")) == {"split", "prune", "copy", *PERTURBS}


FLAGS = {
    "convert": """
        --recipe --set --revision
        --method --keep-dense --target --for
        --active --experts --top-k --shared
        --calibration --calibration-tokens --seq-len
        --check --dtype --device --seed --resume --dry-run
        -o --overwrite --json --push-to-hub --private
    """,
    "plan": """
        --recipe --set --revision
        --method --keep-dense --target --for
        --active --experts --top-k --shared
        --calibration --calibration-tokens --seq-len
        --check --dtype --device --seed --resume
        -o --overwrite --json
    """,
    "merge": """
        --base --shared-model --add --text --prompt --rest --router --target --top-k --set
        --seq-len --check --dtype --device --seed --resume --dry-run
        -o --overwrite --json --push-to-hub --private
    """,
    "finetune": """
        --recipe --set
        --train --lora --merge --lr
        --data --assistant-only-loss --tokens --steps --seq-len --batch-size
        --teacher --distill --balance
        --precision --device --seed --resume --dry-run
        -o --overwrite --json --push-to-hub --private
    """,
    "eval": """
        --against --text --tokens --seq-len --top-k --speed --card --tasks --batch-size --dtype
        --device
        --output --json
    """,
    "inspect": "--revision --partition --json",
    "report": "-o --against --text --tokens --seq-len --evaluation --overwrite",
    "recipes": "--json",
    "env": "--json",
}
"""What most people need to decide. A setting that few need has no flag: `--set` sets it."""


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_these(command):
    assert options(command).keys() == set(FLAGS[command].split())
    assert not any(option.envvar for option in options(command).values())


@pytest.mark.parametrize("command", ["convert", "plan", "merge", "finetune"])
def test_help_fits_two_screens_of_80_columns(command):
    shown = run(command, "--help", env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).stdout
    assert len(shown.splitlines()) <= 62
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("command", "listed", "model"),
    [
        ("convert", settings.CONVERSION_FLAGS, Recipe),
        ("plan", settings.CONVERSION_FLAGS, Recipe),
        ("merge", settings.MERGE_FLAGS, Recipe),
        ("finetune", settings.TRAINING_FLAGS, Training),
    ],
)
def test_errors_know_which_settings_have_a_flag(command, listed, model):
    flags = {settings.flag_of(field): field for field in model.model_fields}
    assert set(listed) == {flags[name] for name in options(command) if name in flags}


NOT_OURS = {
    "--num_processes", "--nproc_per_node", "--config_file",  # accelerate's and torchrun's
    "--xformers",
}  # fmt: skip


def test_sentences_name_no_flag_that_is_gone():
    """Neither do recipes: what they name can be typed."""
    package = Path(upcycle.__file__).parent
    known = {"--out", "--help", "--version"} | set().union(*map(options, COMMANDS))
    for path in sorted([*package.rglob("*.py"), *package.rglob("recipes/**/*.yaml")]):
        text = path.read_text() if path.suffix == ".yaml" else strings(path)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text)) <= known | NOT_OURS, path


def strings(path: Path) -> str:
    """The strings in a module, docstrings included."""
    constants = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant))
    return "\n".join(n.value for n in constants if isinstance(n.value, str))


@pytest.mark.parametrize("command", ["convert", "finetune"])
def test_every_setting_is_described(command):
    model = {"convert": Recipe, "finetune": Training}[command]
    rows = {row["name"]: row for row in report("recipes")["settings"][command]}
    assert rows.keys() == set(model.model_fields) - set(ABOUT)
    shown = run("recipes").stdout
    for name, row in rows.items():
        assert row["meaning"].endswith("."), name
        assert name in shown
        literal = re.search(r"Literal\[(.*?)\]", str(model.model_fields[name].annotation))
        for value in re.findall(r"'(\w+)'", literal.group(1)) if literal else ():
            assert f"`{value}`" in row["meaning"], name


def test_described_defaults_are_those_of_the_default_recipe():
    rows = {row["name"]: row["default"] for row in report("recipes")["settings"]["convert"]}
    given = {name: yaml.safe_load(default) for name, default in rows.items() if default}
    assert load_recipe("default", given) == load_recipe("default")
    assert (rows["split"], rows["keep_dense"]) == ("predictability", "auto")


@pytest.mark.parametrize(
    "option",
    ["calibration", "calibration-tokens", "seq-len", "seed"],
)
def test_default_in_the_help_is_the_recipes(option):
    written = re.search(r"\[default: (\w+)\]", options("convert")[f"--{option}"].help).group(1)
    field = option.replace("-", "_")
    assert getattr(Recipe(**{field: written}), field) == getattr(Recipe(), field)


@pytest.mark.parametrize(
    ("option", "default"),
    [
        ("experts", f"{3 * budget.FEWEST // 4} to {budget.MOST}, or {budget.COPIES} copies"),
        ("top-k", f"by --active, or {budget.COPIES_PER_TOKEN} copies"),
        ("active", f"{budget.ACTIVE}"),
    ],
)
def test_default_in_the_help_is_the_plans_where_the_recipe_has_none(option, default):
    assert getattr(Recipe(), option.replace("-", "_")) is None
    assert options("convert")[f"--{option}"].help.endswith(f"[default: {default}]")


@pytest.mark.parametrize(
    ("field", "default"),
    [
        (
            "experts",
            f"about {3 * budget.FEWEST // 4} to {budget.MOST} parts, or {budget.COPIES} copies",
        ),
        ("active", f"{budget.ACTIVE}"),
        ("router_spread", f"{SPREAD} with a refit, else {UNFITTED_SPREAD}"),
    ],
)
def test_default_in_a_description_is_the_plans(field, default):
    described = " ".join(Recipe.model_fields[field].description.split())
    assert described.endswith(f"By default {default}.")


# --- streams and exit codes ------------------------------------------------------------------


def test_convert_prints_one_json_object(dense, tmp_path):
    made = report("convert", dense(), "-o", tmp_path / "out", *QUICK)
    assert made["out"] == str(tmp_path / "out")
    assert made["check"] is None
    assert load(tmp_path / "out")


def test_process_prints_one_json_object_and_leaves_with_0(dense, tmp_path):
    program = "from upcycle.cli import main; main()"
    arguments = ["convert", str(dense()), "-o", str(tmp_path / "out"), "--set", "split=contiguous"]
    arguments += ["--calibration", "builtin", "--calibration-tokens", "512", "--json"]
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = json.loads(done.stdout)["check"]["kinds"]
    assert {kind["kind"]: kind["tokens"] for kind in kinds} == dict.fromkeys(PROBES, 1024)
    assert done.stderr == ""


def test_convert_for_people_names_the_result(dense, tmp_path, monkeypatch):
    monkeypatch.setitem(CHECK_TOKENS, "fast", 64)
    result = run("convert", dense(), "-o", tmp_path / "out", *QUICK, "--check", "fast")
    assert result.exit_code == 0
    assert "out loads with AutoModelForCausalLM" in " ".join(result.stdout.split())
    assert "perplexity" in result.stdout
    assert "converting layers …" in result.stderr
    assert "note: MLX does not run this qwen2_moe: every layer" in " ".join(result.stderr.split())
    assert "note: vLLM" not in result.stderr


def test_plan_for_people_lists_targets_runtimes_and_notes(dense):
    result = run("plan", dense())
    assert result.exit_code == 0
    assert all(target in result.stdout for target in TARGETS)
    assert "MLX" in result.stdout
    assert re.search(r"vLLM +│ ok ", result.stdout)
    assert "note: 8 neurons per expert is no multiple of 64" in result.stderr
    assert "MLX" not in result.stderr


def test_dry_run_is_plan(dense, tmp_path):
    request = [dense(), "-o", tmp_path / "out", "--experts", "4", "--set", "seed=3"]
    assert report("convert", *request, "--dry-run") == report("plan", *request)
    assert list(tmp_path.iterdir()) == []


def test_plan_and_convert_take_the_same_options():
    assert options("convert").keys() - options("plan").keys() == {
        "--dry-run",
        "--push-to-hub",
        "--private",
    }
    assert options("plan").keys() <= options("convert").keys()


def test_bad_input_leaves_with_2(dense):
    request = ["plan", dense(), "--experts", "5", "--shared", "0", "--json"]
    assert error(*request).endswith("nearest: 4 or 6")


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "~nobody"],
        ["plan", "MODEL", "--calibration", "~nobody.txt"],
        ["plan", "MODEL", "--recipe", "~nobody.yaml"],
        ["eval", "MODEL", "--text", "~nobody.txt"],
    ],
)
def test_home_of_nobody_is_a_path_like_any_other(dense, arguments):
    assert "~nobody" in error(*(str(dense()) if a == "MODEL" else a for a in arguments))


def test_file_that_is_no_recipe(dense):
    path = dense() / "model.safetensors"
    assert error("recipes", path).startswith(f"{path} is not YAML")


def test_output_of_another_encoding(dense):
    done = subprocess.run(
        [sys.executable, "-m", "upcycle", "inspect", str(dense())],
        capture_output=True, env=os.environ | {"PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("method", ["copy", "split"])
def test_weights_too_large_for_float16(dense, tmp_path, method):
    model = load(dense())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "big")
    copy_companions(dense(), tmp_path / "big")
    sentence = error(
        "convert", tmp_path / "big", "-o", tmp_path / "out", "--method", method, "--dtype",
        "float16", "--experts", 4, *QUICK[:-2],
    )  # fmt: skip
    assert "model.layers.1." in sentence
    assert sentence.endswith("holds weights too large for float16: pass --dtype bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


@pytest.mark.parametrize(
    "arguments",
    [["plan", "x" * 5000], ["recipes", "x" * 5000], ["inspect", "x" * 5000]],
)
def test_a_name_that_is_too_long_leaves_with_2(arguments):
    sentence = error(*arguments)
    assert sentence.startswith("File name too long: xxx")
    assert len(sentence) < 300


def test_settings_of_any_size_leave_with_2(dense):
    assert "give a size such as 5GB" in error(
        "plan", dense(), "--set", f"max_shard_size={'9' * 400}GB"
    )


@pytest.mark.parametrize("name", ["a[/red][b", ":smile:"])
def test_files_have_any_names(dense, tmp_path, name):
    """Square brackets are rich's markup."""
    source, out = tmp_path / name, tmp_path / f"{name}-out"
    shutil.copytree(dense(), source)
    (tmp_path / f"{name}.txt").write_text("abc " * 200)
    text = ["--calibration", tmp_path / f"{name}.txt", *QUICK[2:]]
    for arguments in (
        ["plan", source, *text],
        ["convert", source, "-o", out, *text],
        ["inspect", out],
        ["eval", out, "--text", tmp_path / f"{name}.txt", "--tokens", 16, "--seq-len", 8],
        ["report", out, "-o", tmp_path / "page.html", "--text", tmp_path / f"{name}.txt",
         "--tokens", 16, "--seq-len", 8],
    ):  # fmt: skip
        result = run(*arguments)
        assert result.exit_code == 0, result.stderr
        shown = "".join(re.sub("[│┃\n ]", "", result.stdout).split())
        assert name in shown or arguments[0] == "report"


def test_names_need_not_be_utf8(dense, tmp_path):
    """safetensors opens none that are not; of a text, any will do."""
    name, out = os.fsdecode(b"\xff"), tmp_path / "out"
    shutil.copytree(dense(), tmp_path / name)
    (tmp_path / f"{name}.txt").write_text("abc " * 200)
    text = ["--calibration", tmp_path / f"{name}.txt", *QUICK[2:-2], "--json"]
    for arguments in ((tmp_path / name, "-o", out), (dense(), "-o", tmp_path / f"{name}o")):
        assert error("convert", *arguments, *text).endswith(
            "a name that is not UTF-8, which safetensors can't open: rename it"
        )
    made = report("convert", dense(), "-o", out, *text[:-1])
    assert made["plan"]["recipe"]["calibration"] == str(tmp_path / f"{name}.txt")
    assert kind_name(str(tmp_path / f"{name}.txt")) == "\ufffd.txt"  # on the card


def test_convert_without_a_place(dense):
    assert error("convert", dense()) == "name the folder for the result: -o OUT"


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (CheckFailed("it differs"), "it differs; please report this"),
        (KeyboardInterrupt(), "interrupted; nothing was left behind"),
        (OSError(28, "No space left on device", "x.safetensors"), "No space left on device: x.s"),
        (OSError("odd"), "odd"),
    ],
)
def test_anything_else_leaves_with_1(dense, tmp_path, monkeypatch, raised, sentence):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(conversion, "run", fail)
    assert error("convert", dense(), "-o", tmp_path / "out", code=1).startswith(sentence)


@pytest.mark.parametrize(
    "raised",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    ],
)
def test_too_little_memory_leaves_with_2(dense, tmp_path, monkeypatch, raised):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(conversion, "run", fail)
    sentence = error("convert", dense(), "-o", tmp_path / "out")
    assert sentence.startswith("out of memory: lower --seq-len")


def test_a_bug_of_ours_shows(dense, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(conversion, "run", fail)
    result = CliRunner().invoke(app, ["convert", str(dense()), "-o", str(tmp_path / "out")])
    assert str(result.exception) == "a bug"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--topk", "2"],
        ["--experts", "many"],
        ["--experts"],
        ["--experts", ""],
        ["--json=yes"],
        ["extra"],
        ["--set"],
    ],
)
def test_misspelt_options_leave_with_2(dense, arguments):
    result = run("plan", dense(), *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_misspelt_option_names_the_nearest(dense):
    assert "--top-k" in run("plan", dense(), "--topk", "2").stderr


def test_misspelt_command_leaves_with_2():
    assert run("convrt").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", "experts"],
        ["--set", "=3"],
        ["--set", "experts=[1"],
        ["--set", "experts=2024-13-45"],
        ["--set", "experts={a: 1}"],
        ["--set", "method=[drop]"],
        ["--set", "keep_dense={a: 1}"],
        ["--set", "name=[]"],
        ["--set", "departures=3"],
        ["--set", ".x=3"],
        ["--set", "split.=3"],
        ["--set", "calibration=null"],
        ["--recipe", ""],
        ["--recipe", "."],
        ["--calibration", ""],
        ["--calibration", "."],
        ["--device", "cuda:x"],
        ["--out", "/dev/null"],
        ["--out", "/dev/null/out"],
        ["--out", "/"],
        ["--revision", "v1"],
        ["--set", "max_shard_size=-5GB"],
        ["--keep-dense", "0-2"],
    ],
)
def test_bad_values_are_one_sentence(dense, arguments):
    assert error("plan", dense(), *arguments)


@pytest.mark.parametrize("model", ["", ".", "/", "~", "a/b/c", "https://hub/org/name", "a b", "é"])
def test_models_that_are_none_are_one_sentence(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in ("plan", "inspect"):
        assert error(command, model)


# --- precedence ------------------------------------------------------------------------------


def test_flag_over_recipe_over_default(dense, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("experts: 4\ntop_k: 1\nseq_len: 128\n")
    request = ["plan", dense(), "--recipe", recipe, "--experts", "12"]
    made = report(*request, env={"UPCYCLE_TOP_K": "3"})["recipe"]
    assert (made["experts"], made["top_k"], made["seq_len"]) == (12, 1, 128)
    assert made["calibration_tokens"] == Recipe().calibration_tokens
    assert made["name"] == "mine"


def test_set_replaces_any_setting(dense):
    sets = ["--set", "split.strength=0.5", "--set", "keep_dense=[0, 2]", "--set", "experts=4"]
    recipe = report("plan", dense(), "--experts", "8", "--top-k", "2", *sets)["recipe"]
    assert recipe["split"] == {"name": "predictability", "strength": 0.5}
    assert (recipe["keep_dense"], recipe["experts"]) == ([0, 2], 4)


def test_parameters_of_a_named_method(dense):
    method = ["--method", "drop", "--set", "method.ratio=0.25"]
    assert report("plan", dense(), *method)["recipe"]["method"] == {"name": "drop", "ratio": 0.25}


def test_underscores_in_options(dense):
    made = report("plan", dense(), "--top_k", "3", "--keep_dense", "1")
    assert (made["top_k"], made["dense_layers"]) == (3, [1])


SETS = {
    "convert": {
        "--granularity 8": "granularity=8",
        "--split=random": "split=random",
        "--shared_by rate": "shared_by=rate",
        "--no-sequential": "sequential=false",
        "--allow-frozen-router": "allow_frozen_router=true",
        "--max-shard-size 5GB": "max_shard_size=5GB",
    },
    "finetune": {
        "--micro-batch 2": "micro_batch=2",
        "--z-loss=0.001": "z_loss=0.001",
        "--dense-router-gradient": "dense_router_gradient=true",
        "--lora-alpha 32": "lora_alpha=32",
        "--tracker 'my board'": "tracker=my board",
    },
}
SETS["plan"] = SETS["convert"]


@pytest.mark.parametrize("command", SETS)
def test_setting_that_has_no_flag_can_be_given_as_one(command):
    kind = Training if command == "finetune" else Recipe
    for words, setting in SETS[command].items():
        first, *others = shlex.split(words)
        after = others[0] if others else "--json"
        assert as_set(first, after, kind.model_fields) == (setting, 1 + len(others))


def test_settings_given_as_flags_are_those_of_set(dense):
    made = report("plan", dense(), *shlex.split("--split=random --router normal --no-sequential"))
    sets = [word for text in SAME.split() for word in ("--set", text)]
    assert made == report("plan", dense(), *sets)
    assert made["recipe"]["split"] == {"name": "random"}
    assert made["recipe"]["sequential"] is False


SAME = "split=random router=normal sequential=false"


def test_setting_that_wants_a_value_says_so(dense):
    assert error("plan", dense(), "--router", "--json") == (
        "--router wants a value: --set router=…"
    )


def test_flag_that_no_setting_has_is_unknown():
    result = run("convert", "./none", "--lr", "1", "--", "--split")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "No such option: --lr" in result.stderr


def test_every_setting_of_a_recipe_can_be_set(dense):
    sets = "granularity=2 method=copy shared_by=rate router=normal split=random"
    sets = [word for text in sets.split() for word in ("--set", text)]
    made = report("plan", dense(), *sets, "--set", "max_shard_size=1MB")["recipe"]
    names = [made[field]["name"] for field in ("method", "shared_by", "router", "split")]
    assert names == ["copy", "rate", "normal", "random"]
    assert (made["granularity"], made["max_shard_size"]) == (2, 10**6)


@pytest.mark.parametrize("command", ["plan", "convert"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--experts", "16", "--shared-experts", "2"],
        ["--shared_experts=0"],
        ["--set", "shared_experts=2"],
    ],
)
def test_a_number_of_shared_experts_is_told_the_new_spelling(dense, tmp_path, command, flags):
    assert error(command, dense(), "-o", tmp_path / "out", *flags) == as_flags(SHARED_EXPERTS)
    assert list(tmp_path.iterdir()) == []


def test_what_a_token_uses_is_said_before_and_after(dense, tmp_path):
    words = "A token uses 50 % of each FFN: 2 of 6 experts, 12.5 % each and the 25 % that are"
    request = [dense(), "-o", tmp_path / "out", "--experts", "6", "--top-k", "2"]
    for arguments in (["plan", *request], ["convert", *request, *QUICK]):
        assert words in " ".join(run(*arguments).stdout.split())


def test_shared_is_a_share(dense):
    made = report("plan", dense(), "--experts", "12", "--shared", "0.5", "--top-k", "1")
    assert (made["experts"], made["expert_size"], made["shared_size"]) == (12, 8, 96)
    sentence = error("plan", dense(), "--shared", "2")
    assert sentence == "the request: shared=2.0: input should be less than or equal to 1"
    assert "leaves nothing to route" in error("plan", dense(), "--shared", "1")


def test_typo_in_a_recipe_names_the_nearest_setting(dense, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("expert: 4\n")
    sentence = error("plan", dense(), "--recipe", recipe)
    assert sentence.startswith(f"{recipe} has an unknown setting 'expert', did you mean 'experts'?")


# --- the other commands ----------------------------------------------------------------------


def test_inspect_a_dense_model(dense):
    facts = report("inspect", dense())
    assert (facts["kind"], facts["architecture"], facts["layers"]) == ("dense", "llama", 3)
    assert facts["params_total"] == sum(p.numel() for p in load(dense()).parameters())
    assert facts["params_ffn"] == 3 * 3 * 48 * 192
    assert facts["experts_possible"] == [2, 3, 4, 6, 8, 12, 24]
    assert {name for name, why in facts["targets"].items() if why == "ok"} == {
        "glm4_moe", "granitemoeshared", "mixtral", "qwen2_moe",
    }  # fmt: skip


def test_inspect_keeps_the_hubs_retries_to_itself(dense):
    hub_logging.set_verbosity_warning()
    report("inspect", dense())
    assert hub_logging.get_verbosity() == hub_logging.ERROR


@pytest.mark.parametrize("target", TARGETS)
def test_inspect_a_moe(dense, tmp_path, target):
    quick = {"split": "random", "calibration_tokens": 64, "seq_len": 64, "check": "none"}
    settings = PLAIN_SPLIT | quick | {"target": target}
    made = upcycle.convert(str(dense(TARGET_OF[target])), tmp_path / "moe", **settings).plan
    facts = report("inspect", tmp_path / "moe")
    assert (facts["kind"], facts["architecture"], facts["top_k"]) == ("moe", target, 2)
    assert (facts["experts"], facts["expert_size"]) == (8, made.design.geometry.expert_size)
    assert facts["params_total"] == made.params_total
    assert facts["params_active"] == made.params_active
    assert facts["made_from"] == os.path.relpath(made.source.label, tmp_path / "moe")
    shown = run("inspect", tmp_path / "moe")
    assert shown.exit_code == 0
    assert target in shown.stdout


@pytest.mark.parametrize("family", ["granitemoehybrid", "nemotron_h"])
def test_inspect_a_dense_model_of_a_class_that_may_have_experts(dense, family):
    facts = report("inspect", dense(family))
    assert (facts["kind"], facts["architecture"]) == ("dense", family)
    assert facts["intermediate_size"] == 192


def test_inspect_a_moe_whose_record_is_spoilt(dense, tmp_path):
    upcycle.convert(str(dense()), tmp_path / "moe", method="copy", check="none")
    (tmp_path / "moe" / "upcycle.json").write_text("{}")
    assert "upcycle.json is not what upcycle writes" in error("inspect", tmp_path / "moe")
    (tmp_path / "moe" / "upcycle.json").unlink()
    assert "made_from" not in report("inspect", tmp_path / "moe")


def test_inspect_for_people_names_divisors_and_targets(dense):
    shown = run("inspect", dense()).stdout
    assert re.search(r"--experts with --shared 0 +│ 2, 3, 4, 6, 8, 12, 24 ", shown)
    assert "mixtral" in shown


def test_recipes_are_listed(dense):
    listed = report("recipes")
    assert [recipe["name"] for recipe in listed["recipes"]] == list(shipped_recipes())
    measured = {row["name"]: row["measured"] for row in listed["recipes"] + listed["presets"]}
    assert measured["relufy"].startswith("from 342 to 4.70 times the dense perplexity")
    assert measured["emoe"] is measured["grin"] is None
    names = {*SPLITS, *SHARED, *ROUTERS, *FITS, *COMPENSATIONS, *PERTURBS, *GATES, *RESTS}
    names |= {*ROUTER_LOSSES, *GATINGS}
    assert {method["name"] for method in listed["methods"]} == names
    shown = run("recipes").stdout
    assert all(name in shown for name in shipped_recipes())


def test_recipe_is_printed_as_it_is_stored():
    path = shipped_recipes()["default"]
    assert run("recipes", "default").stdout == path.read_text()
    assert report("recipes", "default")["name"] == "default"


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_recipe_that_is_none(flags):
    assert error("recipes", "defalt", *flags).startswith(
        "unknown recipe 'defalt', did you mean 'default'?"
    )


def test_env_names_versions():
    versions = report("env")
    assert versions["upcycle"] == upcycle.__version__
    assert {"python", "torch", "transformers", "system", "gpus"} <= versions.keys()
    assert upcycle.__version__ in run("env").stdout
