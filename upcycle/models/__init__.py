"""Models: dense checkpoints read, Mixture-of-Experts checkpoints written, and text for both."""
