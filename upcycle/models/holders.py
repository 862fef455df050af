"""Models of several parts whose class makes its text model of that one's config, whatever kind it
is of: an MoE takes the dense one's place, and all around it stays what it was."""

from collections.abc import Mapping

WRAPPED = {
    "vision_tower.vision_model.": "vision_tower.",  # as CLIP and SigLIP were stored once
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
}
"""What names begin with in checkpoints, with what transformers puts in its place."""
HOLDERS: Mapping[str, Mapping[str, str]] = {
    "idefics3": {},
    "internvl": WRAPPED,
    "llava": WRAPPED,
    "llava_next": WRAPPED,
    "mistral3": WRAPPED,
    "smolvlm": {},
}
"""By their model_type."""


def stored_name(model_type: str, name: str) -> str:
    """What a tensor of such a model is called in checkpoints; of any other, its name."""
    for stored, plain in HOLDERS.get(model_type, {}).items():
        if name.startswith(plain):
            return stored + name.removeprefix(plain)
    return name
