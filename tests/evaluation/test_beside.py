"""The table of perplexities against transformers' own loss, window by window."""

import math

import pytest
import torch
from reference import load

from upcycle.evaluation.beside import MEAN, perplexities
from upcycle.models.opening import open_source

CPU = torch.device("cpu")
WINDOWS = {
    name: torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(seed))
    for seed, name in enumerate(("code", "prose"))
}


def fine_tune(folder, seed, out):
    """The folder's model with all weights moved."""
    model, rng = load(folder), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)
    model.save_pretrained(out)
    return out


def perplexity(model, tokens_BL):
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in tokens_BL]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_every_model_and_the_mean_of_the_sources_on_every_text(dense, tmp_path, fields):
    base = dense(**fields)
    folders = {"base": base} | {
        name: fine_tune(base, seed, tmp_path / name) for seed, name in enumerate(("m1", "m2"))
    }
    mean = load(base)
    states = [load(folders[name]).state_dict() for name in ("m1", "m2")]
    mean.load_state_dict({key: sum(s[key] for s in states) / 2 for key in states[0]})
    opened = {name: open_source(str(folder)) for name, folder in folders.items()}
    mine = {name: opened[name] for name in ("m1", "m2")}
    steps = []
    table = list(
        perplexities(
            opened["base"], mine, list(mine.values()), WINDOWS, torch.float32, CPU, steps.append
        )
    )
    assert [row.model for row in table] == ["m1", "m2", MEAN]
    assert len(steps) == 3 * sum(map(len, WINDOWS.values()))
    models = {name: load(folder) for name, folder in folders.items()} | {MEAN: mean}
    for row in table:
        for text, tokens_BL in WINDOWS.items():
            expected = perplexity(models[row.model], tokens_BL)
            assert row.texts[text] == pytest.approx(expected, rel=1e-4)
    assert len({round(p, 2) for row in table for p in row.texts.values()}) == 2 * len(table)


def test_a_source_of_another_vocabulary_is_measured_with_the_bases(dense, tmp_path):
    """It may have appended tokens, or lack those that the base has."""
    base, more = dense(), fine_tune(dense(), 0, tmp_path / "more")
    expected = perplexity(load(more), WINDOWS["code"])
    model = load(more)
    model.resize_token_embeddings(300)
    model.save_pretrained(more)
    opened = {"more": open_source(str(more))}
    (row,) = perplexities(open_source(str(base)), opened, [], WINDOWS, torch.float32, CPU)
    # The softmax runs over the base's rows, of which no text holds the last.
    assert row.texts["code"] == pytest.approx(expected, rel=1e-4)


def test_without_sources_there_is_no_mean(dense):
    base = open_source(str(dense()))
    assert list(perplexities(base, {}, [], WINDOWS, torch.float32, CPU)) == []
