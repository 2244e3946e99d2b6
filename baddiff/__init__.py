"""baddiff: see, try and defend against backdoors in diffusion models (BadDiffusion, CVPR 2023, arXiv 2212.05400)."""

__version__ = "0.1.0"


class BadInput(ValueError):
    """Something a person gave us cannot be used; the message is one sentence that says what to do instead."""
