"""Reads the comments that stand beside code."""

import io
import tokenize


def by_line(source: str) -> dict[int, str]:
    """The comments of Python source, without their mark, by line number from 1."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens
            if token.type == tokenize.COMMENT}
