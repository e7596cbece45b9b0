"""The slow, obvious forms of what hog.py, vit.py and mvit.py compute: references for the tests,
rivals for tools/bench.py."""
import math

import torch
import torch.nn.functional as F

from mvit import relative_table


def plain_attention(q, k, v, q_thw, k_thw, rel_pos_t, rel_pos_h, rel_pos_w):
    """`mvit.attention` as the equations stand, with (Nq x Nk) logits and bias."""
    C = q.shape[-1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                # (B, heads, 1 + N, C)
    logits = (q * C ** -0.5) @ k.transpose(-2, -1)
    grid = q[:, :, 1:].unflatten(2, q_thw)
    bias = 0
    for axis, table in enumerate((rel_pos_t, rel_pos_h, rel_pos_w)):
        rel = relative_table(table, q_thw[axis], k_thw[axis]).to(q.dtype)
        part = torch.einsum(f"bnthwc,{'thw'[axis]}kc->bnthwk", grid, rel)
        shape = [1, 1, 1]
        shape[axis] = k_thw[axis]
        bias = bias + part.unflatten(-1, shape).expand(*part.shape[:-1], *k_thw)
    logits[:, :, 1:, 1:] = logits[:, :, 1:, 1:] + bias.flatten(5).flatten(2, 4)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def plain_pool(self, x, conv, norm, thw):
    """`MultiScaleAttention.pool` with heads as samples of a batch."""
    B, N, D = x.shape
    x = x.reshape(B, N, self.num_heads, -1).transpose(1, 2)              # (B, heads, 1 + N, C)
    patches = x[:, :, 1:].unflatten(2, thw).flatten(0, 1).permute(0, 4, 1, 2, 3).contiguous()
    patches = F.conv3d(patches, conv.weight, None, conv.stride, 1, 1, len(conv.weight))
    tokens = patches.flatten(2).transpose(1, 2).unflatten(0, (B, self.num_heads))
    tokens = norm(torch.cat([x[:, :, :1], tokens], dim=2))
    return tokens.transpose(1, 2), tuple(patches.shape[2:])


def plain_vit_attention(self, x):
    """`vit.Attention.forward` with the (N x N) weights of every head."""
    q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return self.proj((weights @ v).transpose(1, 2).flatten(2))


def plain_hog(images, bins=9, cell=8):
    """Every pixel's magnitude scattered into a row of bins of its own, then summed over cells."""
    B, C = images.shape[:2]
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=images.device)
    padded = F.pad(images.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    gx, gy = F.conv2d(padded, torch.stack([sobel, sobel.T])[:, None]).unbind(1)
    bin = (torch.atan2(gx, gy) / math.pi * bins).floor().long() % bins
    votes = torch.zeros(B * C, bins, *images.shape[2:], device=images.device)
    votes.scatter_add_(1, bin[:, None], (gx.square() + gy.square()).sqrt()[:, None])
    histogram = votes.unfold(2, cell, cell).unfold(3, cell, cell).sum((-2, -1))
    return F.normalize(histogram, dim=1).unflatten(0, (B, C))


def plain_clip(path, num_frames=16, sampling_rate=4, position=0.5, short_side=256):
    """`video.read_clip` of a file whose frames all have times: decode all to RGB, then pick.

    It takes one thread, as read_clip does, since a loader has a worker on each core.
    """
    import av
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = [(frame.time, frame.reformat(format="rgb24", threads=1).to_ndarray())
                  for frame in container.decode(stream)]
        spare = max(float(stream.duration * stream.time_base) - num_frames * sampling_rate / 30, 0)
    picked = []
    for j in range(num_frames):
        moment = frames[0][0] + position * spare + j * sampling_rate / 30
        shown = [picture for time, picture in frames if time <= moment + 6e-4]
        picked.append(torch.from_numpy(shown[-1]))
    clip = torch.stack(picked).permute(0, 3, 1, 2).float()
    scale = short_side / min(clip.shape[2:])
    size = [round(side * scale) for side in clip.shape[2:]]
    clip = F.interpolate(clip, size, mode="bilinear", antialias=True)
    return clip.round().to(torch.uint8)
