"""What surrounds a model: process groups, generation, checkpoints, benchmarks, tests."""
