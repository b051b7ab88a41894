"""Benchmarks of the engine, and the plain PyTorch model they compare it with."""
