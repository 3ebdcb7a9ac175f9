"""loraloom: train LoRA-family adapters that come apart and go together well, and take them apart and put them together."""

__version__ = "0.1.0"
