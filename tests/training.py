"""Short runs of `finetune`, and what they validate on."""

from upcycle.finetune.data import training_data

VOCABULARY = 272
SHORT = {
    "preset": "specialise", "steps": 4, "seq_len": 32, "batch_size": 4, "micro_batch": 2,
    "validation_tokens": 64, "lr": 3e-3,
}  # fmt: skip


def held_out(folder, data, **settings):
    """The held-out text of a run of `SHORT`, with some of its settings replaced."""
    short = SHORT | settings
    _, held = training_data(
        folder, VOCABULARY, str(data), seq_len=short["seq_len"],
        train_tokens=short["steps"] * short["seq_len"] * short["batch_size"],
        validation_tokens=short["validation_tokens"], seed=0,
    )  # fmt: skip
    return held
