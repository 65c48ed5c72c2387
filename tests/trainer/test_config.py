"""Precision recipes: what they allow."""

import pytest

from foreshock.trainer.config import PrecisionConfig


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backend": "fp8"}, "allowed: bf16, emulated"),
        ({"scaling": "tensor"}, "rowwise, block128"),
        ({"attention": "fp4"}, "allowed: plain, fp8"),
        ({"stochastic_rounding": True}, "belong to nvfp4"),
    ],
)
def test_a_recipe_says_what_is_allowed(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrecisionConfig(**wrong)  # type: ignore[arg-type]
