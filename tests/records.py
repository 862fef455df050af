"""Parts of upcycle.json as plain values, spelt out: what was written once must stay readable."""


def plan(**changed):
    """Of a split of three layers, the first of which stayed dense."""
    return {
        "source": "dense",
        "family": "llama",
        "target": "mixtral",
        "targets": {"mixtral": "ok"},
        "runtimes": {"vLLM": "ok", "MLX": "every layer must have experts"},
        "method": "split",
        "layers": 3,
        "dense_layers": [0],
        "hidden_size": 48,
        "intermediate_size": 232,
        "experts": 8,
        "top_k": 2,
        "granularity": 1,
        "expert_size": 24,
        "shared_size": 40,
        "active_ffn_ratio": 0.375,
        "params_dense": 1000,
        "params_total": 1000,
        "params_active": 600,
        "bytes": 4000,
        "dtype": "float32",
        "device": "cpu",
        "peak_memory_estimate": 10000,
        "check_memory_estimate": 8000,
        "gradient_bytes": 0,
        "calibration_tokens": 512,
        "check_tokens": 1024,
        "feedback": 0.0,
        "warnings": ["24 neurons are few"],
        "recipe": {
            "name": "moefication",
            "paper": "arXiv:2110.01786",
            "method": {"name": "split"},
            "split": {"name": "coactivation"},
            "shared_by": {"name": "energy"},
            "router": {"name": "ridge"},
            "compensate": {"name": "least_squares"},
            "sequential": True,
            "shared": None,
            "calibration": "/home/me/notes.txt+builtin",
        },
    } | changed


def training_run(data, **changed):
    """A run on this text."""
    measured = {"loss": 2.3, "perplexity": 10.0, "perplexity_ratio": 1.1, "kl": 0.1}
    return {
        "model": "moe",
        "out": "healed",
        "settings": {"name": "heal", "data": data, "teacher": "dense"},
        "groups": {"experts": {"parameters": 900, "trained": 900}},
        "used": [{"text": "more.txt", "tokens": 4096, "held_out": 512, "total": None}],
        "before": measured,
        "after": measured,
        "step": 180,
        "steps": 200,
        "tokens": 409600,
        "seconds": 125.0,
        "processes": 1,
        "reload_error": 1e-6,
        "upcycle": "0.1.0",
        "check_before": None,
    } | changed


def findings(**changed):
    """Of a merge of two models with a text each."""
    return {
        "distances": {
            "sources": [
                {"model": "org/coder", "ffn": 0.03, "rest": 0.012},
                {"model": "writer", "ffn": 1.25, "rest": 0.0},
            ],
            "between": [[0.0, 1.26], [1.26, 0.0]],
        },
        "gates": [
            {"layer": 0, "condition": 1.5, "alike": []},
            {"layer": 1, "condition": "Infinity", "alike": [[0, 1]]},
            {"layer": 2, "condition": 4.0, "alike": []},
        ],
        "perplexities": {
            "texts": ["code.txt", "notes.txt", "mixed"],
            "tokens": [1024, 1024, 1024],
            "models": [
                {"model": "this merge", "perplexity": [3.25, 11.5, 6.125]},
                {"model": "org/dense", "perplexity": [4.0, 14.0, 7.5]},
                {"model": "mean of the sources", "perplexity": [3.5, 12.0, "Infinity"]},
            ],
            "left_out": [],
        },
        "notes": ["writer is far away"],
    } | changed
