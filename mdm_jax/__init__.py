"""Masked diffusion language models in JAX: train, measure and sample."""

__version__ = "0.1.0"
