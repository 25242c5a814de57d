"""The word-level tokenizer of the bundled models.

Words and punctuation marks are tokens; spaces separate and are no part of them, so ``"Fact: the"`` and ``"Fact : the"``
are the same tokens. The beginning-of-sequence token has a non-zero id, because some tools treat id 0 as padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<bos>", "<eos>"
SPECIAL_TOKENS = (PAD, UNKNOWN, BOS, EOS)
PAD_ID, UNKNOWN_ID, BOS_ID, EOS_ID = range(4)
WORD_PATTERN = r"\w+|[^\w\s]"


def build_vocabulary(words: Sequence[str]) -> list[str]:
    """Special tokens first, then the words; a token's place is its id."""
    return [*SPECIAL_TOKENS, *words]


def build_tokenizer(vocabulary: Sequence[str], name: str) -> PreTrainedTokenizerFast:
    """A tokenizer that works without files and without a network.

    ``name`` is what the tokenizer calls itself (``name_or_path``). BOS is put first by the tokenizer itself, also
    when it is asked by ``add_special_tokens``. Spaces between the words of a decoded text are restored plainly.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        name_or_path=name,
        add_bos_token=True,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
