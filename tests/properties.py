"""What every variation must have, checked on one entry at a time. `CHECKS` maps a name to a function of a Case.

Nothing here names a variation, so a new entry of any dictionary, a plugin's too, is checked by being there.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from models import Case, grads, losses, make, scrambled, tokens
from torch import Tensor

from core.addresses import SLASH, spelled
from core.options import fields_of, options_of
from core.slices import Slice, slices
from model import GPT
from variations import CATALOGUE
from variations.cache import Cache


def bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@torch.no_grad()
def logits(model: GPT, x: Tensor, cache: Cache | None = None) -> Tensor:
    made = model(x, cache=cache)[0]
    assert isinstance(made, Tensor)
    return made


def documented(case: Case) -> None:
    """A docstring with its formula, source and shapes, and a sentence for every option."""
    cls = CATALOGUE[case.kind][case.name]
    text = inspect.cleandoc(cls.__doc__ or "")
    assert all(f"{word}:" in text for word in ("Formula", "Source", "Shapes")), text
    assert text.startswith("Formula: ")
    for name, spec in fields_of(options_of(cls)).items():
        assert str(spec.metadata.get("doc", "")).endswith("."), f"option '{name}' has no sentence"


def shapes(case: Case) -> None:
    """Logits [B, T, V] for any T up to block_size, and one finite loss; the blocks keep [B, T, C]."""
    for tree in case.trees():
        model = make(**tree)
        sizes: list[Any] = []
        for block in model.h:
            for module in (block, block.attn, block.mlp, block.ln_1):
                module.register_forward_hook(lambda m, x, y, sizes=sizes: sizes.append((x[0].shape, y.shape)))
        for b, t in ((1, 1), (2, 5), (3, model.config.block_size)):
            x = tokens(model, b, t)
            out, loss = model(x, x)
            assert out.shape == (b, t, model.config.vocab_size)
            assert loss.shape == () and math.isfinite(loss.item())
        assert sizes and all(a == b for a, b in sizes)


def causal(case: Case) -> None:
    """Position t's logits keep every bit when the tokens after t change, in every position and layout of the batch.

    Experts gather rows, and how many lie beside one another decides how their products are rounded: there in float64, and up to
    what `cached` allows.
    """
    for tree in case.trees():
        model = scrambled(**tree).eval()
        gathering = any(getattr(module, "experts", 0) for module in model.modules())
        same = bits if not gathering else lambda a, b: (a - b).abs().max() <= 1e-11 * max(1.0, b.abs().max().item())
        model = model.double() if gathering else model
        t = model.config.block_size
        first, other = tokens(model, 1, t, 1), tokens(model, 1, t, 2)
        assert not (first == other).all()
        changed = torch.cat([torch.cat((first[:, : i + 1], other[:, i + 1 :]), 1) for i in range(t)])
        kept, moved = logits(model, first.repeat(t, 1)), logits(model, changed)
        for i in range(t):
            assert same(kept[i, : i + 1], moved[i, : i + 1]), f"position {i} sees what comes after it"
        assert not same(kept[0], moved[0]), "the tokens make no difference at all"


def gradients(case: Case) -> None:
    """Every parameter has a gradient that is finite and not all zero."""
    for tree in case.trees():
        model = scrambled(**tree)
        losses(model).backward()
        given = grads(model)
        for name, _ in model.named_parameters():
            assert name in given, f"{name} has no gradient"
            assert given[name].isfinite().all() and given[name].any(), f"{name} has an empty gradient"


def state_dict(case: Case) -> None:
    """A state dict holds the declared weights and nothing else, and carries every bit of the function over."""
    for tree in case.trees():
        model, other = scrambled(1, **tree), scrambled(2, **tree)
        x = tokens(model, 2, 7)
        saved = {name: t.clone() for name, t in model.state_dict().items()}
        weights = {name for name, _ in model.named_parameters(remove_duplicate=False) if SLASH not in name}
        weights |= {
            spelled(part.parameter, part.labels)[0] for part in slices(model)
        }  # of stacked layers each one's own
        assert set(saved) == weights, "a buffer would let a checkpoint override the configuration"
        assert not bits(logits(model, x), logits(other, x))
        other.load_state_dict(saved)
        assert bits(logits(model, x), logits(other, x))


def deep_copy(case: Case) -> None:
    """A deep copy computes the same, keeps its slices and shared weights, and shares no memory with the original."""
    for tree in case.trees():
        model = scrambled(**tree)
        x, other = tokens(model, 2, 7), copy.deepcopy(model)
        before = logits(model, x)
        assert bits(before, logits(other, x))
        assert [s.address for s in slices(model)] == [s.address for s in slices(other)]
        assert len(list(model.parameters())) == len(list(other.parameters()))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert bits(before, logits(model, x))


def evaluation(case: Case) -> None:
    """Without dropout, training and evaluation compute the same bits, and computing twice does too."""
    for tree in case.trees():
        model = scrambled(**tree)
        x = tokens(model, 2, 7)
        trained = logits(model.train(), x)
        assert bits(trained, logits(model.train(), x)) and bits(trained, logits(model.eval(), x))


def cached(case: Case) -> None:
    """Two chunks and then one token at a time, with a cache, give the logits of the whole sequence at once.

    In float64 the two ways differ in the order of sums of at most a few hundred terms, in few layers: 1e3 roundings of 2^-53 are
    1e-13, against logits of order 1. A position off by one, or a state forgotten, is off by more than 1e-3.
    """
    for tree in case.trees():
        model = scrambled(**tree).double().eval()
        t = model.config.block_size
        x, cache = tokens(model, 3, t), Cache()
        whole = logits(model, x)
        cuts = [0, 3, 8, *range(9, t + 1)]
        pieces = [logits(model, x[:, a:b], cache) for a, b in itertools.pairwise(cuts)]
        assert cache.offset == t
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-11 * max(1.0, whole.abs().max().item()))


def bfloat16(case: Case) -> None:
    """Under autocast: finite, gradients in the weights' dtype, near float32.

    A product rounds its operands to 8 bits (2^-9, relative); about ten products and norms follow one another, so a relative
    error of the logits of a few percent in the mean square is bfloat16's own, and above 10% something else is wrong.
    """
    for tree in case.trees():
        model = scrambled(std=0.1, **tree)
        x = tokens(model, 4, model.config.block_size)
        exact = logits(model, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, loss = model(x, x)
        loss.backward()
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads(model).values())
        assert (got.float() - exact).square().mean().sqrt() < 0.1 * exact.square().mean().sqrt()


def covered(case: Case) -> None:
    """Every parameter is declared, and its slices cover each of its elements once: an oracle of element numbers."""
    for tree in case.trees():
        model = make(**tree)
        parameters, seen = dict(model.named_parameters()), dict[str, list[Tensor]]()
        listed = slices(model)
        assert len({s.address for s in listed}) == len(listed)
        for part in listed:
            whole = parameters[part.parameter]
            numbers = torch.arange(whole.numel()).view(whole.shape)
            view = part.view(numbers)
            assert view.untyped_storage().data_ptr() == numbers.untyped_storage().data_ptr(), "a copy, not a view"
            assert view.numel() == part.numel == math.prod(part.shape)
            seen.setdefault(part.parameter, []).append(view.flatten())
        assert set(seen) == set(parameters)
        for name, views in seen.items():
            assert bits(torch.cat(views).sort().values, torch.arange(parameters[name].numel())), name


def values(model: GPT) -> Iterator[tuple[Slice, Tensor]]:
    parameters = dict(model.named_parameters())
    for part in slices(model):
        yield part, part.view(parameters[part.parameter]).detach()


def random(part: Slice) -> bool:
    """Whether initial values depend on the generator."""
    a, b = (part.declaration.init.draw(part.shape, torch.Generator().manual_seed(i)) for i in range(2))
    return not torch.equal(a, b)


def initial(case: Case) -> None:
    """Initial values are a function of the seed and the address: the same in another model, others elsewhere."""
    base = {s.address: (s, v) for s, v in values(make(7))}
    for tree in case.trees():
        model = make(7, **tree)
        again = dict(make(7, **tree).named_parameters())
        assert all(bits(p, again[name]) for name, p in model.named_parameters()), "not deterministic"
        seen: dict[bytes, str] = {}
        other = {s.address: v for s, v in values(make(8, **tree))}
        for part, value in values(model):
            known, before = base.get(part.address, (part, value))
            told = [(str(x.declaration.init), x.declaration.gain, x.shape) for x in (known, part)]
            if told[0] == told[1]:
                assert bits(value, before), f"{part.address} depends on its neighbours"
            if random(part):
                assert not bits(value, other[part.address]), f"{part.address} does not depend on the seed"
                raw = (value / part.declaration.gain).numpy().tobytes()
                assert seen.setdefault(raw, part.address) == part.address, "two addresses with the same values"


def last_linears(model: GPT) -> set[str]:
    """Paths of the linears that write to the residual stream: of every mixer and MLP, the one that is called last."""
    found = set()
    for i, block in enumerate(model.h):
        for name in ("attn", "mlp"):
            called: list[str] = []
            inner: Any = getattr(block, name)
            hooks = [
                m.register_forward_hook(lambda *_, path=f"h.{i}.{name}.{path}", called=called: called.append(path))
                for path, m in inner.named_modules()
                if hasattr(m, "in_features")
            ]
            logits(model, tokens(model, 1, 2))
            for hook in hooks:
                hook.remove()
            found |= set(called[-1:])
    return found


def spread(case: Case) -> None:
    """Effective weights have the init's own deviation, and those that write to the residual stream 1/sqrt(2 n_layer) of it.

    The pooled, standardised values have mean square 1 with a standard error of sqrt(2/n) where they are normal, and less for the
    lighter tails of the others; three of them are allowed.
    """
    if case.options:
        return  # an option may be there to change just this
    for tree in case.trees():
        model = make(5, **tree)
        residual, squares, count = last_linears(model), 0.0, 0
        for path, module in model.named_modules():
            found: Any = getattr(module, "effective", None)
            if found is None or (path == "head" and model.config.tie_weights):
                continue
            what = module.__dict__["declarations"]["weight"]  # also of a stacked layer, whose parameter is elsewhere
            scaled = path in residual and getattr(what.init.options, "scale_residual", True)
            gain = 1 / math.sqrt(2 * model.config.n_layer) if scaled else 1.0
            weight = found().detach()
            for part in weight.split([size for _, size in what.layout.parts] or weight.shape[-2], -2):
                draws = [what.init.draw(tuple(part.shape[-2:]), torch.Generator().manual_seed(i)) for i in range(40)]
                expected = gain * torch.stack(draws).square().mean().sqrt().item()
                if expected == 0:
                    assert not part.any(), path
                else:
                    squares += (part / expected).double().square().sum().item()
                    count += part.numel()
        if count:
            assert abs(squares / count - 1) < 3 * math.sqrt(2 / count), f"{squares / count} over {count}"


_ALL: list[Callable[[Case], None]] = [
    documented,
    shapes,
    causal,
    gradients,
    state_dict,
    deep_copy,
    evaluation,
    cached,
    bfloat16,
]
_ALL += [covered, initial, spread]
CHECKS = {check.__name__: check for check in _ALL}
