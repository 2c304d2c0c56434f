"""The local engine: requests, the scheduler that generates them together, scores, inpainting."""
