"""The fixtures of the data tests: the doctor looks at the same records."""

from tests.unit.data.conftest import image_token_id, picture, tokenizer

__all__ = ["image_token_id", "picture", "tokenizer"]
