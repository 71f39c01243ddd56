"""Token streams that resume exactly and split over processes."""

from jaxsys.data.stream import TokenStream, train_valid_split
from jaxsys.data.text import python_docs, read_text
from jaxsys.data.tokens import BpeTokenizer, ByteTokenizer, Tokenizer, train_bpe

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "TokenStream",
    "Tokenizer",
    "python_docs",
    "read_text",
    "train_bpe",
    "train_valid_split",
]
