"""GGUF files as llama.cpp's converter makes them of dense models."""
