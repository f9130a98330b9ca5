"""Head sharing's algebra in fp64: what alignment keeps, what pooling loses, which groups form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.compiler.solvers.heads import (
    Heads,
    Maps,
    adjacent,
    align,
    distances,
    grouped,
    metric,
    scales,
    share,
    spread,
    turns,
)

H, KV, D, E, N, M = 8, 4, 6, 4, 10, 12
ROTARY = Maps(torch.stack([torch.arange(3), torch.arange(3, 6)], 1), torch.empty(0).long(), True)


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def orthogonal(size, seed):
    return torch.linalg.qr(rand(size, size, seed=seed))[0]


def rotary(angles, size=1.0):
    """[D, D] that rotates pair (i, i + D/2) by angles [D/2] and scales it."""
    half = len(angles)
    out = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
    i = torch.arange(half)
    out[i, i] = out[i + half, i + half] = angles.cos() * size
    out[i, i + half], out[i + half, i] = -angles.sin() * size, angles.sin() * size
    return out


def heads(kv=KV, seed=0):
    return Heads(
        rand(H, D, N, seed=seed), rand(kv, D, N, seed=seed + 1), rand(kv, E, N, seed=seed + 2),
        rand(H, E, M, seed=seed + 3),
    )  # fmt: skip


def attention(h, x):
    """Causal attention with rotation by position, x [T, n] -> [T, m]."""
    where = torch.arange(len(x), dtype=torch.float64)[:, None]
    speed = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)
    cos, sin = (f(where * speed).repeat(1, 2) for f in (torch.cos, torch.sin))

    def rope(z):
        half = z.shape[-1] // 2
        return z * cos + torch.cat([-z[..., half:], z[..., :half]], -1) * sin

    repeat = len(h.q) // len(h.k)
    q, k = rope(x @ h.q.mT), rope(x @ h.k.mT).repeat_interleave(repeat, 0)
    v = (x @ h.v.mT).repeat_interleave(repeat, 0)
    mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    p = (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1)
    return (p @ v @ h.o).sum(0)


X = rand(7, N, seed=99) * 0.3


def close(a, b, tol=1e-10):
    assert (a - b).abs().max() <= tol * b.abs().max()


@pytest.mark.parametrize("root", [None, 1])
@pytest.mark.parametrize("similar", [True, False])
def test_alignment_alone_is_exact(root, similar):
    h = heads()
    root = None if root is None else metric(rand(N - 1, N - 1) @ rand(N - 1, N - 1).T, rand(N - 1))
    roots = {"key_root": root, "value_root": root}
    done = share(h, 2, ROTARY, Maps.orthogonal(E), similar=similar, **roots)
    close(attention(done.aligned, X), attention(h, X))
    assert not torch.allclose(done.aligned.k, h.k)
    for part in ("k", "v"):
        assert done.errors[part][0] <= done.errors[part][1]


def twins():
    """Four key heads, two pairs of copies up to free maps, laid out 0 1 0 1."""
    h = heads(kv=2)
    a = torch.stack([torch.eye(D, dtype=torch.float64)] * 2 + [
        rotary(rand(3, seed=7), 1.7), rotary(rand(3, seed=8), 0.4)
    ])  # fmt: skip
    b = torch.stack([torch.eye(E, dtype=torch.float64)] * 2 + [orthogonal(E, 9), orthogonal(E, 10)])
    q = h.q.reshape(4, 2, D, N)
    back = torch.linalg.inv(a).mT
    return Heads(
        (back[:, None] @ q).flatten(0, 1), a @ h.k.repeat(2, 1, 1), b @ h.v.repeat(2, 1, 1),
        (b[:, None] @ h.o.reshape(4, 2, E, M)).flatten(0, 1),
    )  # fmt: skip


def test_copies_up_to_free_maps_are_found_and_lose_nothing():
    h = twins()
    done = share(h, 2, ROTARY, Maps.orthogonal(E))
    assert done.groups.tolist() == [[0, 2], [1, 3]]
    assert done.heads.k.shape == (2, D, N)
    assert done.heads.v.shape == (2, E, N)
    close(attention(done.heads, X), attention(h, X))
    assert done.errors["k"][0] < 1e-20 < done.errors["k"][1]
    assert done.errors["v"][0] < 1e-20 < done.errors["v"][1]


def test_without_alignment_only_plain_copies_are_free():
    h = twins()
    done = share(h, 2, Maps.none(), Maps.none())
    assert (attention(done.heads, X) - attention(h, X)).abs().max() > 1e-2
    assert done.errors["v"][0] == done.errors["v"][1] > 0.1
    plain = heads(kv=2)
    plain = Heads(plain.q, plain.k.repeat(2, 1, 1), plain.v.repeat(2, 1, 1), plain.o)
    done = share(plain, 2, Maps.none(), Maps.none())
    assert done.groups.tolist() == [[0, 2], [1, 3]]
    close(attention(done.heads, X), attention(plain, X))


def test_opposite_copies_do_not_cancel():
    """The plain mean of x and -x is zero; aligned, they are one head."""
    x = torch.stack([rand(E, N), -rand(E, N)])
    assert float((align(x, Maps.orthogonal(E)) @ x).mean(0).norm()) > 0.99 * float(x[0].norm())


def test_order_and_back_is_identity():
    h, order = heads(), torch.tensor([2, 0, 3, 1])
    close(attention(h.ordered(order), X), attention(h, X))
    back = h.ordered(order).ordered(torch.argsort(order))
    assert torch.equal(back.q, h.q)
    assert torch.equal(back.o, h.o)


def test_as_many_groups_as_heads_changes_nothing():
    h = heads()
    done = share(h, KV, Maps.none(), Maps.none())
    assert done.groups.tolist() == [[0], [1], [2], [3]]
    assert torch.equal(done.heads.k, h.k)
    aligned = share(h, KV, ROTARY, Maps.orthogonal(E))
    close(attention(aligned.heads, X), attention(h, X))


def test_one_head_for_all():
    done = share(heads(), 1, ROTARY, Maps.orthogonal(E))
    assert done.groups.tolist() == [[0, 1, 2, 3]]
    assert done.heads.k.shape == (1, D, N)


def test_turns_are_the_best_of_their_kind():
    """No small turn within the maps comes nearer to the target."""
    x, target = rand(2, D, N), rand(D, N, seed=5)
    best = turns(x, target, ROTARY)
    near = (best @ x - target).pow(2).sum((1, 2))
    for angle in (1e-3, -1e-3, 0.5, 3.0):
        moved = rotary(torch.full((3,), angle, dtype=torch.float64)) @ best @ x
        assert ((moved - target).pow(2).sum((1, 2)) > near).all()
    whole = turns(x, target, Maps.orthogonal(D))
    assert ((whole @ x - target).pow(2).sum((1, 2)) <= near + 1e-12).all()
    close(whole @ whole.mT, torch.eye(D, dtype=torch.float64).expand(2, D, D))


def test_channels_outside_the_maps_stay():
    part = Maps(torch.tensor([[0, 2]]), torch.tensor([3, 5]), scale=True)
    x = rand(3, D, N)
    found = align(x, part)
    still = [1, 4]
    assert torch.equal((found @ x)[:, still], x[:, still])
    assert torch.equal(scales(x, part)[:, [1, 3, 4, 5]], torch.ones(3, 4, dtype=torch.float64))


def test_distance_is_what_the_best_map_leaves():
    x = rand(3, D, N)
    for maps in (
        ROTARY,
        Maps.orthogonal(D),
        Maps.none(),
        Maps(ROTARY.pairs[:1], torch.tensor([4])),
    ):
        found = distances(x, maps)
        for i in range(3):
            left = (turns(x, x[i], maps) @ x - x[i]).pow(2).sum((1, 2))
            ends = x[i].pow(2).sum() + x.pow(2).sum((1, 2))
            torch.testing.assert_close(found[i], left / ends, rtol=0, atol=1e-12)


def test_scales_even_out_pairs_and_spare_dead_ones():
    x = rand(3, D, N)
    x[1, [2, 5]] = 0
    even = x * scales(x, ROTARY)[..., None]
    norms = even[:, ROTARY.pairs].pow(2).sum((-2, -1))
    close(norms[:, :2], norms[:1, :2].expand(3, 2))
    assert torch.equal(even[:, [2, 5]], x[:, [2, 5]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 2), (8, 4)]))
def test_groups_are_balanced_deterministic_and_no_worse_than_neighbours(seed, size):
    h, count = size
    d = rand(h, h, seed=seed).abs()
    d = (d + d.T).fill_diagonal_(0.0)
    found = grouped(d, count)
    assert found.shape == (count, h // count)
    assert sorted(found.flatten().tolist()) == list(range(h))
    assert torch.equal(found, grouped(d, count))
    assert (found[:, 1:] > found[:, :-1]).all()

    def cost(groups):
        return sum(float(d[g][:, g].sum()) for g in groups)

    near = adjacent(h, count)
    assert cost(found) <= cost([torch.nonzero(near == g).flatten() for g in range(count)]) + 1e-9
    order = torch.randperm(h, generator=torch.Generator().manual_seed(seed))
    if h == 4:  # three ways to pair four heads: the swaps find the best one
        mixed = grouped(d[order][:, order], count)
        assert cost(order[mixed]) == pytest.approx(cost(found))


def test_neighbours_win_ties():
    assert grouped(torch.zeros(6, 6), 2).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_metric_measures_activations():
    """‖W L‖² is the mean square of W [x; 1]."""
    x = rand(50, N) + 0.5
    root = metric(x.T @ x / 50, x.mean(0))
    w = rand(3, N + 1, seed=4)
    want = (torch.cat([x, torch.ones(50, 1)], 1) @ w.T).pow(2).mean(0)
    torch.testing.assert_close((w @ root).pow(2).sum(1), want)


def test_dead_heads_have_no_spread():
    assert spread(torch.zeros(2, D, N, dtype=torch.float64), torch.tensor([[0, 1]])) == 0.0
    x = torch.zeros(2, D, N, dtype=torch.float64)
    done = share(Heads(rand(2, D, N), x, x, rand(2, D, M)), 1, ROTARY, Maps.orthogonal(D))
    assert torch.isfinite(done.heads.q).all()
