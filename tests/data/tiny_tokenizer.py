"""A folder with a tokenizer.json small enough to know by heart: pairs merged, every other byte on its own."""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

MERGES = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("e", "r"), ("o", "u"), ("é", "▁t")]
LETTERS = "▁abcdefghijklmnopqrstuvwxyz0123456789.é"
SPECIAL = ["<unk>", "<s>", "</s>"]
GENERATION = {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2}


def fallback() -> tokenizers.Tokenizer:
    """Of the kind that writes a space as ▁ and an unknown character as its bytes."""
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, *(a + b for a, b in MERGES)]
    model = models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=MERGES,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def byte_level() -> tokenizers.Tokenizer:
    """Of the kind whose letters are bytes, with text brought to NFC first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), (")", "Ċ"), (")", "Ġ"), ("ð", "Ł")]
    names = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    made = tokenizers.Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


KINDS = {"fallback": fallback, "byte level": byte_level}


def folder(path: pathlib.Path, kind: str = "fallback") -> pathlib.Path:
    """The files as they are published."""
    path.mkdir(parents=True)
    KINDS[kind]().save(str(path / "tokenizer.json"))
    (path / "generation_config.json").write_text(json.dumps(GENERATION))
    return path
