"""The conversion, from a request to a checkpoint that is whole or absent."""
