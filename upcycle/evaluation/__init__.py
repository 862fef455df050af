"""Evaluation: how good a model is, how fast, and what it is made of."""
