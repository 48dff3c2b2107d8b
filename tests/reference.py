"""Slow reference implementations used as test oracles, each written from the paper or algorithm it names.

Shapes: B batch, T positions, C width, H query heads, K key/value heads, D head width, F hidden width, V vocabulary.
Matrices are stored [out, in]. No argument is changed, and dtypes are kept unless a docstring says otherwise.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def layernorm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the last dimension. x [..., C], weight [C], bias [C] or None -> [..., C].

    Formula: (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias
    Source: Ba et al., Layer Normalization, arXiv 1607.06450
    """
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    y = centred / torch.sqrt(variance + eps) * weight
    return y if bias is None else y + bias


def rmsnorm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """Root-mean-square normalisation over the last dimension. x [..., C], weight [C] or None -> [..., C].

    Formula: x / sqrt(mean(x^2) + eps) * weight
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467
    """
    y = x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def gelu(x: Tensor) -> Tensor:
    """Exact Gaussian error linear unit, elementwise. [...] -> [...].

    Formula: x * Phi(x) = x * (1 + erf(x / sqrt(2))) / 2
    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415
    """
    return x * (1.0 + torch.erf(x / math.sqrt(2.0))) / 2.0


def gelu_tanh(x: Tensor) -> Tensor:
    """Tanh approximation of GELU, elementwise. [...] -> [...].

    Formula: x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) / 2
    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415
    """
    return x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))) / 2.0


def relu(x: Tensor) -> Tensor:
    """Rectified linear unit, elementwise. [...] -> [...].

    Formula: x where x > 0, else 0
    Source: Nair and Hinton, Rectified Linear Units Improve Restricted Boltzmann Machines, ICML 2010
    """
    return torch.where(x > 0, x, torch.zeros_like(x))


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU, elementwise. [...] -> [...].

    Formula: relu(x)^2
    Source: So et al., Primer, arXiv 2109.08668
    """
    return relu(x) * relu(x)


def silu(x: Tensor) -> Tensor:
    """Sigmoid linear unit (swish with beta 1), elementwise. [...] -> [...].

    Formula: x * sigmoid(x)
    Source: Hendrycks and Gimpel, arXiv 1606.08415; Ramachandran et al., arXiv 1710.05941
    """
    return x * torch.sigmoid(x)


def rope(x: Tensor, base: float = 10000.0, offset: int = 0) -> Tensor:
    """Rotary position embedding, rotate-half pairing. x [B, H, T, D], first position is `offset` -> [B, H, T, D].

    Formula: with angle(t, i) = (t + offset) * base^(-2i/D) and pair (a, b) = (x[t, i], x[t, i + D/2]),
        the pair becomes (a cos - b sin, b cos + a sin); angles are float64 before rounding to the dtype of x
    Source: Su et al., RoFormer, arXiv 2104.09864; pairing of the halves as in GPT-NeoX, arXiv 2204.06745
    """
    half = x.shape[-1] // 2
    positions = []
    for t in range(x.shape[2]):
        angles = [(t + offset) * base ** (-2.0 * i / x.shape[-1]) for i in range(half)]
        cos = x.new_tensor([math.cos(angle) for angle in angles])
        sin = x.new_tensor([math.sin(angle) for angle in angles])
        a, b = x[:, :, t, :half], x[:, :, t, half:]
        positions.append(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
    return torch.stack(positions, dim=2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal grouped-query attention. q [B, H, T, D], k and v [B, K, T, D], H a multiple of K -> [B, H, T, D].

    Formula: out[h, t] = sum_{s <= t} softmax_s(q[h, t] . k[g, s] / sqrt(D)) v[g, s] with g = h // (H / K)
    Source: Vaswani et al., arXiv 1706.03762; grouping from Ainslie et al., GQA, arXiv 2305.13245
    """
    n_head, length, head_dim = q.shape[1], q.shape[2], q.shape[3]
    queries_per_kv = n_head // k.shape[1]
    heads = []
    for h in range(n_head):
        keys, values = k[:, h // queries_per_kv], v[:, h // queries_per_kv]
        rows = []
        for t in range(length):
            scores = (keys[:, : t + 1] * q[:, h, t : t + 1]).sum(dim=-1) / math.sqrt(head_dim)
            powers = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
            weights = powers / powers.sum(dim=-1, keepdim=True)
            rows.append((weights.unsqueeze(-1) * values[:, : t + 1]).sum(dim=1))
        heads.append(torch.stack(rows, dim=1))
    return torch.stack(heads, dim=1)


def split_qkv(fused: Tensor, n_head: int, n_kv_head: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a fused projection into heads. fused [B, T, (H+2K)D] -> q [B, H, T, D], k [B, K, T, D], v [B, K, T, D].

    Formula: the last dimension reads [q_0 .. q_{H-1}, k_0 .. k_{K-1}, v_0 .. v_{K-1}], each slice D wide
    Source: head splitting of Vaswani et al., arXiv 1706.03762; K < H from Ainslie et al., arXiv 2305.13245
    """
    slices = [fused[:, :, i * head_dim : (i + 1) * head_dim] for i in range(n_head + 2 * n_kv_head)]
    q, k, v = slices[:n_head], slices[n_head : n_head + n_kv_head], slices[n_head + n_kv_head :]
    return torch.stack(q, dim=1), torch.stack(k, dim=1), torch.stack(v, dim=1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Affine map. x [..., in], weight [out, in], bias [out] or None -> [..., out].

    Formula: x W^T + b
    Source: definition
    """
    y = x @ weight.T
    return y if bias is None else y + bias


def mlp(
    x: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, b_down: Tensor | None, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """Two-layer feed-forward block. x [..., C], w_up [F, C], b_up [F], w_down [C, F], b_down [C] -> [..., C].

    Formula: act(x W_up^T + b_up) W_down^T + b_down, either bias may be None
    Source: Vaswani et al., arXiv 1706.03762, section 3.3
    """
    return _linear(act(_linear(x, w_up, b_up)), w_down, b_down)


def gated_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Gated feed-forward block (SwiGLU when act is silu). x [..., C], w_gate, w_up [F, C], w_down [C, F] -> [..., C].

    Formula: (act(x W_gate^T) * (x W_up^T)) W_down^T
    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202
    """
    return _linear(act(_linear(x, w_gate)) * _linear(x, w_up), w_down)


def pkl(a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """Scaled addition. a, b [...], scale a number or a tensor that broadcasts -> [...].

    Formula: a + scale * b
    Source: residual addition of He et al., arXiv 1512.03385, with a multiplier on the second term
    """
    return a + scale * b


def bigram_embedding(tokens: Tensor, table: Tensor, vocab: int) -> Tensor:
    """Embedding of each (previous, current) token pair. tokens [B, T] integer, table [V*V, C] -> [B, T, C].

    Formula: out[b, t] = table[tokens[b, t-1] * V + tokens[b, t]], where tokens[b, -1] stands for token id 0
    Source: 2-gram input table of Huang et al., Over-Tokenized Transformer, arXiv 2501.16975, one row per pair
    """
    rows = []
    for sequence in tokens.tolist():
        pairs = zip([0, *sequence[:-1]], sequence, strict=True)
        rows.append([previous * vocab + current for previous, current in pairs])
    return table[torch.tensor(rows)]


def gpt2_forward(params: dict[str, Tensor], tokens: Tensor, n_head: int) -> Tensor:
    """GPT-2 logits with exact GELU. tokens [B, T] integer, params by name -> [B, T, V].

    Formula: x = wte[token] + wpe[t]; per layer x += attn(ln_1(x)), x += mlp(ln_2(x)); logits = ln_f(x) head^T;
        a missing bias is no bias, and a missing head.weight is wte.weight
    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019; tying from arXiv 1608.05859
    """
    head_dim = params["wte.weight"].shape[1] // n_head
    x = params["wte.weight"][tokens] + params["wpe.weight"][: tokens.shape[1]]
    layer = 0
    while f"h.{layer}.attn.qkv.weight" in params:
        w = {name.removeprefix(f"h.{layer}."): p for name, p in params.items() if name.startswith(f"h.{layer}.")}
        y = layernorm(x, w["ln_1.weight"], w.get("ln_1.bias"))
        q, k, v = split_qkv(_linear(y, w["attn.qkv.weight"], w.get("attn.qkv.bias")), n_head, n_head, head_dim)
        y = attention(q, k, v)
        x = x + _linear(torch.cat(y.unbind(dim=1), dim=-1), w["attn.proj.weight"], w.get("attn.proj.bias"))
        y = layernorm(x, w["ln_2.weight"], w.get("ln_2.bias"))
        x = x + mlp(y, w["mlp.up.weight"], w.get("mlp.up.bias"), w["mlp.down.weight"], w.get("mlp.down.bias"), gelu)
        layer += 1
    x = layernorm(x, params["ln_f.weight"], params.get("ln_f.bias"))
    return _linear(x, params.get("head.weight", params["wte.weight"]))


def modern_forward(
    params: dict[str, Tensor], tokens: Tensor, n_head: int, n_kv_head: int, qk_norm: bool, base: float = 10000.0
) -> Tensor:
    """Llama-style logits: RMSNorm, RoPE, GQA, SwiGLU, no biases, untied head. tokens [B, T] -> [B, T, V].

    Formula: x = wte[token]; per layer x += attn(ln_1(x)), x += swiglu(ln_2(x)); logits = ln_f(x) head^T;
        attn rotates q and k, after an RMSNorm of each head's D features when qk_norm is set
    Source: Touvron et al., LLaMA, arXiv 2302.13971; GQA, arXiv 2305.13245; q and k norm of Qwen3, arXiv 2505.09388
    """
    x = params["wte.weight"][tokens]
    layer = 0
    while f"h.{layer}.attn.qkv.weight" in params:
        w = {name.removeprefix(f"h.{layer}."): p for name, p in params.items() if name.startswith(f"h.{layer}.")}
        head_dim = w["attn.qkv.weight"].shape[0] // (n_head + 2 * n_kv_head)
        fused = _linear(rmsnorm(x, w["ln_1.weight"]), w["attn.qkv.weight"])
        q, k, v = split_qkv(fused, n_head, n_kv_head, head_dim)
        if qk_norm:
            q, k = rmsnorm(q, w["attn.q_norm.weight"]), rmsnorm(k, w["attn.k_norm.weight"])
        y = attention(rope(q, base), rope(k, base), v)
        x = x + _linear(torch.cat(y.unbind(dim=1), dim=-1), w["attn.proj.weight"])
        gate, up = w["mlp.gate_up.weight"].chunk(2, dim=0)
        x = x + gated_mlp(rmsnorm(x, w["ln_2.weight"]), gate, up, w["mlp.down.weight"], silu)
        layer += 1
    return _linear(rmsnorm(x, params["ln_f.weight"]), params["head.weight"])


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood over all positions. logits [..., V], targets [...] integer -> scalar.

    Formula: mean over positions of log(sum_j exp(z_j)) - z_target, with log-sum-exp = m + log(sum_j exp(z_j - m))
    Source: Shannon, A Mathematical Theory of Communication, 1948; m = max(z) keeps the exponentials finite
    """
    rows, labels = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).tolist()
    total = logits.new_zeros(())
    for row, label in zip(rows, labels, strict=True):
        peak = row.max()
        total = total + peak + torch.log(torch.exp(row - peak).sum()) - row[label]
    return total / len(labels)


def adamw_step(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW update, `step` counted from 1. p, g, m, v all [...] -> new (p, m, v).

    Formula: p *= 1 - lr wd; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
        p -= lr / (1 - b1^step) * m / (sqrt(v) / sqrt(1 - b2^step) + eps)
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101; Adam, arXiv 1412.6980
    """
    p = p * (1.0 - lr * weight_decay)
    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * g * g
    denominator = torch.sqrt(v) / math.sqrt(1.0 - beta2**step) + eps
    return p - lr / (1.0 - beta1**step) * m / denominator, m, v


def sgd_momentum_step(
    p: Tensor, g: Tensor, buf: Tensor | None, lr: float, momentum: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """One heavy-ball SGD update with L2 decay in the gradient. p, g, buf [...], buf None at first -> new (p, buf).

    Formula: d = g + wd p; buf = d at the first step, momentum buf + d after it; p -= lr buf
    Source: Sutskever et al., On the importance of initialization and momentum, ICML 2013, lr outside the buffer
    """
    d = g + weight_decay * p
    buf = d if buf is None else momentum * buf + d
    return p - lr * buf, buf


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Approximate orthogonal factor of a matrix, computed in float32. g [rows, cols] -> [rows, cols] float32.

    Formula: X = g / (||g||_F + 1e-7), tall matrices transposed around the loop; repeat
        X = 3.4445 X - 4.7750 (X X^T) X + 2.0315 (X X^T)^2 X
    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024
    """
    tall = g.shape[0] > g.shape[1]
    x = g.float().T if tall else g.float()
    x = x / (torch.sqrt((x * x).sum()) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.T if tall else x


def muon_step(
    p: Tensor,
    g: Tensor,
    buf: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = True,
    steps: int = 5,
) -> tuple[Tensor, Tensor]:
    """One Muon update. p, g, buf [rows, cols], buf zero at first -> new (p, buf).

    Formula: buf = momentum buf + (1 - momentum) g; u = (1 - momentum) g + momentum buf if nesterov else buf;
        p = (1 - lr wd) p - lr sqrt(max(1, rows / cols)) newton_schulz(u)
    Source: Jordan et al., Muon, 2024; decoupled decay as in Liu et al., Muon is Scalable, arXiv 2502.16982
    """
    buf = momentum * buf + (1.0 - momentum) * g
    update = (1.0 - momentum) * g + momentum * buf if nesterov else buf
    scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
    direction = newton_schulz(update, steps).to(p.dtype)
    return p * (1.0 - lr * weight_decay) - lr * scale * direction, buf


def constant(step: int, warmup: int) -> float:
    """Multiplier of the peak learning rate, `step` from 0: linear warmup, then 1.

    Formula: (step + 1) / (warmup + 1) while step < warmup, else 1
    Source: warmup of Goyal et al., arXiv 1706.02677, with nanoGPT's offset by one
    """
    return (step + 1) / (warmup + 1) if step < warmup else 1.0


def cosine(step: int, warmup: int, decay_end: int, floor: float) -> float:
    """Multiplier of the peak learning rate, `step` from 0: warmup, half a cosine, `floor` from decay_end on.

    Formula: floor + (1 - floor) (1 + cos(pi r)) / 2 with r = (step - warmup) / (decay_end - warmup)
    Source: Loshchilov and Hutter, SGDR, arXiv 1608.03983, single cycle; warmup and floor as in nanoGPT
    """
    if step < warmup:
        return constant(step, warmup)
    if step >= decay_end:
        return floor
    return floor + (1.0 - floor) * (1.0 + math.cos(math.pi * (step - warmup) / (decay_end - warmup))) / 2.0


def wsd(step: int, warmup: int, decay_start: int, decay_end: int, floor: float) -> float:
    """Multiplier of the peak learning rate, `step` from 0: warmup, stable at 1, linear decay, then `floor`.

    Formula: 1 up to decay_start; 1 - (1 - floor) (step - decay_start) / (decay_end - decay_start) up to decay_end
    Source: Hu et al., MiniCPM, arXiv 2404.06395, with a linear decay phase
    """
    if step < warmup:
        return constant(step, warmup)
    if step >= decay_end:
        return floor
    if step <= decay_start:
        return 1.0
    return 1.0 - (1.0 - floor) * (step - decay_start) / (decay_end - decay_start)


def linear(step: int, warmup: int, decay_end: int, floor: float) -> float:
    """Multiplier of the peak learning rate, `step` from 0: warmup, linear decay to `floor` at decay_end, then flat.

    Formula: 1 - (1 - floor) (step - warmup) / (decay_end - warmup)
    Source: Defazio et al., Optimal Linear Decay Learning Rate Schedules, arXiv 2310.07831
    """
    return wsd(step, warmup, warmup, decay_end, floor)


def flashnorm_fold(weight: Tensor, gain: Tensor) -> Tensor:
    """Fold a normalisation gain into the linear map after it. weight [out, in], gain [in] -> [out, in].

    Formula: folded[i, j] = weight[i, j] * gain[j], so folded x = weight (gain * x)
    Source: Graef et al., FlashNorm, arXiv 2407.09577
    """
    return torch.stack([weight[:, j] * gain[j] for j in range(weight.shape[1])], dim=1)


def clip_scale(grads: list[Tensor], max_norm: float) -> float:
    """Multiplier that global-norm clipping applies to every gradient. grads: any shapes -> float.

    Formula: min(1, max_norm / (norm + 1e-6)) with norm the square root of the sum of all squared entries, in float64
    Source: Pascanu et al., On the difficulty of training recurrent neural networks, arXiv 1211.5063
    """
    total = sum((grad.double() * grad.double()).sum().item() for grad in grads)
    return min(1.0, max_norm / (math.sqrt(total) + 1e-6))


def layout_index(parts: list[tuple[str, int]], groups: int, name: str) -> list[int]:
    """Rows of one named part in an interleaved dimension. parts: (name, rows per group) in order -> row indices.

    Formula: the dimension is `groups` repetitions of all parts in order; walk it and keep the rows labelled `name`
    Source: per-rank fused projections of Shoeybi et al., Megatron-LM, arXiv 1909.08053
    """
    if name not in [part for part, _ in parts]:
        raise KeyError(name)
    indices, row = [], 0
    for _ in range(groups):
        for part, size in parts:
            for _ in range(size):
                if part == name:
                    indices.append(row)
                row += 1
    return indices
