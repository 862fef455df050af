"""Arcee (AFM): llama with an FFN of squared relu, and no gate.

A class with gates computes it where both are the same matrix and the activation is relu:
relu(z) z = relu(z)². That matrix is then stored twice, so that a neuron costs 3/2 of what it did in
parameters and work, and training may tell the two apart.
"""

from upcycle.models.families.base import FAMILIES, DenseFamily
from upcycle.models.traits import Trait

FAMILIES.add("arcee", DenseFamily("arcee", always={Trait.UNGATED: "arcee has none"}))
