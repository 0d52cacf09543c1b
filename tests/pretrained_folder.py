"""A small encoder in a folder, as pretrained models are saved."""

from collections.abc import Iterable
from pathlib import Path

from fedloom.random import seeded


def save_encoder(path: Path, words: Iterable[str]) -> None:
    """Writes an encoder of two layers, with a tokenizer that knows these words beside `my` and `the`."""
    import transformers

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "my", "the", *words]
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    with seeded(0, "test", "bert"):
        transformers.BertModel(config).save_pretrained(path)
