"""Make the tokenizer: a byte-level BPE whose whole words are those of the captions.

QwenImagePipeline drops the first 34 text states, the template's prefix in Qwen's own vocabulary; the prefix has to be
34 tokens here too, so its words are made common enough to become one token each.
"""

import argparse
import json
import random
import re
from pathlib import Path

import emoji_data
from emoji_data import COLORS, Emoji
from lean_forward import PREFIX_TOKENS, TEMPLATE
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

END, PADDING = "<|im_end|>", "<|endoftext|>"
OTHER_SPECIAL = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE_REPEATS = 2000


def make_corpus(emoji: list[Emoji]) -> list[str]:
    """Return the template, the names and some captions; a prompt's first word has a line break before it, no space."""
    rng = random.Random(0)
    pieces = [piece for piece in re.split(r"<\|[a-z_]+\|>", TEMPLATE.replace("{}", "")) if piece]
    corpus = pieces * TEMPLATE_REPEATS
    for entry in emoji:
        for name in (entry.name, *entry.aliases):
            corpus += [f"user\n{name}", f"user\na {name}"] * 4
        corpus += [f"user\n{emoji_data.draw_caption(entry, color, rng)}" for color in COLORS]
    return corpus


def train_bpe(corpus: list[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a vocabulary of at most this size and its merges, splitting text as Qwen's tokenizer does."""
    bpe = Tokenizer(BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus, BpeTrainer(vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def make_tokenizer(emoji: list[Emoji], size: int, folder: Path) -> None:
    """Train the tokenizer, check the prefix's length and write the folder."""
    vocab, merges = train_bpe(make_corpus(emoji), size - len(OTHER_SPECIAL) - 2)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, additional_special_tokens=OTHER_SPECIAL, eos_token=END, pad_token=PADDING
    )
    tokenizer.model_max_length = 2048
    tokenizer.padding_side = "right"
    length = len(tokenizer(TEMPLATE.split("{}")[0]).input_ids)
    if length != PREFIX_TOKENS:
        raise RuntimeError(f"the template's prefix is {length} tokens, not {PREFIX_TOKENS}; try another --size")
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")


def main() -> None:
    """Read the command line and make the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("output", type=Path, help="base folder; the tokenizer goes to its subfolder tokenizer/")
    parser.add_argument("--cache", type=Path, default=emoji_data.DEFAULT_CACHE, help="folder for the fetched packages")
    parser.add_argument("--size", type=int, default=3000, help="most tokens in the vocabulary")
    args = parser.parse_args()
    make_tokenizer(emoji_data.load_emoji(args.cache), args.size, args.output / "tokenizer")


if __name__ == "__main__":
    main()
