"""GPT: an embedding, blocks of a mixer and an MLP, a norm and a head, each a variation that the configuration names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.lora import attach, begin, plan
from core.options import Catalogue, Invalid, Variant, plain
from core.resolve import Resolver
from core.rules import Row, RuleMistakes, SliceRule
from core.slices import draw, initialise, materialise, slices
from core.stack import Stack
from gpt_conf import ModelConfig
from variations import CATALOGUE
from variations.cache import Cache
from variations.dropout import Dropout
from variations.linear.standard import Linear
from variations.scale import Scale, SoftCap
from variations.site import Site


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with no second norm where the MLP is none. Shapes: [B, T, C] -> the same."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        width = site.config.n_embd
        self.ln_1 = site.make("norm", "ln_1", width=width)
        self.attn = site.make("attention", "attn")
        mlp, _ = site.at("mlp").find("mlp")
        self.ln_2 = nn.Identity() if getattr(mlp, "absent", False) else site.make("norm", "ln_2", width=width)
        self.mlp = site.make("mlp", "mlp")

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only language model. Parameters have no memory until `core.slices.materialise`; `build` does it all.

    Raises Invalid for combinations that make no sense (a width that does not fit, tying two different weights, a site that
    matches nothing), with the option that says so.
    """

    wpe: Any
    h: nn.ModuleList

    def __init__(self, config: ModelConfig, catalogue: Catalogue = CATALOGUE) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the data's vocabulary is filled in before a model is made"
        self.config = config
        site = Site(config, catalogue)
        self.wte = site.make("embedding", "wte", rows=config.vocab_size, width=config.n_embd)
        position, _ = site.at("wpe").find("position")
        self.wpe = site.make("position", "wpe", width=config.n_embd) if position.embeds else None
        self.wte_scale = Scale(config.embedding_factor)
        self.drop = Dropout(config.dropout, "wte")
        self.h = nn.ModuleList(Block(site.at(f"h.{i}")) for i in range(config.n_layer))
        self.ln_f = site.make("norm", "ln_f", width=config.n_embd)
        shape = {"in_features": config.n_embd, "out_features": config.vocab_size, "bias": False, "role": "embedding"}
        self.head = site.make("head", "head", fallback="linear", **shape)
        self.head_cap = SoftCap(config.logit_softcap)
        if config.tie_weights:
            self.tie(site)
        if unused := site.unused():
            raise Invalid(*unused)
        self.switches = {n for m in self.modules() if (n := getattr(m, "switch", None)) is not None}  # of positions
        self.auxiliary: Tensor | None = None  # what modules added to the last training loss
        self.observed = {path: m for path, m in self.named_modules() if hasattr(m, "auxiliary_loss")}

    def tie(self, site: Site) -> None:
        """Lets the head use the embedding's weight and its knobs, where both are the same variation with the same options."""
        embedding, head = site.at("wte").node("embedding"), site.at("head").node("head", "linear")
        if embedding != head:
            told = f"the embedding is {_told(embedding)} and the head is {_told(head)}"
            raise Invalid(
                ("tie_weights", f"one weight is shared, but {told}; make them equal or set tie_weights: false")
            )
        for name in site.asked.get(("init", "head"), []):
            if name not in site.asked.get(("init", "wte"), []):
                text = "the head's weight is the embedding's (tie_weights), and its init is chosen at 'wte'"
                raise Invalid((f"sites.{name}.init", text))
        mine, other = ({n: p.shape for n, p in m.named_parameters()} for m in (self.wte, self.head))
        if mine != other:
            raise Invalid(("tie_weights", f"{_told(head)} has weights in the head that the embedding does not have"))
        for path, module in ((p, m) for p, m in self.wte.named_modules() if m._parameters):
            below = self.head.get_submodule(path)
            below._parameters.update(module._parameters)
            below._buffers.update(module._buffers)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """tokens and targets int64 [B, T] -> logits [B, T, V] and the mean cross entropy in nats per token, if targets are given.

        In training, what modules add to the loss (balancing of experts) is in it. With a cache, tokens continue what it has
        seen. Raises ValueError for more tokens than `block_size`, and for a cache that is of no use for so many.
        """
        offset = cache.offset if cache is not None else 0
        if offset + tokens.shape[1] > self.config.block_size:
            given = f"{offset} cached and {tokens.shape[1]} new" if offset else f"{tokens.shape[1]}"
            raise ValueError(f"{given} tokens are more than model.block_size, which is {self.config.block_size}")
        if not self.continues(offset, tokens.shape[1]):
            text = f"what is cached of {offset} tokens is turned otherwise in a text of {offset + tokens.shape[1]}"
            raise ValueError(f"{text}: begin a new cache with the whole text")
        x = self.wte_scale(self.wte(tokens, cache))
        if self.wpe is not None:
            x = self.wpe.embed(x, offset)
        x = self.drop(x)
        for block in self.h.layers() if isinstance(self.h, Stack) else self.h:
            x = block(x, cache)
        logits = self.head_cap(self.head(self.ln_f(x)))
        if cache is not None:
            cache.offset += tokens.shape[1]
        if targets is None:
            return logits, None
        loss = cross_entropy(logits, targets)
        if self.training:
            total = self.added()
            self.auxiliary = None if total is None else total.detach()
            loss = loss if total is None else loss + total
        return logits, loss

    def continues(self, offset: int, count: int) -> bool:
        """Whether `count` tokens can follow `offset` cached ones: within block_size, and with positions as they were turned."""
        end = offset + count
        return end <= self.config.block_size and not any(0 < offset <= n < end for n in self.switches)

    def added(self) -> Tensor | None:
        """What modules add to the loss of the last forward pass; of each run, where several are folded."""
        found: list[Any] = [module.auxiliary_loss for module in self.observed.values()]
        some = [x for x in found if x is not None]
        return torch.stack(some).sum(0) if some else None

    def compiled(self) -> Any:
        """The model compiled; of stacked layers each block, so that blocks that are alike are compiled once."""
        if not isinstance(self.h, Stack):
            return torch.compile(
                self, dynamic=False
            )  # batches of training and of evaluation, each compiled for its size
        for block in self.h:
            block.compile(dynamic=False)
        return self

    def statistics(self) -> dict[str, dict[str, float]]:
        """What modules measured in the last forward pass of training, by path and name; read from the device at once."""
        found: list[tuple[str, str, Any]] = []
        for path, module in self.observed.items():
            values: Any = module.statistics
            found += [(path, name, value) for name, value in values.items()]
        numbers = torch.stack([value.float() for _, _, value in found]).tolist() if found else []
        made: dict[str, dict[str, float]] = {}
        for (path, name, _), number in zip(found, numbers, strict=True):
            made.setdefault(path, {})[name] = number
        return made

    def flops_per_token(self) -> int:
        """Forward and backward, per token of a full context: 6 per weight that multiplies, 3 x the mixers' own forward.

        Source: Kaplan et al., arXiv 2001.08361; Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
        """
        below: list[Any] = [m for m in self.modules() if m is not self]
        weights = sum(m.in_features * m.out_features for m in below if isinstance(m, Linear))
        mixers = sum(m.flops_per_token(self.config.block_size) for m in below if hasattr(m, "flops_per_token"))
        return 6 * weights + 3 * mixers


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [B, T, V] and targets [B, T] -> the mean over all tokens, in nats."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _told(node: Variant) -> str:
    options: dict[str, Any] = plain(node.options)
    return f"{node.name}({', '.join(f'{k}={v}' for k, v in options.items())})" if options else node.name


def assemble(config: ModelConfig, rules: Mapping[str, SliceRule], optimizer: Variant) -> tuple[GPT, list[Row]]:
    """The model, empty, with the adapters that rules ask for, and the settings of all its slices.

    Raises Invalid for a model that cannot be and RuleMistakes for rules that cannot hold of it.
    """
    model = GPT(config)
    adapting = any(rule.lora is not None for rule in rules.values())
    rows, wrong = Resolver(slices(model), CATALOGUE).table(rules, optimizer, complete=not adapting)
    if adapting:
        adapters, more = plan(model, rows)
        wrong += more
        if not wrong:
            attach(model, adapters, CATALOGUE)
            rows, wrong = Resolver(slices(model), CATALOGUE).table(rules, optimizer)
    if wrong:
        raise RuleMistakes(wrong)
    if config.stack_layers:
        model.h = Stack(model.h)
        stacked = {part.address: part for part in slices(model)}
        rows = [replace(row, slice=stacked[row.slice.address]) for row in rows]
    return model, rows


def fill(model: GPT, rows: Sequence[Row], seed: int, device: torch.device | str = "cpu") -> None:
    """Gives an assembled model its memory and initial values, each slice from `seed` and its own address."""
    materialise(model, device)
    _show(model)
    parameters = dict(model.named_parameters())
    for row in rows:
        draw(row.slice, parameters[row.slice.parameter], seed, row.init)
    begin(model)


def refill(model: GPT, rows: Sequence[Row], seed: int) -> None:
    """After the model was filled with another's weights: draws those slices whose init a rule says."""
    parameters = dict(model.named_parameters())
    for row in rows:
        if row.settings.init is not None:
            draw(row.slice, parameters[row.slice.parameter], seed, row.settings.init)
    begin(model)


def build(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> GPT:
    """A model on `device` without rules, every slice initialised from `seed` and its own address."""
    model = GPT(config)
    if config.stack_layers:
        model.h = Stack(model.h)
    materialise(model, device)
    _show(model)
    initialise(model, seed)
    return model


def _show(model: GPT) -> None:
    if isinstance(model.h, Stack):
        model.h.show()
