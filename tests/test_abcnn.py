"""ABCNN and its pooling against loops written from the paper's equations, and the contract of the module."""

import copy
import io
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from gatematch.attention import ABCNN, attention_pool, pairwise_attention

KINDS = ["bcnn", "abcnn1", "abcnn2", "abcnn3"]
VARIANTS = ["official", "paper"]


# The equations, one pair at a time, a sentence being a list of columns (1-D tensors).


def attention(F0, F1):
    return [[1 / (1 + math.sqrt(((x - y) ** 2).sum())) for y in F1] for x in F0]


def attention_features(weight, A):
    """Column i of W·Aᵀ: Σ_j A[i, j] · W[:, j]."""
    return [sum(score * weight[:, j] for j, score in enumerate(row)) for row in A]


def wide_convolution(columns, weight, bias):
    """p_t = tanh(W·c_t + b) with c_t = [v_{t-w+1}; ...; v_t] and zeros outside of the sentence."""
    w, result = weight.shape[2], []
    for t in range(len(columns) + w - 1):
        total = bias.clone()
        for k in range(w):
            i = t - w + 1 + k
            if 0 <= i < len(columns):
                total += weight[:, :, k] @ columns[i]
        result.append(torch.tanh(total))
    return result


def w_ap(columns, w, weights):
    result = []
    for j in range(len(columns) - w + 1):
        result.append(sum(weights[k] * columns[k] for k in range(j, j + w)))
    return result


def cosine(x, y):
    norms = math.sqrt((x**2).sum()) * math.sqrt((y**2).sum())
    return float((x * y).sum()) / norms if norms else 0.0


def expected(model, F0, F1):
    """Similarities and all-ap vectors of one pair of sentences without padding."""
    official, w, F = model.variant == "official", model.width, [list(F0), list(F1)]
    if not official:
        F = [side + [torch.zeros_like(side[0])] * (model.length - len(side)) for side in F]
    tops = [tuple(sum(side) / len(side) for side in F)]
    for block in model.blocks:
        if model.kind in ("abcnn1", "abcnn3"):
            A = attention(*F)
            transposed = [list(column) for column in zip(*A, strict=True)]
            W0 = block.attention.weight_q
            W1 = W0 if official else block.attention.weight_a
            extra = attention_features(W0, A), attention_features(W1, transposed)
            F = [[torch.cat(c) for c in zip(*side, strict=True)] for side in zip(F, extra, strict=True)]
        F = [wide_convolution(side, block.weight, block.bias) for side in F]
        flat = [[1 / len(side)] * len(side) for side in F]
        windows, whole = [[1 / w] * len(side) for side in F], flat
        if model.kind in ("abcnn2", "abcnn3"):
            A = attention(*F)
            windows = [sum(row) for row in A], [sum(column) for column in zip(*A, strict=True)]
            if official:
                windows = whole = [[x / sum(weights) for x in weights] for weights in windows]
        tops.append(
            tuple(
                sum(x * c for x, c in zip(weights, side, strict=True))
                for weights, side in zip(whole, F, strict=True)
            )
        )
        F = [w_ap(side, w, weights) for side, weights in zip(F, windows, strict=True)]
    return [cosine(*level) for level in tops], tops


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def lively(model):
    """Biases as after training: pads then show in the convolutions."""
    with torch.no_grad():
        for block in model.blocks:
            block.bias.normal_(std=0.5)
    return model


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_equations(kind, variant, blocks):
    for width, Q, A in ((1, 3, 4), (3, 5, 2), (4, 1, 7), (2, 1, 1)):
        model = lively(
            ABCNN(
                3,
                length=7,
                channels=5,
                width=width,
                blocks=blocks,
                kind=kind,
                variant=variant,
                dtype=torch.float64,
            )
        )
        q, a = double(3, Q, 3), double(3, A, 3)
        a[0, 0] = q[0, 0]  # a shared word
        with torch.no_grad():
            got, levels = model(q, a), model.representations(q, a)
            assert got.shape == (3, blocks + 1)
            for b in range(3):
                want, tops = expected(model, q[b], a[b])
                torch.testing.assert_close(got[b].tolist(), want, rtol=0, atol=1e-10)
                for level, top in zip(levels, tops, strict=True):
                    torch.testing.assert_close((level.q[b], level.a[b]), top, rtol=0, atol=1e-10)
            torch.testing.assert_close(model(q[1], a[1]), got[1], rtol=0, atol=1e-10)  # unbatched


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_against_the_equations_whatever_padding_holds(kind, variant, blocks):
    model = lively(
        ABCNN(
            3, length=7, channels=5, width=3, blocks=blocks, kind=kind, variant=variant, dtype=torch.float64
        )
    )
    q_lengths, a_lengths = torch.tensor([5, 1, 4]), torch.tensor([1, 6, 3], dtype=torch.uint8)
    q, a = double(3, 5, 3), double(3, 6, 3)
    for rows, lengths in ((q, q_lengths), (a, a_lengths)):
        for b, n in enumerate(lengths.tolist()):
            rows[b, n:] = math.nan
    q.requires_grad_(), a.requires_grad_()
    got = model(q, a, q_lengths, a_lengths)
    with torch.no_grad():
        levels = model.representations(q, a, q_lengths, a_lengths)
        for b in range(3):
            want, tops = expected(model, q[b, : q_lengths[b]], a[b, : a_lengths[b]])
            torch.testing.assert_close(got[b].tolist(), want, rtol=0, atol=1e-10)
            for level, top in zip(levels, tops, strict=True):
                torch.testing.assert_close((level.q[b], level.a[b]), top, rtol=0, atol=1e-10)
        one_side = model(q[:1], a[:1], a_lengths=a_lengths[:1])
        torch.testing.assert_close(one_side, got[:1], rtol=0, atol=1e-10)
    got.sum().backward()
    for rows, lengths in ((q, q_lengths), (a, a_lengths)):
        for b, n in enumerate(lengths.tolist()):
            assert rows.grad[b, :n].abs().sum(1).min() > 0 and not rows.grad[b, n:].any()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_in_the_official_variant_and_does_in_the_papers(kind):
    q, a = double(2, 3, 4), double(2, 5, 4)
    more_q, more_a = torch.cat([q, double(2, 4, 4)], 1), torch.cat([a, double(2, 1, 4)], 1)
    lengths = torch.full((2,), 3), torch.full((2,), 5)
    official = lively(ABCNN(4, length=8, channels=5, width=3, blocks=2, kind=kind, dtype=torch.float64))
    torch.testing.assert_close(official(more_q, more_a, *lengths), official(q, a), rtol=0, atol=1e-12)
    paper = lively(
        ABCNN(4, length=8, channels=5, width=3, blocks=2, kind=kind, variant="paper", dtype=torch.float64)
    )
    torch.testing.assert_close(paper(more_q, more_a, *lengths), paper(q, a), rtol=0, atol=1e-12)
    longer = lively(
        ABCNN(4, length=9, channels=5, width=3, blocks=2, kind=kind, variant="paper", dtype=torch.float64)
    )
    for block, other in zip(longer.blocks, paper.blocks, strict=True):
        block.weight, block.bias = other.weight, other.bias
        if block.attention is not None:
            with torch.no_grad():
                block.attention.weight_q[:, :8] = other.attention.weight_q
                block.attention.weight_a[:, :8] = other.attention.weight_a
    assert (longer(q, a) - paper(q, a))[:, 1:].abs().max() > 1e-6  # one more pad on each side


def test_one_block_of_the_papers_abcnn2_is_bcnn_and_the_authors_is_not():
    q, a = double(2, 3, 4), double(2, 5, 4)
    for variant in VARIANTS:
        one, two = (
            ABCNN(4, length=8, channels=5, width=3, blocks=1, kind=kind, variant=variant, dtype=torch.float64)
            for kind in ("bcnn", "abcnn2")
        )
        two.load_state_dict(one.state_dict())
        assert torch.equal(one(q, a), two(q, a)) == (variant == "paper")


MEMORY = """
import resource, torch
from gatematch.attention import ABCNN
def run(L):
    model = ABCNN(8, length=L, channels=8, width=3, blocks=2, kind="abcnn2", variant="{variant}")
    q, a = torch.randn(1, L, 8, requires_grad=True), torch.randn(1, L, 8)
    model(q, a).sum().backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
run(1024)
before = peak()
run(4096)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts bytes elsewhere")
@pytest.mark.parametrize("variant", VARIANTS)
def test_abcnn2_never_builds_the_attention(variant):
    command = [sys.executable, "-I", "-c", MEMORY.format(variant=variant)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(out.stdout) < 0.5 * 4096 * 4096 * 4


@pytest.mark.parametrize("normalize", [False, True])
def test_attention_pool_against_the_equation(normalize):
    q, a = double(2, 6, 3), double(2, 4, 3)
    for lengths in ((None, None), (torch.tensor([6, 3], dtype=torch.uint8), torch.tensor([1, 4]))):
        given = []
        for rows, n in zip((q, a), lengths, strict=True):
            rows = rows.clone()
            if n is not None:
                for b in range(2):
                    rows[b, n[b] :] = math.nan
            given.append(rows.requires_grad_())
        P = attention_pool(*given, 2, *lengths, normalize=normalize)
        assert P[0].shape == (2, 5, 3) and P[1].shape == (2, 3, 3)
        for b in range(2):
            n, m = (len(rows[b]) if k is None else k[b] for rows, k in zip((q, a), lengths, strict=True))
            S = pairwise_attention(q[b, :n], a[b, :m])
            for got, rows, weights in ((P[0], q[b, :n], S.sum(1)), (P[1], a[b, :m], S.sum(0))):
                weights = weights / weights.sum() if normalize else weights
                want = w_ap(rows, 2, weights) + [torch.zeros(3)] * got.shape[1]
                torch.testing.assert_close(got[b].detach(), torch.stack(want[: got.shape[1]]).double())
        torch.stack([p.square().sum() for p in P]).sum().backward()
        assert all(rows.grad.isfinite().all() for rows in given)
    torch.testing.assert_close(attention_pool(q[0], a[0], 2)[0], attention_pool(q[:1], a[:1], 2)[0][0])


def test_attention_pool_passes_its_path_on():
    with pytest.raises(ValueError, match="the kernels run on CUDA; got cpu"):
        attention_pool(q0, a0, 2, impl="triton")
    with pytest.raises(ValueError, match="precision: expected one of 'float32', 'tf32'"):
        attention_pool(q0, a0, 2, precision="bf16")
    same = attention_pool(q0, a0, 2, impl="torch", precision="tf32")
    torch.testing.assert_close(same, attention_pool(q0, a0, 2))


def test_float16_weights_of_long_sentences_are_shares():
    """The sum of all scores is past the largest float16, 65504."""
    q = torch.randn(1, 1, 4).expand(1, 400, 4) + 0.01 * torch.randn(1, 400, 4)
    model = ABCNN(4, length=400, channels=5, width=3, kind="abcnn2")
    want, pooled = model(q, q), attention_pool(q, q, 3, normalize=True)[0]
    half = copy.deepcopy(model).half()
    torch.testing.assert_close(half(q.half(), q.half()).float(), want, rtol=0, atol=0.01)
    torch.testing.assert_close(
        attention_pool(q.half(), q.half(), 3, normalize=True)[0].float(), pooled, rtol=0.01, atol=1e-4
    )
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(model(q, q).float(), want, rtol=0, atol=0.01)


def test_lengths_of_unsigned_types():
    q, a = double(2, 5, 2), double(2, 4, 2)
    model = lively(ABCNN(2, length=5, channels=3, dtype=torch.float64))
    for unsigned in (torch.uint16, torch.uint32, torch.uint64):
        lengths = torch.tensor([5, 2], dtype=unsigned), torch.tensor([0, 4], dtype=unsigned)
        whole = [n.long() for n in lengths]
        assert torch.equal(model(q, a, *lengths), model(q, a, *whole))
        assert torch.equal(attention_pool(q, a, 2, *lengths)[0], attention_pool(q, a, 2, *whole)[0])
        with pytest.raises(ValueError, match="q_lengths: expected values from 0 to Q = 5, got 6"):
            model(q, a, torch.tensor([0, 6], dtype=unsigned))


def test_lengths_of_small_integer_types_do_not_wrap_around():
    q, a = double(1, 127, 2), double(1, 3, 2)
    model = lively(ABCNN(2, length=127, channels=3, dtype=torch.float64))
    for small in (torch.int8, torch.uint8):
        lengths = torch.tensor([126], dtype=small), torch.tensor([3], dtype=small)
        assert torch.equal(model(q, a, *lengths), model(q, a, *(n.long() for n in lengths)))
        assert not attention_pool(q, a, 3, torch.tensor([1], dtype=small))[0].any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind, variant):
    model = lively(
        ABCNN(
            2,
            length=4,
            channels=2,
            width=2,
            blocks=2,
            kind=kind,
            variant=variant,
            classes=2,
            dtype=torch.float64,
        )
    )
    names = dict(model.named_parameters())
    q, a = double(2, 3, 2).requires_grad_(), double(2, 4, 2).requires_grad_()
    lengths = torch.tensor([3, 2]), torch.tensor([1, 4])

    def function(q, a, *parameters):
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, weights, (q, a, *lengths))

    assert gradcheck(function, (q, a, *names.values()))
    assert gradgradcheck(lambda q, a: model(q, a, *lengths), (q, a))


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivatives_beside_an_empty_sentence(variant):
    model = ABCNN(
        2, length=4, channels=2, width=2, blocks=2, kind="bcnn", variant=variant, dtype=torch.float64
    )
    q, a = double(2, 3, 2).requires_grad_(), double(2, 4, 2).requires_grad_()
    lengths = torch.tensor([3, 0]), torch.tensor([0, 4])
    assert gradgradcheck(lambda q, a: model(q, a, *lengths), (q, a))
    inputs = (q, a, *model.parameters())
    grads = torch.autograd.grad(model(q, a, *lengths).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)
    assert all(grad.isfinite().all() for grad in (*grads, *second))


def test_similarities_of_tiny_and_huge_vectors():
    q, a = torch.randn(3, 5, 4), torch.randn(3, 6, 4)
    model = ABCNN(4, length=6, kind="bcnn")
    for scale in (1e-25, 1e25):
        torch.testing.assert_close(model(q * scale, a / scale)[:, 0], model(q, a)[:, 0])
        grad = torch.autograd.grad(model(x := (q * scale).requires_grad_(), a)[:, 0].sum(), x)[0]
        want = torch.autograd.grad(model(x := q.clone().requires_grad_(), a)[:, 0].sum(), x)[0]
        torch.testing.assert_close(grad * scale, want)


def test_similarities_do_not_pass_one_and_keep_their_derivatives_there():
    q = torch.randn(500, 5, 7)
    similarities = ABCNN(7, length=5, kind="bcnn")(q, torch.cat([q[:250], -q[250:]]))[:, 0]
    assert similarities.max() == 1 and similarities.min() == -1

    x = torch.randn(500, 1, 7).requires_grad_()
    (grad,) = torch.autograd.grad(ABCNN(7, length=5)(x, x.detach())[:, 0].sum(), x, create_graph=True)
    direction = torch.randn_like(x)
    (second,) = torch.autograd.grad(grad, x, direction)
    unit = x.detach() / x.detach().norm(dim=2, keepdim=True)
    across = direction - (direction * unit).sum(2, keepdim=True) * unit
    want = -across / x.detach().square().sum(2, keepdim=True)
    torch.testing.assert_close(second, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_and_empty_sentences_and_zero_vectors_are_finite(variant, dtype):
    for width in (1, 4):
        model = ABCNN(4, length=6, channels=5, width=width, variant=variant, dtype=dtype)
        q = torch.randn(3, 5, 4).to(dtype)
        q[1] = 0
        q.requires_grad_()
        for lengths in ((None, None), (torch.tensor([5, 3, 0]),) * 2, (torch.tensor([0, 0, 2]), None)):
            similarities = model(q, q, *lengths)
            assert similarities.dtype == dtype and similarities.abs().max() <= 1
            similarities.sum().backward()
            assert q.grad.isfinite().all()
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        same = model(q[:1], q[:1])
        torch.testing.assert_close(same[:, 0].float(), torch.ones(1), rtol=0, atol=1e-2)


def test_a_zero_vector_gets_a_bounded_gradient():
    q, a = torch.zeros(1, 3, 4, requires_grad=True), torch.randn(1, 5, 4)
    model = ABCNN(4, length=6)
    model(q, a).sum().backward()
    assert q.grad.abs().max() < 10
    assert all(parameter.grad.abs().max() < 100 for parameter in model.parameters())


def test_low_precision_and_autocast_are_near_float32():
    q, a = torch.randn(4, 6, 8), torch.randn(4, 7, 8)
    lengths = torch.tensor([6, 3, 2, 1]), torch.tensor([1, 7, 4, 2])
    for kind in KINDS:
        model = ABCNN(8, length=7, channels=6, width=3, kind=kind)
        want = model(q, a, *lengths)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                got = model(q, a, *lengths)
            assert (got.float() - want).abs().max() < 0.05
            got.sum().backward()
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        half = copy.deepcopy(model).bfloat16()
        assert (half(q.bfloat16(), a.bfloat16(), *lengths).float() - want).abs().max() < 0.1


def test_embedding_gives_what_its_vectors_give_and_learns():
    embedding = nn.Embedding(9, 4, padding_idx=0)
    model = ABCNN(4, length=6, embedding=embedding)
    plain = ABCNN(4, length=6)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("embedding.")})
    q, a = torch.randint(1, 9, (3, 5)), torch.randint(1, 9, (3, 6), dtype=torch.int32)
    lengths = torch.tensor([5, 2, 1]), torch.tensor([6, 1, 3])
    got = model(q, a, *lengths)
    assert torch.equal(got, plain(embedding(q), embedding(a), *lengths))
    torch.testing.assert_close(model(q[0], a[0]), model(q[:1], a[:1])[0])
    got.sum().backward()
    used = {int(i) for b in range(3) for i in (*q[b, : lengths[0][b]], *a[b, : lengths[1][b]])}
    assert set(embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist()) == used
    before = embedding.weight.clone()
    model.reset_parameters()
    assert torch.equal(embedding.weight, before)


def test_parameters_state_copies_and_repr():
    model = ABCNN(4, length=6, channels=5, width=3, blocks=2, kind="abcnn3", variant="paper", classes=2)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {
        "blocks.0.attention.weight_q": (4, 6),
        "blocks.0.attention.weight_a": (4, 6),
        "blocks.0.weight": (5, 8, 3),
        "blocks.0.bias": (5,),
        "blocks.1.attention.weight_q": (5, 6),
        "blocks.1.attention.weight_a": (5, 6),
        "blocks.1.weight": (5, 10, 3),
        "blocks.1.bias": (5,),
        "classifier.weight": (2, 3),
        "classifier.bias": (2,),
    }
    assert "4, length=6, channels=5, width=3, kind='abcnn3', variant='paper'" in repr(model)
    q, a = torch.randn(2, 5, 4), torch.randn(2, 6, 4)
    want = model(q, a)
    assert want.shape == (2, 2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = ABCNN(4, length=6, channels=5, width=3, blocks=2, kind="abcnn3", variant="paper", classes=2)
    assert not torch.equal(other(q, a), want)
    other.load_state_dict(torch.load(file, weights_only=True))
    for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(q, a), want)
    assert model.blocks[0].attention.weight_q is not model.blocks[0].attention.weight_a
    official = copy.deepcopy(ABCNN(4, length=6))
    assert not any(name.endswith("weight_a") for name in official.state_dict())
    assert len(list(official.parameters())) == 2 * 3  # one attention weight, one convolution a block


def test_a_replica_as_data_parallel_makes_them():
    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            replica._modules[name] = replicate(child)
        for name, parameter in module.named_parameters(recurse=False):
            setattr(replica, name, parameter.clone())
        return replica

    for variant in VARIANTS:
        model = ABCNN(4, length=6, variant=variant, classes=2)
        replica = replicate(model)
        assert not list(replica.parameters())
        assert torch.equal(replica(q0, a0), model(q0, a0))


def test_autocast_does_not_unite_float64_with_others():
    with torch.autocast("cpu", torch.bfloat16):
        double = ABCNN(4, length=5, dtype=torch.float64)
        assert double(q0.double(), a0.double()).isfinite().all()
        ABCNN(4, length=5, dtype=torch.bfloat16)(q0, a0)
        with pytest.raises(TypeError, match=r"dtype torch\.float32 as the weights, got torch\.float64"):
            ABCNN(4, length=5)(q0.double(), a0.double())
        with pytest.raises(TypeError, match=r"dtype torch\.float64 as the weights, got torch\.float32"):
            double(q0, a0)


def test_it_learns_to_tell_pairs_that_share_a_word():
    words = torch.randn(30, 8)
    model = ABCNN(8, length=6, channels=16, width=3, blocks=2, classes=1)
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    losses = []
    for _ in range(100):
        left, right = torch.randint(0, 15, (64, 5)), torch.randint(15, 30, (64, 6))
        target = torch.randint(0, 2, (64,))
        right[:, 2] = torch.where(target == 1, left[:, 3], right[:, 2])
        loss = nn.functional.binary_cross_entropy_with_logits(
            model(words[left], words[right])[:, 0], target.float()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])  # the worst of 60 seeds ends at 0.21 times


q0, a0 = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
by_id = ABCNN(4, length=5, embedding=nn.Embedding(9, 4))
ids = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ABCNN(0, length=5), ValueError, "features: expected at least 1, got 0"),
        (lambda: ABCNN(4, length=5.0), TypeError, "length: expected an int, got float"),
        (lambda: ABCNN(4, length=5, channels=True), TypeError, "channels: expected an int, got bool"),
        (lambda: ABCNN(4, length=5, width=0), ValueError, "width: expected at least 1, got 0"),
        (lambda: ABCNN(4, length=5, blocks=0), ValueError, "blocks: expected at least 1, got 0"),
        (lambda: ABCNN(4, length=5, classes=0), ValueError, "classes: expected at least 1, got 0"),
        (
            lambda: ABCNN(4, length=5, kind="abcnn4"),
            ValueError,
            "kind: expected one of 'bcnn', .*, got 'abcnn4'",
        ),
        (
            lambda: ABCNN(4, length=5, variant="own"),
            ValueError,
            "variant: expected one of 'official', 'paper', got 'own'",
        ),
        (
            lambda: ABCNN(4, length=5, embedding=9),
            TypeError,
            r"embedding: expected a torch\.nn\.Embedding, got int",
        ),
        (
            lambda: ABCNN(4, length=5, embedding=nn.Embedding(9, 3)),
            ValueError,
            "embedding: expected features = 4 columns, got 3",
        ),
        (lambda: ABCNN(4, length=4)(q0, a0), ValueError, "a: expected from 1 to length = 4 rows, got 5"),
        (
            lambda: ABCNN(4, length=5)(q0[:, :0], a0),
            ValueError,
            "q: expected from 1 to length = 5 rows, got 0",
        ),
        (lambda: ABCNN(3, length=5)(q0, a0), ValueError, "q: expected features = 3 columns, got shape"),
        (
            lambda: ABCNN(4, length=5)(q0[..., :3], a0),
            ValueError,
            "q: expected features = 4 columns, got shape",
        ),
        (
            lambda: ABCNN(4, length=5)(q0.double(), a0),
            TypeError,
            "q: expected dtype torch.float32 as the weights, got torch.float64",
        ),
        (
            lambda: ABCNN(4, length=5)(q0, a0[..., :3]),
            ValueError,
            r"a: expected shape \(2, any, 4\), got \(2, 5, 3\)",
        ),
        (
            lambda: ABCNN(4, length=5)(q0, a0[:1]),
            ValueError,
            r"a: expected shape \(2, any, 4\), got \(1, 5, 4\)",
        ),
        (lambda: ABCNN(4, length=5)(q0.tolist(), a0), TypeError, "q: expected a Tensor, got list"),
        (
            lambda: ABCNN(4, length=5)(ids, ids),
            TypeError,
            "q: expected dtype torch.float64, .*, got torch.int64",
        ),
        (
            lambda: ABCNN(4, length=5)(q0.double(), a0.double()),
            TypeError,
            "q: expected dtype torch.float32 as the weights, got torch.float64",
        ),
        (
            lambda: ABCNN(4, length=5, device="meta")(q0, a0),
            ValueError,
            "q: expected device meta as the weights, got cpu",
        ),
        (
            lambda: ABCNN(4, length=5)(q0, a0, torch.ones(3).long()),
            ValueError,
            r"q_lengths: expected shape \(2,\)",
        ),
        (
            lambda: ABCNN(4, length=5)(q0, a0, a_lengths=torch.tensor([1, 6])),
            ValueError,
            "a_lengths: expected values from 0 to A = 5, got 6",
        ),
        (
            lambda: by_id(q0, ids),
            TypeError,
            "q: expected dtype torch.int32 or torch.int64, got torch.float32",
        ),
        (lambda: by_id(ids, ids.tolist()), TypeError, "a: expected a Tensor, got list"),
        (lambda: by_id(ids, ids[None]), ValueError, r"a: expected shape \(B, A\) or \(A,\), got \(1, 2, 3\)"),
        (
            lambda: by_id(ids, ids + 9),
            ValueError,
            "a: expected values from 0 to num_embeddings - 1 = 8, got 9;",
        ),
        (lambda: by_id(ids - 1, ids), ValueError, "q: expected values from 0 to .* = 8, got -1; padding has"),
        (lambda: by_id(ids.to("meta"), ids), ValueError, "q: expected device cpu as the embedding, got meta"),
        (
            lambda: ABCNN(4, length=5, embedding=nn.Embedding(9, 4, dtype=torch.float64))(ids, ids),
            TypeError,
            "embedding: expected dtype torch.float32 as the weights, got torch.float64",
        ),
        (
            lambda: ABCNN(4, length=5, embedding=nn.Embedding(9, 4), device="meta")(ids, ids),
            ValueError,
            "embedding: expected device meta as the weights, got cpu",
        ),
        (
            lambda: ABCNN(4, length=5, dtype=torch.complex64),
            TypeError,
            "dtype: expected dtype torch.float64, .*, got torch.complex64",
        ),
        (
            lambda: ABCNN(4, length=5, dtype=torch.int64),
            TypeError,
            "dtype: expected dtype torch.float64, .*, got torch.int64",
        ),
        (lambda: by_id(ids, ids[:1]), ValueError, r"a: expected shape \(2, any, 4\), got \(1, 3, 4\)"),
        (lambda: attention_pool(q0, a0, 4), ValueError, "q: expected at least width = 4 rows, got 3"),
        (lambda: attention_pool(q0, a0, 0), ValueError, "width: expected at least 1, got 0"),
        (lambda: attention_pool(q0, a0, 2.0), TypeError, "width: expected an int, got float"),
        (lambda: attention_pool(q0, a0, 2, normalize=1), TypeError, "normalize: expected a bool, got int"),
        (lambda: attention_pool(q0, a0.double(), 2), TypeError, "a: expected dtype torch.float32 as q"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()
