"""What upcycle leaves beside a model's weights: one schema, by which it is written and read."""
