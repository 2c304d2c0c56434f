"""Engines on other libraries: diffusers pipelines, transformers models, vLLM, and models composed of two."""
