"""A foreign config.json, read key by key: what is not understood, or is not there in our models, is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keys about the library, the tokens of its texts, and how training begins: no part of what a model computes.
HARMLESS = {
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id"),
    *(
        "initializer_range",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "task_specific_params",
        "name_or_path",
    ),
    *("output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate", "auto_map"),
    *("_attn_implementation_autoset", "attn_implementation", "_attn_implementation", "_experts_implementation"),
    *(
        "quantization_config",  # of how weights are stored
        "chunk_size_feed_forward",
        "tokenizer_class",
        "prefix",
        "finetuning_task",
        "gradient_checkpointing",
        "is_decoder",
    ),
}


class Keys:
    """The keys of a configuration. What is asked for is read; `finish` raises ValueError with every mistake and every key left."""

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self.config, self.family = config, family
        self.used: set[str] = set()
        self.wrong: list[str] = []

    def take(self, name: str, default: Any) -> Any:
        """A key's value; the default where it is left out or null. A value of another type than the default's is a mistake."""
        self.used.add(name)
        value = self.config.get(name)
        if value is None:
            return default
        number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
        if default is not None and type(value) is not type(default) and not number:
            self.wrong.append(f"{name} is {value!r}, and something like {default!r} is expected.")
            return default
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number from 1 on. Without a default it must be there."""
        self.used.add(name)
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            told = "missing" if value is None else repr(value)
            self.wrong.append(f"{name} is {told}, and a whole number from 1 on is expected.")
            return 1
        return value

    def choice(self, name: str, default: str, known: Mapping[str, str]) -> str:
        """What a word of theirs is called here."""
        value = self.take(name, default)
        if value not in known:
            self.wrong.append(f"{name} is '{value}', and our models have {', '.join(sorted(known))}.")
            return next(iter(known.values()))
        return known[value]

    def only(self, name: str, *allowed: Any, why: str = "") -> None:
        """A key that our models have one value for (the first is what it is where it is left out)."""
        self.used.add(name)
        value = self.config.get(name)
        if value is not None and value not in allowed:
            told = " or ".join(repr(x) for x in allowed if x is not None) or "none of it"
            self.wrong.append(f"{name} is {value!r}, and our models have {told}{': ' + why if why else ''}.")

    def finish(self) -> None:
        """Raises ValueError with all that was wrong, and what nobody asked for."""
        for name, value in self.config.items():
            if name not in self.used and name not in HARMLESS and value not in (None, False, [], {}, ""):
                self.wrong.append(f"{name} is {_short(value)}, and this key of '{self.family}' is not known here.")
        if self.wrong:
            raise ValueError("\n".join(self.wrong))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
