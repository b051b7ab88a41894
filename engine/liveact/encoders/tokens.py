"""The tokenizer of the prompt encoder: `tokenizer.json` in the directory of the release."""

from __future__ import annotations

import threading
from pathlib import Path

from tokenizers import Tokenizer

from liveact import _core
from liveact.errors import InputError
from liveact.files import one_line, read_json, require_file

TOKENIZER_FILE = "tokenizer.json"


def check_tokenizer(directory: Path) -> Path:
    """The tokenizer's file in `directory`, which must be whole; what is in it is seen when it is
    read, which takes seconds for 256 thousand tokens. Raises InputError."""
    path = require_file(directory / TOKENIZER_FILE)
    if form := _core.other_form(path, "json"):
        raise InputError(f"{path}: expected a tokenizer, found {form}")
    if "model" not in (found := read_json(path)):
        raise InputError(f"{path}: expected a tokenizer with a model, found {[*found]!r:.80}")
    return path


class PromptTokenizer:
    """Text → token ids. Any thread."""

    def __init__(self, path: Path, vocabulary: int) -> None:
        """Reads a file that may know at most `vocabulary` tokens. Raises InputError."""
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # of the Rust library, which has no class of its own
            message = f"{path}: expected a tokenizer, found {one_line(error)}"
            raise InputError(message) from error
        self._tokenizer.no_padding()
        # Truncation is set on the tokenizer itself, so its calls exclude each other.
        self._lock = threading.Lock()
        known = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if known > vocabulary:
            raise InputError(
                f"{path}: expected at most the {vocabulary} tokens of the text encoder, "
                f"found {known}"
            )

    def encode(self, text: str, at_most: int) -> tuple[list[int], int]:
        """The ids of a text, what the tokenizer ends it with included, cut to `at_most`; and how
        many they were."""
        with self._lock:
            self._tokenizer.no_truncation()
            ids: list[int] = self._tokenizer.encode(text).ids
            found = len(ids)
            if found > at_most:
                self._tokenizer.enable_truncation(at_most)
                ids = self._tokenizer.encode(text).ids
        return ids, found
