"""tokenworks: token-level methods for language models, tested, measured and traced."""

__version__ = "0.1.0"
