"""Benchmarks of stepladder, installed as stepladder.bench."""
