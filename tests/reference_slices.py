"""Slow references for tensors made of named parts: every part is a tensor of its own, fused only inside a forward pass.

Shapes: B batch, T positions, C width, H query heads, K key/value heads, D head width, F hidden width, V vocabulary.
Matrices are stored [out, in]. No argument is changed, except the model that `train_separately` trains.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MUON_MOMENTUM = 0.95


def flat_indices(
    shape: Sequence[int],
    parts: Sequence[tuple[str, int]],
    dim: int,
    groups: int,
    stack: Sequence[Sequence[str]] = (),
) -> dict[tuple[str, ...], list[int]]:
    """Row-major positions of every named slice of a tensor. parts: (name, rows per group), dim < 0 -> slice: indices.

    The leading axes are the labelled `stack` axes. A slice is named by its stack labels, then its part if there are
    parts. Its positions are listed in the row-major order of the slice as a tensor of its own: stack axes gone, and
    `dim` holding group 0's rows of the part, then group 1's, and so on.

    Formula: dimension `dim` is `groups` repetitions of all parts in order; row o of part p in group g is row
        g * rows(p) + o of the slice; a coordinate's position is its number in mixed radix `shape`
    Source: per-rank fused projections of Shoeybi et al., Megatron-LM, arXiv 1909.08053
    """
    axis = len(shape) + dim
    if dim >= 0 or axis < len(stack):
        raise ValueError(f"dim {dim} of {tuple(shape)} is not a negative dimension right of the stack axes")
    if [len(labels) for labels in stack] != list(shape[: len(stack)]):
        raise ValueError(f"stack labels {stack} do not fit {tuple(shape)}")
    if parts and groups * sum(rows for _, rows in parts) != shape[axis]:
        raise ValueError(f"{groups} groups of {parts} do not fill {shape[axis]} rows")
    places: list[tuple[tuple[str, ...], int]] = []  # of each row of the dimension: its part, and its row in the slice
    if parts:
        for group in range(groups):
            for name, rows in parts:
                for row in range(rows):
                    places.append(((name,), group * rows + row))
    else:
        places = [((), row) for row in range(shape[axis])]

    found: dict[tuple[str, ...], list[tuple[tuple[int, ...], int]]] = {}
    for coordinate in itertools.product(*[range(size) for size in shape]):
        flat = 0
        for index, size in zip(coordinate, shape, strict=True):
            flat = flat * size + index
        labels = tuple(stack[i][coordinate[i]] for i in range(len(stack)))
        part, row = places[coordinate[axis]]
        logical = [*coordinate[len(stack) : axis], row, *coordinate[axis + 1 :]]
        found.setdefault(labels + part, []).append((tuple(logical), flat))
    return {name: [flat for _, flat in sorted(entries)] for name, entries in found.items()}


def _generator(seed: int, address: str) -> torch.Generator:
    """Random generator of one address. seed, address -> generator.

    Formula: seeded with the first 8 bytes of sha256("{seed}:{address}") as a little-endian integer, halved
    Source: definition
    """
    digest = hashlib.sha256(f"{seed}:{address}".encode()).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator


def _standard_normal(seed: int, address: str, shape: Sequence[int]) -> Tensor:
    """Standard normal draw of one address. seed, address, shape -> float32 of that shape.

    Formula: N(0, 1), drawn in one call
    Source: definition
    """
    return torch.empty(tuple(shape), dtype=torch.float32).normal_(0.0, 1.0, generator=_generator(seed, address))


def initial_normal(seed: int, address: str, shape: Sequence[int], std: float) -> Tensor:
    """Normal initial value of one part. seed, address, shape, std -> float32 of that shape.

    Formula: N(0, 1) * std
    Source: Radford et al., Language Models are Unsupervised Multitask Learners (GPT-2), 2019
    """
    return _standard_normal(seed, address, shape) * std


def initial_uniform(seed: int, address: str, shape: Sequence[int], std: float) -> Tensor:
    """Uniform initial value of one part with a given deviation. seed, address, shape, std -> float32 of that shape.

    Formula: U(-1, 1) * sqrt(3) * std, the factors applied from left to right
    Source: a uniform variable on (-a, a) has standard deviation a / sqrt(3)
    """
    value = torch.empty(tuple(shape), dtype=torch.float32).uniform_(-1.0, 1.0, generator=_generator(seed, address))
    return value * math.sqrt(3.0) * std


def initial_xavier(seed: int, address: str, shape: Sequence[int]) -> Tensor:
    """Xavier normal initial value of one matrix part, by its own fans. seed, address, [rows, cols] -> float32.

    Formula: N(0, 1) * sqrt(2 / (rows + cols))
    Source: Glorot and Bengio, Understanding the difficulty of training deep feedforward neural networks, AISTATS 2010
    """
    rows, cols = shape
    return _standard_normal(seed, address, shape) * math.sqrt(2.0 / (rows + cols))


def initial_kaiming(seed: int, address: str, shape: Sequence[int]) -> Tensor:
    """Kaiming normal initial value of one matrix part, by its own fan in. seed, address, [rows, cols] -> float32.

    Formula: N(0, 1) / sqrt(cols)
    Source: He et al., Delving Deep into Rectifiers, arXiv 1502.01852, with gain 1 for sqrt(2)
    """
    _, cols = shape
    return _standard_normal(seed, address, shape) / math.sqrt(cols)


class SeparateGPT:
    """Decoder-only transformer that keeps every part as a parameter of its own and concatenates parts in forward.

    `p` maps addresses to parameters, in the order of `values`: `wte.weight` [V, C], `wpe.weight` [positions, C], and in
    each layer `h.0.ln_1.weight` [C], `h.0.attn.qkv.weight[q]` [HD, C], `[k]` and `[v]` [KD, C],
    `h.0.attn.proj.weight` [C, HD], `h.0.ln_2.weight` [C], `h.0.mlp.up.weight` [F, C] or, gated,
    `h.0.mlp.gate_up.weight[gate]` and `[up]` [F, C], `h.0.mlp.down.weight` [C, F]; then `ln_f.weight` [C], and
    `head.weight` [V, C] if the head is not tied to `wte.weight`. All but the embeddings and the head may have a bias,
    such as `h.0.attn.qkv.bias[q]`; parts that are fused have biases all together or not at all.

    Formula: x = wte + wpe; per layer x += attention(layernorm(x)), x += mlp(layernorm(x)); logits = head layernorm(x)
    Source: Radford et al. (GPT-2), 2019; grouping from Ainslie et al., GQA, arXiv 2305.13245; gating from Shazeer,
        GLU Variants Improve Transformer, arXiv 2002.05202
    """

    def __init__(
        self, values: dict[str, Tensor], n_layer: int, n_head: int, n_kv_head: int, head_dim: int, gated: bool
    ) -> None:
        self.n_layer, self.gated = n_layer, gated
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, head_dim
        required, optional = ["wte.weight", "wpe.weight"], ["head.weight"]
        for layer in range(n_layer):
            h = f"h.{layer}."
            for name, parts in [
                (f"{h}ln_1", []),
                (f"{h}attn.qkv", ["q", "k", "v"]),
                (f"{h}attn.proj", []),
                (f"{h}ln_2", []),
                (f"{h}mlp.gate_up", ["gate", "up"]) if gated else (f"{h}mlp.up", []),
                (f"{h}mlp.down", []),
            ]:
                required += self._addresses(f"{name}.weight", parts)
                optional += self._addresses(f"{name}.bias", parts)
        required.append("ln_f.weight")
        optional.append("ln_f.bias")
        missing = [address for address in required if address not in values]
        unknown = [address for address in values if address not in required + optional]
        if missing or unknown:
            raise KeyError(f"missing {missing}, unknown {unknown}")
        self.p = {address: torch.nn.Parameter(value.detach().clone()) for address, value in values.items()}

    @staticmethod
    def _addresses(name: str, parts: list[str]) -> list[str]:
        """Addresses of the parts of one tensor. name, part names -> addresses.

        Formula: name[part] for each part, or the name alone without parts
        Source: definition
        """
        return [f"{name}[{part}]" for part in parts] if parts else [name]

    def _fused(self, name: str, parts: list[str]) -> Tensor | None:
        """Parts one after another along the first dimension. name, part names -> [sum of rows, ...], None if absent.

        Formula: concatenation in the order of `parts`
        Source: definition
        """
        addresses = self._addresses(name, parts)
        present: list[Tensor] = [self.p[address] for address in addresses if address in self.p]
        if not present:
            return None
        if len(present) < len(addresses):
            raise KeyError(f"only some of {addresses} are given")
        return torch.cat(present) if parts else present[0]

    def _linear(self, x: Tensor, name: str, parts: list[str]) -> Tensor:
        """Affine map whose weight and bias are made of parts. x [..., in] -> [..., out].

        Formula: x W^T + b
        Source: definition
        """
        weight = self._fused(f"{name}.weight", parts)
        assert weight is not None
        return F.linear(x, weight, self._fused(f"{name}.bias", parts))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """Layer normalisation. x [B, T, C] -> [B, T, C].

        Formula: (x - mean) / sqrt(var + 1e-5) * weight + bias
        Source: Ba et al., Layer Normalization, arXiv 1607.06450
        """
        return F.layer_norm(x, (x.shape[-1],), self.p[f"{name}.weight"], self.p.get(f"{name}.bias"), 1e-5)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        """Causal grouped-query self-attention with its projections. x [B, T, C] -> [B, T, C].

        Formula: q, k, v = split(x [W_q; W_k; W_v]^T + [b_q; b_k; b_v]); proj(softmax(q k^T / sqrt(D), causal) v)
        Source: Vaswani et al., arXiv 1706.03762; grouping from Ainslie et al., GQA, arXiv 2305.13245
        """
        batch, length, _ = x.shape
        wide, narrow = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        q, k, v = self._linear(x, f"{name}.qkv", ["q", "k", "v"]).split([wide, narrow, narrow], dim=-1)
        q = q.view(batch, length, self.n_head, self.head_dim).transpose(1, 2)
        k = k.view(batch, length, self.n_kv_head, self.head_dim).transpose(1, 2)
        v = v.view(batch, length, self.n_kv_head, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_head != self.n_kv_head)
        return self._linear(y.transpose(1, 2).reshape(batch, length, wide), f"{name}.proj", [])

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        """Feed-forward block with exact GELU, plain or gated. x [B, T, C] -> [B, T, C].

        Formula: down(gelu(up(x))), or gated down(gelu(gate(x)) * up(x)) with gate and up one fused map
        Source: Vaswani et al., arXiv 1706.03762; GEGLU of Shazeer, arXiv 2002.05202
        """
        if self.gated:
            gate, up = self._linear(x, f"{name}.gate_up", ["gate", "up"]).chunk(2, -1)
            hidden = F.gelu(gate) * up
        else:
            hidden = F.gelu(self._linear(x, f"{name}.up", []))
        return self._linear(hidden, f"{name}.down", [])

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits. tokens [B, T] int64 -> [B, T, V].

        Formula: pre-norm residual blocks, then head layernorm(x), head = wte unless `head.weight` is given
        Source: Radford et al. (GPT-2), 2019
        """
        wte = self.p["wte.weight"]
        x = F.embedding(tokens, wte)
        x = x + self.p["wpe.weight"][: tokens.shape[1]]
        for layer in range(self.n_layer):
            x = x + self._attention(self._norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn")
            x = x + self._mlp(self._norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp")
        return F.linear(self._norm(x, "ln_f"), self.p.get("head.weight", wte))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean next-token cross-entropy in float32. tokens, targets [B, T] int64 -> scalar.

        Formula: mean over positions of -log softmax(logits)[target]
        Source: definition
        """
        return F.cross_entropy(self.logits(tokens).flatten(0, 1).float(), targets.flatten())


@dataclass
class Settings:
    """How one parameter is trained: peak learning rate (absolute), weight decay, and one of four optimizers."""

    lr: float
    weight_decay: float
    frozen: bool = False
    optimizer: str = "adamw"  # adamw, sgd, muon or lion


def orthogonalised(d: Tensor) -> Tensor:
    """Approximate orthogonal factor of a matrix, five Newton-Schulz iterations. d [rows, cols] -> float32 [rows, cols].

    Formula: X = d / (||d||_F + 1e-7), tall matrices transposed around the loop; five times
        X = 3.4445 X + (-4.7750 A + 2.0315 A A) X with A = X X^T
    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024
    """
    rows, cols = d.shape
    x = d.float()
    if rows > cols:
        x = x.T
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x.T if rows > cols else x


def muon_update(w: Tensor, g: Tensor, m: Tensor, lr: float, weight_decay: float) -> tuple[Tensor, Tensor]:
    """One Muon update with Nesterov momentum. w, g, m [rows, cols], m zero at first -> new (w, m).

    Formula: m += (1 - mu)(g - m); d = g + mu (m - g); w = w (1 - lr wd) - lr sqrt(max(1, rows / cols)) NS5(d)
    Source: Jordan et al., Muon, 2024; decoupled decay as in Liu et al., Muon is Scalable, arXiv 2502.16982
    """
    rows, cols = w.shape
    m = torch.lerp(m, g, 1.0 - MUON_MOMENTUM)
    d = torch.lerp(g, m, MUON_MOMENTUM)
    w = w * (1.0 - lr * weight_decay)
    return w - lr * math.sqrt(max(1.0, rows / cols)) * orthogonalised(d).to(w.dtype), m


def lion_update(
    w: Tensor, g: Tensor, m: Tensor, lr: float, weight_decay: float, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """One Lion update. w, g, m [...], m zero at first -> new (w, m).

    Formula: c = b1 m + (1 - b1) g; w = w (1 - lr wd) - lr sign(c); m = b2 m + (1 - b2) g
    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675
    """
    c = betas[0] * m + (1.0 - betas[0]) * g
    w = w * (1.0 - lr * weight_decay) - lr * torch.sign(c)
    return w, betas[1] * m + (1.0 - betas[1]) * g


def train_separately(
    model: SeparateGPT,
    settings: dict[str, Settings],
    batches: list[tuple[Tensor, Tensor]],
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    momentum: float = 0.9,
    nesterov: bool = False,
    grad_clip: float | None = 1.0,
    autocast: bool = False,
    accumulation: int = 1,
    factors: list[float] | None = None,
) -> list[float]:
    """Train a model in place, every parameter by its own settings. batches: (tokens, targets), [B, T] -> loss per step.

    A step takes the next `accumulation` batches, and its loss is the mean of theirs before the update. `factors` are
    the learning rate multipliers of the steps. Frozen parameters get no gradient, take no part in the norm, and stay.

    Formula: per step, norm = || (||g_1||, ||g_2||, ...) || over the trained parameters in order, each gradient times
        min(1, grad_clip / (norm + 1e-6)), then each parameter's own update at lr * factor
    Source: clipping of Pascanu et al., arXiv 1211.5063; AdamW, arXiv 1711.05101; SGD with L2 decay in the gradient;
        Muon, Jordan et al., 2024; Lion, arXiv 2302.06675
    """
    if set(settings) != set(model.p):
        raise KeyError(f"settings and parameters differ in {sorted(set(settings) ^ set(model.p))}")
    if len(batches) % accumulation:
        raise ValueError(f"{len(batches)} batches are not a multiple of {accumulation}")
    steps = len(batches) // accumulation
    if factors is not None and len(factors) < steps:
        raise ValueError(f"{len(factors)} factors for {steps} steps")
    for address, parameter in model.p.items():
        parameter.requires_grad_(not settings[address].frozen)
    trained = {address: p for address, p in model.p.items() if not settings[address].frozen}
    unknown = {settings[address].optimizer for address in trained} - {"adamw", "sgd", "muon", "lion"}
    if unknown:
        raise ValueError(f"unknown optimizers {sorted(unknown)}")

    moments = {a: torch.zeros_like(p) for a, p in trained.items() if settings[a].optimizer in ("muon", "lion")}
    optimizers: list[torch.optim.Optimizer] = []
    adamw = [
        {"params": [p], "lr": settings[a].lr, "weight_decay": settings[a].weight_decay, "peak": settings[a].lr}
        for a, p in trained.items()
        if settings[a].optimizer == "adamw"
    ]
    sgd = [
        {"params": [p], "lr": settings[a].lr, "weight_decay": settings[a].weight_decay, "peak": settings[a].lr}
        for a, p in trained.items()
        if settings[a].optimizer == "sgd"
    ]
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, betas=betas, eps=eps, fused=True))
    if sgd:
        optimizers.append(torch.optim.SGD(sgd, momentum=momentum, nesterov=nesterov, fused=True))

    losses = []
    for step in range(steps):
        factor = 1.0 if factors is None else factors[step]
        for parameter in model.p.values():
            parameter.grad = None
        total = 0.0
        for tokens, targets in batches[step * accumulation : (step + 1) * accumulation]:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = model.loss(tokens, targets)
            total += loss.item()
            (loss / accumulation if accumulation > 1 else loss).backward()
        losses.append(total / accumulation)

        grads: dict[str, Tensor] = {}
        for address, parameter in trained.items():
            assert parameter.grad is not None, address
            grads[address] = parameter.grad
        if grad_clip is not None:
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads.values()]))
            scale = (grad_clip / (norm + 1e-6)).clamp(max=1.0)
            for grad in grads.values():
                grad.mul_(scale)

        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
        with torch.no_grad():
            for address, moment in moments.items():
                own, w, g = settings[address], trained[address], grads[address]
                if own.optimizer == "muon":
                    new, moments[address] = muon_update(w, g, moment, own.lr * factor, own.weight_decay)
                else:
                    new, moments[address] = lion_update(w, g, moment, own.lr * factor, own.weight_decay, betas)
                w.copy_(new)
    return losses


def _lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """Multiplier of the low-rank product. alpha, rank -> float.

    Formula: alpha / r, or alpha / sqrt(r) when rank-stabilised
    Source: Hu et al., LoRA, arXiv 2106.09685; Kalajdzievski, rsLoRA, arXiv 2312.03732
    """
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    alpha: float,
    rank: int,
    rslora: bool = False,
) -> Tensor:
    """Affine map with a low-rank addition. x [..., in], weight [out, in], a [r, in], b [out, r] -> [..., out].

    Formula: x W^T + bias + s (x A^T) B^T with s = alpha / r, or alpha / sqrt(r) when rank-stabilised
    Source: Hu et al., LoRA, arXiv 2106.09685; Kalajdzievski, rsLoRA, arXiv 2312.03732
    """
    base = x @ weight.T
    if bias is not None:
        base = base + bias
    return base + _lora_scale(alpha, rank, rslora) * ((x @ a.T) @ b.T)


def lora_merged(weight: Tensor, a: Tensor, b: Tensor, alpha: float, rank: int, rslora: bool = False) -> Tensor:
    """Weight of a plain map equal to the adapted one. weight [out, in], a [r, in], b [out, r] -> [out, in].

    Formula: W + s B A
    Source: Hu et al., LoRA, arXiv 2106.09685, section 4.1
    """
    return weight + _lora_scale(alpha, rank, rslora) * (b @ a)


def dora_merged(
    weight: Tensor, a: Tensor, b: Tensor, alpha: float, rank: int, magnitude: Tensor, rslora: bool = False
) -> Tensor:
    """Weight-decomposed low-rank adaptation as one weight. weight [out, in], magnitude [out] -> [out, in].

    Formula: row i is m_i V_i / ||V_i|| with V = W + s B A; the norm is a constant for the gradient
    Source: Liu et al., DoRA, arXiv 2402.09353, constant norm of section 4.3; one magnitude per output
    """
    directed = lora_merged(weight, a, b, alpha, rank, rslora)
    norms = torch.sqrt((directed * directed).sum(dim=1)).detach()
    return (magnitude / norms).unsqueeze(1) * directed


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    alpha: float,
    rank: int,
    magnitude: Tensor,
    rslora: bool = False,
) -> Tensor:
    """Affine map with weight-decomposed low-rank adaptation. x [..., in], magnitude [out] -> [..., out].

    Formula: x W'^T + bias with W' = m (W + s B A) / ||W + s B A||, norm per row and constant for the gradient
    Source: Liu et al., DoRA, arXiv 2402.09353, constant norm of section 4.3
    """
    y = x @ dora_merged(weight, a, b, alpha, rank, magnitude, rslora).T
    return y if bias is None else y + bias


@dataclass
class Adapter:
    """LoRA of one linear map: a [r, in], b [out, r]; with a magnitude [out] it is DoRA."""

    a: Tensor
    b: Tensor
    alpha: float
    rank: int
    rslora: bool = False
    magnitude: Tensor | None = None


def separate_qkv_lora(x: Tensor, parts: Sequence[tuple[Tensor, Tensor | None, Adapter | None]]) -> Tensor:
    """Linear maps side by side, some adapted. x [..., in], parts: (weight, bias, adapter) -> [..., sum of out].

    Formula: [y_1, y_2, ...] with y_i = x W_i^T + b_i, plus the part's own adapter if it has one
    Source: Hu et al., LoRA, arXiv 2106.09685, which adapts the query and value maps and not the key map
    """
    outputs = []
    for weight, bias, ad in parts:
        if ad is None:
            y = x @ weight.T
            outputs.append(y if bias is None else y + bias)
        elif ad.magnitude is None:
            outputs.append(lora_linear(x, weight, bias, ad.a, ad.b, ad.alpha, ad.rank, ad.rslora))
        else:
            outputs.append(dora_linear(x, weight, bias, ad.a, ad.b, ad.alpha, ad.rank, ad.magnitude, ad.rslora))
    return torch.cat(outputs, dim=-1)
