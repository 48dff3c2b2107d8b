"""The references for tensors made of named parts agree with hand-made examples, other references and plain torch."""

import hashlib
import math

import pytest
import reference
import reference_slices as ref
import torch
from torch import Tensor

VOCAB, POSITIONS, WIDTH, HEAD_DIM, HIDDEN = 11, 6, 8, 4, 12


def values(n_layer: int = 2, n_kv_head: int = 2, gated: bool = False, bias: bool = True) -> dict[str, Tensor]:
    """Initial values of a small model with two query heads."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCAB, WIDTH), "wpe.weight": (POSITIONS, WIDTH)}
    narrow = n_kv_head * HEAD_DIM
    for layer in range(n_layer):
        h = f"h.{layer}."
        shapes |= {f"{h}ln_1.weight": (WIDTH,), f"{h}ln_1.bias": (WIDTH,)}
        shapes |= {f"{h}attn.qkv.weight[{part}]": (narrow if part in "kv" else 8, WIDTH) for part in "qkv"}
        shapes |= {f"{h}attn.qkv.bias[{part}]": (narrow if part in "kv" else 8,) for part in "qkv"}
        shapes |= {f"{h}attn.proj.weight": (WIDTH, 8), f"{h}attn.proj.bias": (WIDTH,)}
        shapes |= {f"{h}ln_2.weight": (WIDTH,), f"{h}ln_2.bias": (WIDTH,)}
        if gated:
            shapes |= {f"{h}mlp.gate_up.weight[{part}]": (HIDDEN, WIDTH) for part in ("gate", "up")}
            shapes |= {f"{h}mlp.gate_up.bias[{part}]": (HIDDEN,) for part in ("gate", "up")}
        else:
            shapes |= {f"{h}mlp.up.weight": (HIDDEN, WIDTH), f"{h}mlp.up.bias": (HIDDEN,)}
        shapes |= {f"{h}mlp.down.weight": (WIDTH, HIDDEN), f"{h}mlp.down.bias": (WIDTH,)}
    shapes |= {"ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
    out = {}
    for address, shape in shapes.items():
        if bias or ".bias" not in address:
            out[address] = ref.initial_normal(3, address, shape, 0.3) + (1.0 if ".ln_" in f".{address}" else 0.0)
    return out


def model(n_layer: int = 2, n_kv_head: int = 2, gated: bool = False, bias: bool = True) -> ref.SeparateGPT:
    """A small model."""
    return ref.SeparateGPT(values(n_layer, n_kv_head, gated, bias), n_layer, 2, n_kv_head, HEAD_DIM, gated)


def batches(count: int, rows: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Random batches of one size."""
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randint(VOCAB, (rows, POSITIONS + 1), generator=generator) for _ in range(count)]
    return [(tokens[:, :-1], tokens[:, 1:]) for tokens in drawn]


def matrix(name: str, *shape: int) -> Tensor:
    """A fixed random tensor."""
    return ref.initial_normal(7, name, shape, 1.0)


def test_flat_indices_of_two_groups_by_hand() -> None:
    # rows: group 0 is q0 q1 k0, group 1 is q2 q3 k1; two columns
    found = ref.flat_indices((6, 2), [("q", 2), ("k", 1)], -2, 2)
    assert found == {("q",): [0, 1, 2, 3, 6, 7, 8, 9], ("k",): [4, 5, 10, 11]}
    # the same six, now along the last dimension of two rows
    found = ref.flat_indices((2, 6), [("q", 2), ("k", 1)], -1, 2)
    assert found == {("q",): [0, 1, 3, 4, 6, 7, 9, 10], ("k",): [2, 5, 8, 11]}
    # a labelled leading axis
    found = ref.flat_indices((2, 2, 2), [("u", 1), ("d", 1)], -2, 1, (("a", "b"),))
    assert found == {("a", "u"): [0, 1], ("a", "d"): [2, 3], ("b", "u"): [4, 5], ("b", "d"): [6, 7]}
    assert ref.flat_indices((2, 3), [], -1, 1) == {(): [0, 1, 2, 3, 4, 5]}


@pytest.mark.parametrize("dim", [-1, -2])
def test_flat_indices_partition_the_tensor(dim: int) -> None:
    found = ref.flat_indices((2, 3, 8, 8), [("x", 1), ("y", 3)], dim, 2, (("a", "b"), ("0", "1", "2")))
    assert len(found) == 12
    assert sorted(flat for indices in found.values() for flat in indices) == list(range(2 * 3 * 8 * 8))
    whole = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8)
    picked = whole[1, 2].index_select(2 + dim, torch.tensor([1, 2, 3, 5, 6, 7]))
    assert found["b", "2", "y"] == picked.flatten().tolist()


def test_flat_indices_refuse_what_does_not_fit() -> None:
    for shape, parts, dim, groups, stack in [
        ((5, 2), [("q", 2)], -2, 2, ()),
        ((4, 2), [("q", 2)], 0, 2, ()),
        ((4, 2), [("q", 2)], -2, 2, (("a", "b", "c", "d"),)),
        ((4, 2), [], -1, 1, (("a", "b"),)),
    ]:
        with pytest.raises(ValueError):
            ref.flat_indices(shape, parts, dim, groups, stack)


def test_initial_values() -> None:
    seed = int.from_bytes(hashlib.sha256(b"9:h.0.w[q]").digest()[:8], "little") // 2
    normal = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ref.initial_normal(9, "h.0.w[q]", (64, 128), 1.0), normal)
    assert not torch.equal(ref.initial_normal(9, "h.0.w[k]", (64, 128), 1.0), normal)
    assert ref.initial_xavier(9, "h.0.w[q]", (64, 128)).std().item() == pytest.approx(math.sqrt(2 / 192), rel=0.03)
    assert ref.initial_kaiming(9, "h.0.w[q]", (64, 128)).std().item() == pytest.approx(math.sqrt(1 / 128), rel=0.03)
    uniform = ref.initial_uniform(9, "h.0.w[q]", (64, 128), 0.5)
    assert uniform.std().item() == pytest.approx(0.5, rel=0.03)
    assert 0.85 < uniform.abs().max().item() <= 0.5 * math.sqrt(3) + 1e-6


@pytest.mark.parametrize("bias", [False, True])
def test_plain_model_is_gpt2(bias: bool) -> None:
    built, tokens = model(bias=bias), batches(1)[0][0]
    fused: dict[str, Tensor] = {}
    for address, p in built.p.items():
        name = address.partition("[")[0]
        fused[name] = torch.cat([fused[name], p]) if name in fused else p
    expected = reference.gpt2_forward(fused, tokens, 2)
    torch.testing.assert_close(built.logits(tokens), expected)


def test_gated_grouped_block_from_its_parts() -> None:
    built, tokens = model(1, n_kv_head=1, gated=True, bias=False), batches(1)[0][0]
    w = {address.removeprefix("h.0."): p for address, p in built.p.items()}
    x = w["wte.weight"][tokens] + w["wpe.weight"]
    y = reference.layernorm(x, w["ln_1.weight"], None)
    q, k, v = ((y @ w[f"attn.qkv.weight[{part}]"].T).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in "qkv")
    y = torch.cat(reference.attention(q, k, v).unbind(dim=1), dim=-1)
    x = x + y @ w["attn.proj.weight"].T
    y = reference.layernorm(x, w["ln_2.weight"], None)
    gate, up = w["mlp.gate_up.weight[gate]"], w["mlp.gate_up.weight[up]"]
    x = x + reference.gated_mlp(y, gate, up, w["mlp.down.weight"], reference.gelu)
    expected = reference.layernorm(x, w["ln_f.weight"], None) @ w["wte.weight"].T
    torch.testing.assert_close(built.logits(tokens), expected)


@pytest.mark.parametrize("gated", [False, True])
def test_model_is_causal_and_head_may_be_untied(gated: bool) -> None:
    built, tokens = model(n_kv_head=1, gated=gated), batches(1)[0][0]
    changed = tokens.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % VOCAB
    before, after = built.logits(tokens), built.logits(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])
    untied = values(gated=gated) | {"head.weight": torch.zeros(VOCAB, WIDTH)}
    assert not ref.SeparateGPT(untied, 2, 2, 2, HEAD_DIM, gated).logits(tokens).any()
    with pytest.raises(KeyError):
        ref.SeparateGPT(untied | {"h.0.attn.qkv.weight": torch.zeros(1)}, 2, 2, 2, HEAD_DIM, gated)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "lion"])
def test_training_lowers_the_loss_and_keeps_frozen_parts(optimizer: str, autocast: bool) -> None:
    built, (batch,) = model(gated=True, n_kv_head=1), batches(1)
    frozen = {"h.0.attn.qkv.weight[k]", "h.1.mlp.gate_up.weight[up]", "ln_f.bias"}
    settings = {}
    for address, p in built.p.items():
        kind = "adamw" if optimizer == "muon" and p.ndim == 1 else optimizer
        settings[address] = ref.Settings(0.1 if kind == "sgd" else 0.01, 0.1, address in frozen, kind)
    before = {address: p.detach().clone() for address, p in built.p.items()}
    losses = ref.train_separately(built, settings, [batch] * 12, autocast=autocast)
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]
    assert {address for address, p in built.p.items() if torch.equal(p, before[address])} == frozen


@pytest.mark.parametrize("grad_clip", [0.3, 1000.0, None])
def test_updates_are_those_of_the_formulas(grad_clip: float | None) -> None:
    built = model(1)
    start = {address: p.detach().clone() for address, p in built.p.items()}
    kinds = {"wte.weight": "sgd", "h.0.mlp.up.weight": "muon", "h.0.mlp.down.weight": "lion"}
    settings = {a: ref.Settings(0.01 * (i + 1), 0.05 * i, a == "wpe.weight") for i, a in enumerate(built.p)}
    for address, kind in kinds.items():
        settings[address].optimizer = kind
    factors = [0.5, 0.25]
    drawn = batches(4)
    # the same two steps, from a fresh model's gradients and the formulas of the other reference module
    p = dict(start)
    m = {a: torch.zeros_like(v) for a, v in p.items()}
    v = {a: torch.zeros_like(v) for a, v in p.items()}
    buf: Tensor | None = None
    expected_losses = []
    for step in range(2):
        fresh = ref.SeparateGPT(p, 1, 2, 2, HEAD_DIM, False)
        loss = (fresh.loss(*drawn[2 * step]) + fresh.loss(*drawn[2 * step + 1])) / 2
        expected_losses.append(loss.item())
        trained = [a for a in p if a != "wpe.weight"]
        grads = dict(zip(trained, torch.autograd.grad(loss, [fresh.p[a] for a in trained]), strict=True))
        scale = 1.0 if grad_clip is None else reference.clip_scale(list(grads.values()), grad_clip)
        assert (scale < 1.0) == (grad_clip == 0.3)
        for a, g in grads.items():
            own, g = settings[a], g * scale
            lr, decay = own.lr * factors[step], own.weight_decay
            if own.optimizer == "sgd":
                p[a], buf = reference.sgd_momentum_step(p[a], g, buf, lr, 0.8, decay)
            elif own.optimizer == "muon":
                p[a], m[a] = reference.muon_step(p[a], g, m[a], lr, 0.95, decay)
            elif own.optimizer == "lion":
                p[a] = p[a] * (1 - lr * decay) - lr * torch.sign(0.9 * m[a] + 0.1 * g)
                m[a] = 0.95 * m[a] + 0.05 * g
            else:
                p[a], m[a], v[a] = reference.adamw_step(p[a], g, m[a], v[a], step + 1, lr, 0.9, 0.95, 1e-8, decay)
    losses = ref.train_separately(
        built, settings, drawn, betas=(0.9, 0.95), momentum=0.8, grad_clip=grad_clip, accumulation=2, factors=factors
    )
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert built.p["wpe.weight"].grad is None
    # the key bias has no true gradient (softmax ignores it), so AdamW turns its rounding errors into steps
    exact = [a for a in p if a != "h.0.attn.qkv.bias[k]"]
    torch.testing.assert_close({a: built.p[a].detach() for a in exact}, {a: p[a] for a in exact}, rtol=1e-3, atol=1e-4)


def test_muon_scales_an_orthogonal_matrix() -> None:
    q = torch.linalg.qr(matrix("q", 8, 8)).Q
    s = 1.0 / math.sqrt(8)  # every singular value, which each iteration maps by one polynomial
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(ref.orthogonalised(5.0 * q), s * q)
    tall = matrix("tall", 12, 4)
    torch.testing.assert_close(ref.orthogonalised(tall), ref.orthogonalised(tall.T.contiguous()).T)
    torch.testing.assert_close(ref.orthogonalised(tall), reference.newton_schulz(tall), rtol=1e-4, atol=1e-5)


def test_lora_and_dora() -> None:
    x, weight, bias = matrix("x", 2, 3, 6), matrix("w", 5, 6), matrix("bias", 5)
    a, b, zero = matrix("a", 4, 6), matrix("b", 5, 4), torch.zeros(5, 4)
    base = torch.nn.functional.linear(x, weight, bias)
    norms = weight.norm(dim=1)
    torch.testing.assert_close(ref.lora_linear(x, weight, bias, a, zero, 8.0, 4), base)
    torch.testing.assert_close(ref.dora_linear(x, weight, bias, a, zero, 8.0, 4, norms), base)
    for rslora, scale in [(False, 2.0), (True, 4.0)]:
        merged = ref.lora_merged(weight, a, b, 8.0, 4, rslora)
        torch.testing.assert_close(merged, weight + scale * b @ a)
        adapted = ref.lora_linear(x, weight, bias, a, b, 8.0, 4, rslora)
        torch.testing.assert_close(adapted, torch.nn.functional.linear(x, merged, bias), rtol=1e-4, atol=1e-4)
    magnitude = matrix("m", 5).abs() + 0.5
    dora = ref.dora_merged(weight, a, b, 8.0, 4, magnitude)
    torch.testing.assert_close(dora.norm(dim=1), magnitude)
    torch.testing.assert_close(torch.cosine_similarity(dora, weight + 2.0 * b @ a, dim=1), torch.ones(5))


def test_dora_norm_is_constant_for_the_gradient() -> None:
    weight, a, magnitude = matrix("w", 5, 6), matrix("a", 4, 6), matrix("m", 5).abs() + 0.5
    b, seed = matrix("b", 5, 4).requires_grad_(), matrix("seed", 5, 6)
    (found,) = torch.autograd.grad(ref.dora_merged(weight, a, b, 8.0, 4, magnitude), b, seed)
    norms = (weight + 2.0 * b.detach() @ a).norm(dim=1)
    torch.testing.assert_close(found, (magnitude / norms).unsqueeze(1) * (2.0 * seed @ a.T), rtol=1e-4, atol=1e-5)


def test_adapters_on_some_parts() -> None:
    x, wq, wk, wv, bv = matrix("x", 2, 6), matrix("q", 8, 6), matrix("k", 4, 6), matrix("v", 4, 6), matrix("bv", 4)
    lora = ref.Adapter(matrix("qa", 2, 6), matrix("qb", 8, 2), 4.0, 2)
    dora = ref.Adapter(matrix("va", 3, 6), matrix("vb", 4, 3), 4.0, 3, magnitude=torch.ones(4))
    found = ref.separate_qkv_lora(x, [(wq, None, lora), (wk, None, None), (wv, bv, dora)])
    assert found.shape == (2, 16)
    q, k, v = found.split([8, 4, 4], dim=-1)
    torch.testing.assert_close(q, ref.lora_linear(x, wq, None, lora.a, lora.b, 4.0, 2))
    torch.testing.assert_close(k, x @ wk.T)
    torch.testing.assert_close(v, ref.dora_linear(x, wv, bv, dora.a, dora.b, 4.0, 3, torch.ones(4)))
