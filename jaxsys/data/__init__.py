"""Token streams that resume exactly and split over processes."""

from jaxsys.data.instructions import (
    Encoded,
    Example,
    InstructionStream,
    encode_example,
    read_instructions,
)
from jaxsys.data.stream import TokenStream, train_valid_split
from jaxsys.data.text import python_docs, read_text
from jaxsys.data.tokenizer import LMTokenizer, load_tokenizer, save_tokenizer
from jaxsys.data.tokens import BpeTokenizer, ByteTokenizer, Tokenizer, train_bpe

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "Encoded",
    "Example",
    "InstructionStream",
    "LMTokenizer",
    "TokenStream",
    "Tokenizer",
    "encode_example",
    "load_tokenizer",
    "python_docs",
    "read_instructions",
    "read_text",
    "save_tokenizer",
    "train_bpe",
    "train_valid_split",
]
