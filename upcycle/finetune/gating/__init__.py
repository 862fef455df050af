"""One file, one gating of training; one line here registers it."""

import upcycle.finetune.gating.expert_dropout
import upcycle.finetune.gating.noisy_top_k
import upcycle.finetune.gating.soft_to_hard
import upcycle.finetune.gating.sparse_mixer
from upcycle.finetune.gating.base import GATINGS

__all__ = ["GATINGS"]
