"""The shipped demo model: where its files lie.

The tasks it works on are in `tasks`, its tokenizer and chat template in `tokenizer`, and how it was made in
`train`. Importing this package loads neither torch nor transformers.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
"""The model directory: config.json, model.safetensors and tokenizer files, as Hugging Face's loaders read."""

__all__ = ["MODEL_DIR"]
