"""Core: tensors, randomness, plug-ins and errors. It knows no checkpoint."""
