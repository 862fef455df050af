"""A config.json that is none, or of no model that can be read."""

import pytest
from spoiled import assert_refused, edit_config


def test_empty_folder(tmp_path):
    (tmp_path / "model").mkdir()
    assert_refused(tmp_path / "model", "holds no config.json, so it is not a model folder")


def test_folder_of_an_adapter(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    assert_refused(tmp_path / "model", "holds a low-rank adapter, no model")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"model_type": ', "config.json is not JSON"),
        (b"\xff\xfe", "config.json is not JSON"),
        (b"[]", "config.json is not a JSON object"),
        (b"{}", "config.json has no model_type"),
        (b'{"model_type": "bogus"}', "not a config that transformers reads"),
    ],
)
def test_config_that_is_none(copy, content, words):
    folder = copy()
    (folder / "config.json").write_bytes(content)
    assert_refused(folder, words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 5}, "attention heads (5)"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"dtype": "bogus"}, "bogus"),
        ({"hidden_act": "bogus"}, "bogus"),
        ({"vocab_size": -3}, "-3"),
        ({"pad_token_id": 272}, "can't build a model from config.json: Padding_idx"),
        ({"pad_token_id": -273}, "pad_token_id=-273"),
        ({"rope_parameters": {"rope_type": "bogus"}}, "bogus"),
        ({"model_type": "mixtral"}, "is a Mixture-of-Experts already"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config of gptq"),
    ],
)
def test_config_with_a_bad_field(copy, fields, words):
    folder = copy()
    edit_config(folder, **fields)
    assert_refused(folder, words)
