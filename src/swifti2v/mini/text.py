"""The text side of `mini`: a byte-level BPE tokenizer and a small UMT5, of the classes that the full system uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

if TYPE_CHECKING:
    from collections.abc import Iterable


def train_tokenizer(corpus: Iterable[str], *, vocabulary_size: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-pair encoding over bytes, so that no prompt has an unknown character; T5's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")  # noqa: S106 - names of tokens


def make_text_encoder(*, vocabulary_size: int, width: int = 96, num_layers: int = 2, seed: int = 0) -> UMT5EncoderModel:
    """Make a UMT5 encoder of random weights; trained together with Stage I."""
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=vocabulary_size,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=num_layers,
        num_heads=4,
        relative_attention_num_buckets=16,
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config)


def encoded(
    tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, prompts: list[str], *, max_sequence_length: int
) -> torch.Tensor:
    """Return embeddings [B,L,D] of prompts, L that of the longest of them, zero beyond each one's own length."""
    tokens = tokenizer(prompts, padding=True, max_length=max_sequence_length, truncation=True, return_tensors="pt")
    embeddings = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return embeddings * tokens.attention_mask.unsqueeze(-1).to(embeddings.dtype)
