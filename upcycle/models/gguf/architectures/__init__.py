"""One file, one architecture of GGUF files; one line here registers it.

Read in llama.cpp's conversion scripts of November 2026, with whose files this was compared.
"""

import upcycle.models.gguf.architectures.arcee
import upcycle.models.gguf.architectures.ernie4_5
import upcycle.models.gguf.architectures.gemma
import upcycle.models.gguf.architectures.gemma4
import upcycle.models.gguf.architectures.granite
import upcycle.models.gguf.architectures.granitehybrid
import upcycle.models.gguf.architectures.lfm2
import upcycle.models.gguf.architectures.llama
import upcycle.models.gguf.architectures.mistral3
import upcycle.models.gguf.architectures.nemotron_h
import upcycle.models.gguf.architectures.olmo2
import upcycle.models.gguf.architectures.phi3
import upcycle.models.gguf.architectures.qwen2
import upcycle.models.gguf.architectures.qwen3
import upcycle.models.gguf.architectures.qwen35
import upcycle.models.gguf.architectures.seed_oss
import upcycle.models.gguf.architectures.smollm3
from upcycle.models.gguf.architectures.base import STORED, Stored

__all__ = ["STORED", "Stored"]
