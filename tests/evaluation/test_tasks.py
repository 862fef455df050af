"""Tasks go to lm-eval, and its numbers come back.

lm-eval is not installed here, and the data of its tasks are on a hub that tests can't reach, so a
fake module stands in for it; a run of the real one (0.4.13) on a task file gave what the fake does.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from upcycle import UpcycleError
from upcycle.evaluation.tasks import open_tasks, run_tasks

RESULTS = {
    "moe": {"toy": {"alias": "toy", "acc,none": 0.25, "acc_stderr,none": "N/A"}},
    "dense": {
        "toy": {"alias": "toy", "acc,none": 0.5, "acc_stderr,none": "N/A"},
        "other": {"exact_match,strict": 1},
    },
}


@pytest.fixture
def lm_eval(monkeypatch):
    """A fake lm-eval, and what its `simple_evaluate` was called with."""
    calls = []

    def simple_evaluate(**settings):
        sys.stdout.write("lm-eval prints to stdout")
        calls.append(settings)
        folder = settings["model_args"]["pretrained"]
        if folder == "broken":
            raise ValueError("no such\nmodel")
        return {"results": RESULTS[folder]}

    def get_task_dict(names, manager):
        if "offline" in names:
            raise ConnectionError("the hub is far away")

    known = SimpleNamespace(all_tasks=["toy", "offline", "hellaswag", "arc_easy"])
    fake, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    fake.simple_evaluate, fake.tasks = simple_evaluate, tasks
    tasks.TaskManager, tasks.get_task_dict = lambda: known, get_task_dict
    monkeypatch.setitem(sys.modules, "lm_eval", fake)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return calls


HOW = {"dtype": "float32", "device": "cpu", "batch_size": 4}


def test_scores_of_both_models_stand_side_by_side(lm_eval, capsys):
    scores = run_tasks(open_tasks(["toy"]), "moe", "dense", **HOW)
    assert scores == {"toy": {"acc": (0.25, 0.5)}}
    assert [call["model_args"]["pretrained"] for call in lm_eval] == ["moe", "dense"]
    assert all(call["tasks"] == ["toy"] and call["model"] == "hf" for call in lm_eval)
    assert all(call["batch_size"] == 4 and call["device"] == "cpu" for call in lm_eval)
    assert capsys.readouterr().out == ""


def test_scores_alone(lm_eval):
    scores = run_tasks(open_tasks(["toy"]), "dense", None, **HOW)
    assert scores == {"toy": {"acc": (0.5, None)}, "other": {"exact_match,strict": (1, None)}}
    assert len(lm_eval) == 1


def test_a_task_may_be_a_file(lm_eval, tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine")
    assert open_tasks([str(tmp_path / "mine.yaml")]).names == [str(tmp_path / "mine.yaml")]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["arc_eazy"], "`tasks='arc_eazy'` is no task of lm-eval, did you mean arc_easy[?]"),
        (["zzz"], "`tasks='zzz'` is no task of lm-eval: see `lm-eval ls tasks`"),
        (["offline"], "`tasks=offline` can't be loaded .*: the hub is far away"),
    ],
)
def test_task_that_can_not_be_had(lm_eval, names, words):
    with pytest.raises(UpcycleError, match=words):
        open_tasks(names)


def test_task_that_fails(lm_eval):
    with pytest.raises(UpcycleError, match=r"`tasks=toy`: lm-eval fails on broken: no such$"):
        run_tasks(open_tasks(["toy"]), "broken", None, **HOW)


def test_lm_eval_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UpcycleError, match=r"`tasks` needs `pip install upcycle\[eval\]`"):
        open_tasks(["toy"])
