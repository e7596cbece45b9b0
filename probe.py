"""What frozen features tell apart: nearest neighbors, a linear probe, an attentive probe.

evaluate.py computes the features, once for all probes and all draws of labels. The linear probe
sees the mean of the tokens. That understates models trained by masking, whose tokens differ more
than their mean, so the attentive probe learns which tokens to look at. The paper has no such table.
"""
import random

import engine

import torch
import torch.nn as nn
import torch.nn.functional as F

LRS, FIXED_LR = (0.03, 0.1, 0.3, 1.0), 0.3  # of SGD at batch 256
MIN_HELD_OUT = 20                           # files; fewer do not tell which rate is best


def percent(share, files):
    """An accuracy in percent ± one standard error of `files` files, sqrt(p (1 - p) / n)."""
    return f"{100 * share:.2f} ± {100 * (share * (1 - share) / files) ** 0.5:.2f}"


def nearest_neighbors(x, y, train, test, k, num_classes, temperature=0.07):
    """Top-1 on the rows `test` of the votes of the k most similar rows `train`.

    x: (n, D) features. y: (n,) labels. train, test: row numbers. A vote weighs exp(cosine / T), as
    in DINO's evaluation (Caron et al., ICCV 2021).
    """
    x, right = F.normalize(x, dim=1), 0
    bank, labels = x[train].T, y[train]
    for rows in test.split(256):
        cosine, nearest = (x[rows] @ bank).topk(min(k, len(train)), dim=1)    # (rows, k)
        votes = torch.zeros(len(rows), num_classes, device=x.device)
        votes.scatter_add_(1, labels[nearest], (cosine / temperature).exp())
        right += (votes.argmax(dim=1) == y[rows]).sum().item()
    return right / len(test)


class AttentiveProbe(nn.Module):
    """Cross-attention of one learned query to all tokens, LayerNorm, linear layer.

    A head's output is sum_n softmax_n(q . K x_n / sqrt(D)) V x_n. With a single query, q . K x is
    (K^T q) . x: one learned vector a head replaces query and keys. V moves out of the sum. The
    start is the mean of the tokens.
    """

    def __init__(self, dim, num_classes):
        super().__init__()
        heads = max(dim // 64, 1)
        self.query = nn.Parameter(torch.zeros(heads, dim))
        self.value = nn.Parameter(torch.eye(dim).unflatten(0, (heads, -1)))   # (heads, C, D)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        """(B, N, D) -> logits (B, num_classes)."""
        share = (x @ self.query.T / x.shape[2] ** 0.5).softmax(dim=1)         # (B, N, heads)
        x = torch.einsum("bnh,bnd->bhd", share, x)
        x = torch.einsum("bhd,hcd->bhc", x, self.value).flatten(1)            # (B, D)
        return self.head(self.norm(x))


def fit(kind, x, y, train, test, lrs, num_classes, device, seed=0, epochs=100, batch_size=256):
    """Top-1 on the rows `test` of a probe for each learning rate, trained on the rows `train`.

    kind: nn.Linear or AttentiveProbe. x: (n, D) or (n, N, D), float32 or float16. The rates share
    each batch. Features are standardized by mean and deviation of each channel over `train`.
    """
    D = x.shape[-1]
    parts = lambda: (x[rows].to(device).float().reshape(-1, D) for rows in train.split(batch_size))
    count = len(train) * x[0].numel() // D
    mean = sum(part.sum(dim=0) for part in parts()) / count
    std = (sum((part - mean).square().sum(dim=0) for part in parts()) / count).sqrt() + 1e-6
    read = lambda rows: ((x[rows].to(device).float() - mean) / std, y[rows].to(device))

    engine.seed_all(seed)
    probes = nn.ModuleList(kind(D, num_classes) for _ in lrs).to(device)
    batch_size = min(batch_size, len(train))
    optimizer = torch.optim.SGD([{"params": probe.parameters(), "lr": lr * batch_size / 256}
                                 for probe, lr in zip(probes, lrs)], momentum=0.9)
    per_epoch = len(train) // batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    for _ in range(epochs):
        order = train[torch.randperm(len(train))]
        for rows in order.split(batch_size)[:per_epoch]:
            features, labels = read(rows)
            loss = sum(F.cross_entropy(probe(features), labels) for probe in probes)
            optimizer.zero_grad()
            loss.backward()                                   # each probe sees its own term only
            optimizer.step()
            schedule.step()
    right = torch.zeros(len(lrs))
    with torch.no_grad():
        for rows in test.split(batch_size):
            features, labels = read(rows)
            right += torch.tensor([(probe(features).argmax(dim=1) == labels).sum().item()
                                   for probe in probes])
    return (right / len(test)).tolist()


def hold_out(y, seed):
    """A fifth of each class, rounded down and drawn by the seed. y: (n,) labels. bool (n,)."""
    held = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique().tolist():
        own = (y == label).nonzero().flatten().tolist()
        held[random.Random(f"{seed} {label}").sample(own, len(own) // 5)] = True
    return held


def held_out_rate(kind, x, y, train, num_classes, device, seed):
    """The learning rate that is best on a fifth of the rows `train`. It is FIXED_LR if that is
    among the best, or if the fifth has fewer than MIN_HELD_OUT rows."""
    held = hold_out(y[train], seed)
    if held.sum() < MIN_HELD_OUT:
        return FIXED_LR
    scores = fit(kind, x, y, train[~held], train[held], LRS, num_classes, device, seed)
    best = [lr for lr, score in zip(LRS, scores) if score == max(scores)]
    return FIXED_LR if FIXED_LR in best else best[0]


def compare(features, tokens, y, draws, test, num_classes, device, seed=0):
    """{name of a probe: [top-1 on the rows `test` for each draw]}.

    features: (n, D). tokens: (n, N, D), or None for no attentive probe. draws: the rows to train
    on, one tensor a draw. Draw i is trained with seed + i.
    """
    found = {f"{k} neighbors": [
        nearest_neighbors(features.to(device), y.to(device), train, test, k, num_classes)
        for train in draws] for k in (10, 20)}
    for name, kind, x in (("linear", nn.Linear, features), ("attentive", AttentiveProbe, tokens)):
        if x is not None:
            found[name] = []
            for i, train in enumerate(draws):
                lr = held_out_rate(kind, x, y, train, num_classes, device, seed + i)
                found[name] += fit(kind, x, y, train, test, [lr], num_classes, device, seed + i)
    return found
