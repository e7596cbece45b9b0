"""probe.py against plain references, and what a probe must and must not see."""
import numpy as np
import pytest
import torch

import probe

CPU = torch.device("cpu")


def test_nearest_neighbors_against_loops():
    x, y = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3
    train, test, right = torch.arange(5, 35), torch.arange(35, 50), 0
    for i in test.tolist():
        cosines = sorted(((x[i] @ x[j] / (x[i].norm() * x[j].norm())).item(), y[j].item())
                         for j in train.tolist())
        votes = [sum(np.exp(cosine / 0.07) for cosine, label in cosines[-7:] if label == c)
                 for c in range(3)]
        right += int(np.argmax(votes)) == y[i]
    assert probe.nearest_neighbors(x, y, train, test, 7, 3) == right / 15
    assert probe.nearest_neighbors(x, y, train, train, 1, 3) == 1.0           # each finds itself


def test_attention_against_query_key_value():
    """Cross-attention with separate keys and values, head by head and token by token."""
    torch.manual_seed(0)
    net, x = probe.AttentiveProbe(128, 3), torch.randn(2, 5, 128)
    torch.testing.assert_close(net(x), net.head(net.norm(x.mean(dim=1))))     # the start
    q, K, V = torch.randn(2, 64), torch.randn(2, 64, 128) / 8, torch.randn(2, 64, 128)
    with torch.no_grad():
        net.query.copy_(torch.stack([K[h].T @ q[h] for h in range(2)]))
        net.value.copy_(V)
    heads = []
    for h in range(2):
        share = torch.stack([(K[h] @ x[:, n].T).T @ q[h] / 128 ** 0.5 for n in range(5)], dim=1)
        share = share.exp() / share.exp().sum(dim=1, keepdim=True)
        heads.append(sum(share[:, n, None] * (x[:, n] @ V[h].T) for n in range(5)))
    z = torch.cat(heads, dim=1)
    z = z - z.mean(dim=1, keepdim=True)
    z = z / (z.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(net(x), net.head(z), rtol=1e-4, atol=1e-4)
    net(x)[:, 0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (net.query, net.value, net.head.weight))


def tokens_with_a_clue():
    """The label is in one token, which is marked. In the mean it is lost among the others."""
    rng = torch.Generator().manual_seed(0)
    x, y, every = 2 * torch.randn(150, 12, 8, generator=rng), torch.arange(150) % 2, range(150)
    place = torch.randint(12, (150,), generator=rng)
    x[..., 7] = 0
    x[every, place] = 0
    x[every, place, 7] = 6
    x[every, place, y] = 3
    return x.half(), y, torch.arange(90), torch.arange(90, 150)


def test_attentive_probe_finds_the_token():
    x, y, train, test = tokens_with_a_clue()
    found = probe.compare(x.float().mean(dim=1), x, y, [train], test, 2, CPU)
    assert list(found) == ["10 neighbors", "20 neighbors", "linear", "attentive"]
    assert found.pop("attentive")[0] > 0.95 and max(found.values())[0] < 0.85


def test_fit_standardizes_and_rates_do_not_mix():
    x, y, train, test = tokens_with_a_clue()
    x = x.double().mean(dim=1)
    fit = lambda x, lrs: probe.fit(torch.nn.Linear, x, y, train, test, lrs, 2, CPU, epochs=10)
    alone, both = fit(x, [0.3]), fit(x, [0.3, 1000.0])
    assert both[0] == alone[0] == pytest.approx(fit(1000 * x + 5, [0.3])[0], abs=0.02)


def test_rate_is_chosen_without_the_test_rows(monkeypatch):
    """On a fifth of each class of the training rows. With too few of them the rate is fixed."""
    y, scores, seen = torch.tensor([0] * 100 + [1] * 4 + [0, 1]), [0.7, 0.7, 0.5, 0.1], []

    def fit(kind, x, y, train, test, *rest):
        seen.append((train.tolist(), test.tolist()))
        return scores

    monkeypatch.setattr(probe, "fit", fit)
    rate = lambda rows: probe.held_out_rate(None, None, y, torch.arange(rows), 2, CPU, 0)
    assert rate(99) == probe.FIXED_LR and not seen            # 19 files
    assert rate(104) == probe.LRS[0]
    scores[2] = 0.7
    assert rate(104) == probe.FIXED_LR
    train, held = seen[0]
    assert len(held) == 20 and max(held) < 100 and sorted(train + held) == list(range(104))


@pytest.mark.parametrize("right, files", [(30, 120), (0, 5), (5, 5)])
def test_standard_error(right, files):
    hits = np.arange(files) < right
    assert probe.percent(right / files, files) == (
        f"{100 * hits.mean():.2f} ± {100 * hits.std() / files ** 0.5:.2f}")
