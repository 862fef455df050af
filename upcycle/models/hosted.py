"""Which target a config is of; some have the model_type of the dense models that they host."""

from transformers import PreTrainedConfig

from upcycle.models.families import FAMILIES
from upcycle.models.targets import TARGETS, MoETarget


def target_of(config: PreTrainedConfig) -> MoETarget | None:
    """The target whose models have such a config; None for a dense model, or another MoE."""
    text = config.get_text_config()
    if text.model_type in FAMILIES and not FAMILIES[text.model_type].routed(text):
        return None
    types = {target.model_type or target.name: target for target in TARGETS.values()}
    return types.get(text.model_type)
