"""A loss that can be read: of held-out samples under fixed masks, beside rules without a network.

A rule predicts the target of a masked token from the visible ones:
    "mean"      the mean target of the held-out samples, everywhere
    "own mean"  the mean target of the visible tokens of the same sample
    "copy"      the target of the nearest visible token, which in a clip is one of the same place
                at another time, if there is one
A model whose loss is not below all three has learned little of what HOG can teach. Classes (dVAE
tokens, pseudo-labels) have the first rule only, their frequencies. Ours: neither the paper nor the
release looks at such rules.
"""
import engine

import torch

import data


def nearest_visible(mask, grid):
    """For each token the index (B, N) of the visible token to copy. mask: bool (B, N), True =
    hidden. grid: (t, h, w). A step in space counts for more than any distance in time."""
    t, y, x = torch.meshgrid(*(torch.arange(n, device=mask.device) for n in grid), indexing="ij")
    squared = lambda axis: (axis.reshape(-1, 1) - axis.reshape(1, -1)).square().float()
    distance = squared(t) + grid[0] ** 2 * (squared(y) + squared(x))          # (N, N)
    return torch.stack([distance.masked_fill(hidden, torch.inf).argmin(1) for hidden in mask])


def by_rules(target, mask, grid, mean):
    """{rule: its prediction, broadcast to (B, N, dim)}. target: (B, N, dim). mean: (dim,)."""
    visible = ~mask[..., None]
    own_mean = (target * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True).clamp(min=1)
    source = nearest_visible(mask, grid)[..., None].expand_as(target)
    return {"mean": mean.expand_as(target), "own mean": own_mean.expand_as(target),
            "copy": target.gather(1, source)}


class HeldOut:
    """Losses on fixed samples with fixed crops and masks, kept in memory as bytes.

    model: MaskFeat. dataset: data.PretrainDataset of the samples. grid: (t, h, w) or (h, w) of the
    output tokens. to_device: a loader's batch -> (x, mask, target input). autocast: of
    engine.mixed_precision. Batches do not depend on the number of processes, so neither do the
    losses. All ranks must call each method.
    """

    def __init__(self, model, dataset, grid, to_device, autocast, device_batch, workers, rank=0,
                 world=1):
        self.model, self.to_device, self.autocast = model, to_device, autocast
        self.grid = (1, 1, *grid)[-3:]
        keys = [(0, index) for index in range(len(dataset))]
        batches = [keys[i:i + device_batch] for i in range(0, len(keys), device_batch)]
        self.numbers = range(rank, len(batches), world)
        self.batches, self.unreadable = [], []                # [(path, reason)], replaced by others
        for batch in data.make_loader(dataset, batches[rank::world], workers):
            self.unreadable += batch.pop("unreadable")
            self.batches.append({name: x.clone() for name, x in batch.items()})  # not shared memory

    @torch.no_grad()
    def over_batches(self, function):
        """[function(x, mask, target input) of each batch], of all ranks, in order."""
        results = []
        for number, batch in zip(self.numbers, self.batches):
            with self.autocast():
                results.append((number, function(*self.to_device(batch))))
        return [result for _, result in sorted(engine.gather_list(results), key=lambda r: r[0])]

    def loss(self):
        """The model's loss, a mean over the masked tokens of all samples."""
        self.model.eval()
        # model.forward, not model: one compiled for training would be compiled for each shape.
        losses = self.over_batches(lambda x, mask, target_input: (
            self.model.forward(x, mask, target_input)[0].item(), mask.sum().item()))
        self.model.train()
        return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)

    def levels(self):
        """{rule: its loss}, of the rules above."""
        kind = self.model.target

        def total(x, mask, target_input):
            target = self.model.compute_target(x, target_input)               # (B, N, ...)
            if target.ndim == 2:                              # ids of tokens
                counts = torch.bincount(target.flatten(), minlength=kind.dim)
            else:
                counts = target.flatten(0, 1).sum(0)
            return counts.cpu().double(), mask.numel()

        def losses(x, mask, target_input):
            target, hidden = self.model.compute_target(x, target_input), mask.flatten(1)
            if kind.input_kind in ("view", "labels"):           # classes: their log probabilities
                logits = mean.to(x.device).clamp(min=1e-12).log()
                rules = {"mean": logits.expand(*hidden.shape, kind.dim)}
            else:
                rules = by_rules(target, hidden, self.grid, mean.to(x.device))
            return {rule: kind.loss(prediction, target, hidden).item()
                    for rule, prediction in rules.items()}, hidden.sum().item()

        sums, counts = zip(*self.over_batches(total))
        mean = (sum(sums) / sum(counts)).float()                              # (dim,)
        parts = self.over_batches(losses)
        return {rule: sum(part[rule] * n for part, n in parts) / sum(n for _, n in parts)
                for rule in parts[0][0]}
