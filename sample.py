"""Generates text from a run folder: `python sample.py runs/NAME/RUN_ID --prompt "def "`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from convert.gains import fold_gains
from core.lora import merge
from core.saved import latest
from core.weights import load_weights
from core.yaml_files import ConfigError
from engine.corpus import Tokenizer, load_tokenizer
from engine.device import pick
from lab.listing import load_run
from model import GPT, assemble, fill
from train_args import with_vocabulary
from variations.cache import Cache

WRONG = 2


def load(folder: Path, device: torch.device, plugins: bool) -> tuple[GPT, Tokenizer]:
    """The model of a run at its newest checkpoint, and the tokenizer of its data. Raises ConfigError where either is missing."""
    if not (folder / "config.yaml").is_file() and (inner := sorted(folder.glob("*/config.yaml"))):
        raise ConfigError(f"{folder} is a sweep; name one of its runs, for example {inner[0].parent}.")
    config, corpus = load_run(folder, plugins=plugins)
    saved = latest(folder / "checkpoint", ["model"])
    if saved is None:
        raise ConfigError(f"{folder} has no checkpoint that can be read.")
    separate = replace(
        with_vocabulary(config, corpus.meta.vocab_size).model, stack_layers=False
    )  # the files are the same
    model, rows = assemble(separate, config.slices, config.optimizer)
    fill(model, rows, 0, device)
    load_weights(model, saved.model())
    merge(model)  # adapters then cost nothing
    return model.eval(), load_tokenizer(corpus.folder)


@torch.no_grad()
def generate(
    model: GPT,
    tokens: Tensor,
    count: int,
    *,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
    vocabulary: int | None = None,
) -> Iterator[int]:
    """Continues `tokens` int64 [1, T] by `count` tokens, one at a time, each seen by the next.

    The context is the last block_size tokens. While all of them fit, earlier ones are remembered and not computed again; after
    that the window slides and every position changes, so it is computed anew, as where positions depend on the text's length.
    Temperature 0 takes the likeliest token. vocabulary: only tokens below it are taken; a model may have more than its tokenizer.
    """
    block, cache = model.config.block_size, Cache()
    fresh = tokens[:, -block:]
    for _ in range(count):
        if not model.continues(cache.offset, fresh.shape[1]):
            cache, fresh = Cache(), tokens[:, -block:]
        logits = model(fresh, cache=cache)[0][:, -1].float()[:, :vocabulary]
        if temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k is not None:
                limit = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < limit, float("-inf"))
            chosen = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).to(tokens.device)
        tokens, fresh = torch.cat((tokens, chosen), 1), chosen
        yield int(chosen)


def first_tokens(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """The prompt as int64 [1, T]; without one a line break, or token 0. Raises ConfigError for characters nobody trained on."""
    if unknown := tokenizer.unknown(prompt):
        shown = ", ".join(repr(c) for c in unknown[:20])
        raise ConfigError(f"--prompt: the tokenizer of this run's data has no {shown}.")
    text = prompt or ("\n" if not tokenizer.unknown("\n") else "")
    ids = [int(i) for i in tokenizer.encode(text)] if text else [0]
    return torch.tensor([ids], dtype=torch.int64)


def main(words: list[str]) -> int:
    """Returns the exit code: 0, or 2 where the run or the prompt cannot be used."""
    parser = argparse.ArgumentParser(prog="python sample.py", description="Generates text from a run folder.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run folder, runs/NAME/RUN_ID")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokens", type=int, default=300, help="how many tokens to add")
    parser.add_argument("--samples", type=int, default=1, help="how many continuations")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=None, help="choose among the k likeliest")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--fold-gains", action="store_true", help="fold the norms' gains into the linears behind them first"
    )
    parser.add_argument("--plugins", action="store_true", help="allow the run's own Python files to be executed")
    given = parser.parse_args(words)
    try:
        if given.temperature < 0 or given.tokens < 0 or (given.top_k is not None and given.top_k < 1):
            raise ConfigError("--temperature and --tokens are 0 or above, --top-k is 1 or above.")
        device = pick(given.device)
        model, tokenizer = load(given.folder, device, given.plugins)
        start = first_tokens(tokenizer, given.prompt).to(device)
        if given.fold_gains:
            fold_gains(model)
    except ValueError as error:
        print(error, file=sys.stderr)
        return WRONG
    generator = torch.Generator().manual_seed(given.seed)
    for number in range(given.samples):
        ids = [*start[0].tolist()] if given.prompt else []
        more = generate(
            model,
            start,
            given.tokens,
            temperature=given.temperature,
            top_k=given.top_k,
            generator=generator,
            vocabulary=tokenizer.vocab_size,
        )
        print(tokenizer.decode([*ids, *more]) + ("\n---" if number + 1 < given.samples else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
